"""KeyedPermutation: its documented formula in plain Python, the statistics of a fair shuffle."""

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adabatch.data.order import KeyedPermutation

M64 = 2**64
PHI = 0x9E3779B97F4A7C15
SEEDS = st.integers(0, M64 - 1)


def mix(z):
    z %= M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M64
    return z ^ (z >> 31)


def transcription(n, seed, epoch, position):
    """The order as the docstring writes it down, in unbounded integers, one position at a time."""
    rows = next(a for a in itertools.count(math.isqrt(n)) if a * a >= n and a % 2 == 0)
    columns = math.ceil(n / rows) if n < 2**40 else -(-n // rows)
    keys = [mix(mix(mix(seed + PHI) + epoch) + (k + 1) * PHI) for k in range(16)]
    while True:
        row, column = divmod(position, columns)
        for k, key in enumerate(keys):
            if k % 2 == 0:
                row = (row + ((mix(column * PHI + key) >> 32) * rows >> 32)) % rows
            else:
                column = (column + ((mix(row * PHI + key) >> 32) * columns >> 32)) % columns
        position = row * columns + column
        if position < n:
            return position


@pytest.mark.parametrize("n", range(301))
def test_is_a_permutation_of_every_small_n(n):
    order = KeyedPermutation(n, seed=n * 7, epoch=n % 5)(slice(None))
    assert sorted(order.tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(301, 100_000), seed=SEEDS, epoch=SEEDS)
def test_is_a_permutation_of_larger_n(n, seed, epoch):
    assert np.array_equal(np.sort(KeyedPermutation(n, seed, epoch)(range(n))), np.arange(n))


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(), n=st.one_of(st.integers(1, 300), st.integers(1, 2**62)), seed=SEEDS,
    epoch=SEEDS,
)
def test_follows_its_documented_formula(data, n, seed, epoch):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    expected = [transcription(n, seed, epoch, position) for position in positions]
    order = KeyedPermutation(n, seed, epoch)
    assert order(np.array(positions)).tolist() == expected
    assert [order(position) for position in positions] == expected


@pytest.mark.parametrize(
    ("n", "seed", "epoch", "start", "golden"),
    [
        (1, 0, 0, 0, [0]),
        (2, 0, 0, 0, [1, 0]),
        (10, 0, 0, 0, [8, 0, 1, 7, 5, 6, 4, 3, 2, 9]),
        (10, 0, 1, 0, [3, 0, 7, 1, 2, 9, 4, 6, 8, 5]),
        (17, M64 - 1, 3, 0, [11, 15, 10, 13, 14, 8, 6, 7, 4, 2, 12, 9, 5, 3, 1, 16, 0]),
        (60000, 0, 0, 0, [31663, 1880, 45873, 35970, 55482, 2837]),
        (60000, 42, 7, 59994, [38522, 50471, 23797, 10351, 16582, 36335]),
        (10000000000, 1, 2, 5000000000, [1932583106, 5553129031, 1990137849, 6188587885]),
        (2**62, 0, 0, 2**61, [3331558218182734599, 2375701502453482811, 2074448686431102643]),
    ],
)
def test_golden_values_never_change(n, seed, epoch, start, golden):
    assert KeyedPermutation(n, seed, epoch)(range(start, start + len(golden))).tolist() == golden
    assert [transcription(n, seed, epoch, start + i) for i in range(len(golden))] == golden


def test_epochs_and_seeds_give_different_orders():
    keys = itertools.product(range(10), repeat=2)
    orders = {tuple(KeyedPermutation(1000, *key)(slice(None)).tolist()) for key in keys}
    assert len(orders) == 100


@pytest.mark.parametrize(("n", "trials"), [(2, 1000), (3, 1500), (4, 3000), (5, 6000)])
def test_every_order_of_a_few_samples_is_equally_likely(n, trials):
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for trial in range(trials):
        counts[tuple(KeyedPermutation(n, trial // 10, trial % 10)(slice(None)).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [10, 64, 100])
def test_positions_and_neighbours_are_uniform(n):
    trials = 2000
    landed, distances = np.zeros((n, n)), np.zeros(n)
    for epoch in range(trials):
        order = KeyedPermutation(n, 1, epoch)(slice(None))
        landed[np.arange(n), order] += 1
        distances += np.bincount(np.diff(order) % n, minlength=n)
    # Rows and columns both sum to the number of trials: (n−1)² degrees of freedom, each of
    # variance trials / (n−1).
    statistic = ((landed - trials / n) ** 2).sum() * (n - 1) / trials
    assert 1e-3 < stats.chi2.sf(statistic, (n - 1) ** 2) < 1 - 1e-3
    assert distances[0] == 0
    assert stats.chisquare(distances[1:]).pvalue > 1e-3


@pytest.mark.parametrize("n", [10_000, 65_536, 1_000_003])
def test_an_order_shows_no_correlation(n):
    order = KeyedPermutation(n, 5, 2)(slice(None)).astype(float)
    limit = 4 / math.sqrt(n)
    for lag in (1, 2, 64, math.isqrt(n)):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < limit
    next_epoch = KeyedPermutation(n, 5, 3)(slice(None)).astype(float)
    next_seed = KeyedPermutation(n, 6, 2)(slice(None)).astype(float)
    assert abs(np.corrcoef(order, next_epoch)[0, 1]) < limit
    assert abs(np.corrcoef(order, next_seed)[0, 1]) < limit


def test_pairs_of_neighbours_fill_the_plane():
    n, cells = 1_000_000, 16
    order = KeyedPermutation(n, 9, 0)(slice(None))
    pairs = (order[::2] * cells // n) * cells + order[1::2] * cells // n
    assert stats.chisquare(np.bincount(pairs, minlength=cells**2)).pvalue > 1e-3


def test_fixed_points_are_as_frequent_as_in_a_fair_shuffle():
    orders = (KeyedPermutation(500, 0, epoch)(slice(None)) for epoch in range(1000))
    fixed = [int((order == np.arange(500)).sum()) for order in orders]
    # Poisson(1) in the limit.
    assert abs(np.mean(fixed) - 1) < 4 / math.sqrt(1000)


def test_ten_billion_samples_take_no_time_and_no_memory():
    tracemalloc.start()
    begin = time.perf_counter()
    batch = KeyedPermutation(10**10, seed=0, epoch=0)(range(9_999_999_000, 10**10))
    seconds = time.perf_counter() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(batch.tolist())) == 1000
    # Milliseconds in truth; the bound only has to exclude anything that grows with n.
    assert seconds < 0.5
    assert peak < 1_000_000


def test_positions_may_be_an_int_a_slice_a_range_or_an_array_of_any_shape():
    order = KeyedPermutation(20, 3, 1)
    whole = order(slice(None))
    assert whole.dtype == np.int64
    assert isinstance(order(4), int)
    assert order(4) == whole[4]
    assert order(slice(5, None, 3)).tolist() == whole[5::3].tolist()
    assert order(slice(-3, None)).tolist() == whole[-3:].tolist()
    assert order(range(19, -1, -1)).tolist() == whole[::-1].tolist()
    square = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert order(square).tolist() == whole.reshape(4, 5).tolist()
    assert order([]).shape == (0,)
    assert order(slice(0, 0)).dtype == np.int64
    assert len(order) == 20
    assert repr(order) == "KeyedPermutation(n=20, seed=3, epoch=1)"


@pytest.mark.parametrize("positions", [-1, 20, [0, 20], [-1, 3]])
def test_a_position_outside_is_an_error(positions):
    with pytest.raises(IndexError, match="positions must lie in 0 … 19"):
        KeyedPermutation(20, 0, 0)(positions)


def test_no_position_lies_in_an_empty_order():
    assert KeyedPermutation(0, 0, 0)(slice(None)).tolist() == []
    with pytest.raises(IndexError):
        KeyedPermutation(0, 0, 0)(0)


@pytest.mark.parametrize("positions", [1.5, [0.0], [True], "a"])
def test_a_position_that_is_no_integer_is_an_error(positions):
    with pytest.raises(TypeError, match="positions must be integers"):
        KeyedPermutation(20, 0, 0)(positions)


@pytest.mark.parametrize("name", ["n", "seed", "epoch"])
@pytest.mark.parametrize(
    ("value", "error"),
    [*((value, ValueError) for value in (-1, 2**64)),
     *((value, TypeError) for value in (2.0, True, None, "3"))],
)
def test_a_wrong_argument_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name} must be an integer from 0 to .*got {value!r}"):
        KeyedPermutation(**{"n": 4, "seed": 0, "epoch": 0, name: value})
