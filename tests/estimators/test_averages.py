"""The moving average against its definition as plain sums, and its standard error against
distributions with a known variance."""

import math

import numpy as np
import pytest
from scipy import stats

from adabatch.estimators.averages import MovingAverage


def by_definition(values, weights, smoothing):
    """Average and standard error from the sums in the class's docstring, all values at once."""
    k = smoothing ** np.arange(len(values) - 1, -1, -1, dtype=float)
    x = np.asarray(values, float)
    p = k * np.asarray(weights, float) / (k * weights).sum()
    average = (p * x).sum()
    lost = 1 - 2 * (p**3).sum() / (p**2).sum() + (p**2).sum()
    variance = (p**2 * (x - average) ** 2).sum() / lost
    return average, math.sqrt(variance)


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
    """The average is as good as the mean of 39 values, in truth and by its error."""
    rng, runs, steps = np.random.default_rng(0), 600, 200
    k = 0.95 ** np.arange(steps - 1, -1, -1.0)
    n_eff = k.sum() ** 2 / (k**2).sum()
    assert n_eff == pytest.approx(39, rel=1e-3)
    squares, ends = [], []
    for values in rng.normal(size=(runs, steps)):
        average = MovingAverage(0.95)
        for value in values:
            average.update(float(value), 16)
        squares.append(average.std_error() ** 2)
        ends.append(average.average)
    assert average.effective_steps == pytest.approx(n_eff, rel=1e-9)
    assert np.mean(squares) == pytest.approx(1 / n_eff, rel=0.05)
    assert np.var(ends) == pytest.approx(1 / n_eff, rel=0.15)
    # The spread of the squared errors is that of a variance from ν + 1 values.
    assert 2 / (np.std(squares) / np.mean(squares)) ** 2 == pytest.approx(average.freedom, rel=0.2)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("sizes", [(16,), (4, 64), tuple(range(16, 256, 2))])
def test_intervals_cover_the_truth(sizes, power):
    """Of values whose standard deviation falls as the square root of the size, as T̂'s does, or as
    the size, as that of ‖g‖² − T̂/m does under noise."""
    rng, hits, runs = np.random.default_rng(1), 0, 500
    for _ in range(runs):
        average = MovingAverage(0.95)
        for step in range(120):
            size = sizes[step % len(sizes)]
            average.update(rng.normal(3.0, 4.0 / size**power), size)
        low, high = average.interval(0.9)
        hits += low < 3.0 < high
    assert 0.85 < hits / runs < 0.95


@pytest.mark.parametrize("sizes", [(16,), (4, 64)])
def test_errors_of_the_values_take_the_place_of_residuals(sizes):
    rng, average, smoothing = np.random.default_rng(3), MovingAverage(0.9), 0.9
    weights = np.array([sizes[step % len(sizes)] for step in range(50)], float)
    errors, freedom = rng.uniform(0.5, 2, 50), weights - 1
    for weight, error, ν in zip(weights, errors, freedom, strict=True):
        average.update(float(rng.normal()), weight, error, ν)
    p = smoothing ** np.arange(49, -1, -1, dtype=float) * weights
    p /= p.sum()
    parts = p**2 * errors**2
    assert average.std_error() == pytest.approx(math.sqrt(parts.sum()), rel=1e-12)
    expected = parts.sum() ** 2 / (parts**2 / freedom).sum()
    assert average.freedom == pytest.approx(expected, rel=1e-12)
    low, high = average.interval(0.8)
    half = stats.t.ppf(0.9, average.freedom) * average.std_error()
    assert (high - low) / 2 == pytest.approx(half, rel=1e-9)
    average.update(0.0, 16)  # one value without an error: from the residuals from now on
    assert average.std_error() == average.residual_error()
    assert average.freedom < 50


def test_an_interval_without_an_error_is_infinitely_long():
    average = MovingAverage()
    average.update(2.0, 16)
    assert average.interval() == (-math.inf, math.inf)
    average.update(2.0, 16)
    assert average.interval() == (2.0, 2.0)
    for level in (0, 1, 90, math.nan):
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            average.interval(level)


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
    with pytest.raises(ValueError, match="smoothing must be a number from 0"):
        MovingAverage(smoothing)


def test_incomplete_state():
    with pytest.raises(ValueError, match=r"lacks .*weights"):
        MovingAverage().load_state_dict({"average": 1.0})
