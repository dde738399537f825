"""The moving average against its definition as plain sums, and its standard error against distributions with a known variance."""

import math

import numpy as np
import pytest

from adabatch.estimators.averages import MovingAverage


def by_definition(values, weights, smoothing):
    """Average and standard error from the sums in the class's docstring, all values at once."""
    k = smoothing ** np.arange(len(values) - 1, -1, -1, dtype=float)
    w, x = np.asarray(weights, float), np.asarray(values, float)
    average = (k * w * x).sum() / (k * w).sum()
    variance = (k * w * (x - average) ** 2).sum() / (k.sum() - (k**2 * w).sum() / (k * w).sum())
    return average, math.sqrt(variance * (k**2 * w).sum()) / (k * w).sum()


@pytest.mark.parametrize("smoothing", [0.3, 0.95, 0.999])
@pytest.mark.parametrize("steps", [2, 3, 50, 400])
def test_matches_the_sums(smoothing, steps):
    rng = np.random.default_rng(steps)
    values, weights = rng.normal(5, 2, steps), rng.integers(1, 300, steps)
    average = MovingAverage(smoothing)
    for value, weight in zip(values, weights, strict=True):
        average.update(float(value), int(weight))
    expected, error = by_definition(values, weights, smoothing)
    assert average.average == pytest.approx(expected, rel=1e-12)
    assert average.std_error() == pytest.approx(error, rel=1e-9)


def test_effective_number_of_steps_at_equal_weights():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    average = MovingAverage(0.95)
    for value in values:
        average.update(float(value), 16)
    k = 0.95 ** np.arange(1999, -1, -1)
    mean = np.average(values, weights=k)
    n_eff = k.sum() ** 2 / (k**2).sum()
    assert n_eff == pytest.approx(39, rel=1e-3)
    unbiased = np.average((values - mean) ** 2, weights=k) / (1 - 1 / n_eff)
    assert average.std_error() == pytest.approx(math.sqrt(unbiased / n_eff), rel=1e-9)


@pytest.mark.parametrize("sizes", [(16,), (4, 64), tuple(range(16, 256, 2))])
def test_intervals_cover_the_truth(sizes):
    rng, hits, runs = np.random.default_rng(1), 0, 500
    for _ in range(runs):
        average = MovingAverage(0.95)
        for step in range(120):
            size = sizes[step % len(sizes)]
            average.update(rng.normal(3.0, 4.0 / math.sqrt(size)), size)
        hits += abs(average.average - 3.0) < 1.6849 * average.std_error()
    assert 0.85 < hits / runs < 0.95


def test_first_value_and_what_is_skipped():
    average = MovingAverage()
    assert math.isnan(average.average)
    assert average.update(7.0, 16) == 7.0
    assert math.isnan(average.std_error())
    before = average.state_dict()
    for value, weight in ((math.nan, 16), (math.inf, 16), (-math.inf, 16), (3.0, 0)):
        assert average.update(value, weight) == 7.0
    assert average.state_dict() == before


def test_no_smoothing_is_the_last_value():
    average = MovingAverage(0.0)
    assert [average.update(value, 16) for value in (1.0, 5.0, 2.0)] == [1.0, 5.0, 2.0]
    assert math.isnan(average.std_error())


def test_state_goes_on_bit_for_bit():
    rng = np.random.default_rng(2)
    values = rng.normal(size=40).tolist()
    whole, half = MovingAverage(0.9), MovingAverage(0.9)
    for value in values:
        whole.update(value, 8)
    for value in values[:20]:
        half.update(value, 8)
    resumed = MovingAverage(0.5)
    resumed.load_state_dict(half.state_dict())
    for value in values[20:]:
        resumed.update(value, 8)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match="smoothing is"):
        MovingAverage(smoothing)


def test_incomplete_state():
    with pytest.raises(ValueError, match=r"lacks .*weights"):
        MovingAverage().load_state_dict({"average": 1.0})
