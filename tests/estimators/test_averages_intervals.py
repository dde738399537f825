"""Fieller's intervals against their definition, and the covariance of two averages against plain
sums."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from adabatch import GradientMoments
from adabatch.estimators.averages import (
    JointAverages,
    MovingAverage,
    fieller,
    student_quantile,
)
from adabatch.estimators.moments import trace_error


def excess(ratio, numerator, denominator, variances, covariance, quantile):
    """(X − φY)² − t²·Var(X − φY): not above 0 inside the interval."""
    variance = variances[0] - 2 * ratio * covariance + ratio**2 * variances[1]
    return (numerator - ratio * denominator) ** 2 - quantile**2 * variance


@pytest.mark.parametrize("covariance", [-0.05, 0.0, 0.06])
@pytest.mark.parametrize(
    ("numerator", "denominator"), [(8.0, 2.0), (3.0, 1.0), (0.3, 2.0), (8.0, 0.2), (8.0, -0.1)]
)
def test_the_ends_are_where_the_test_just_rejects(numerator, denominator, covariance):
    given = (numerator, denominator, (0.16, 0.04), covariance, 1.7)
    low, high = fieller(*given)
    beyond = 1e4
    assert (low == 0) == (excess(0.0, *given) <= 0)
    if low:
        inside = min(high, beyond)
        lowest = lambda ratio: -excess(ratio, *given)  # noqa: E731
        peak = optimize.minimize_scalar(lowest, bounds=(0, low), method="bounded").x
        start = 0.0 if math.isfinite(high) else peak
        root = optimize.brentq(excess, start, (low + inside) / 2, args=given)
        assert root == pytest.approx(low, rel=1e-6)
    if math.isfinite(high):
        root = optimize.brentq(excess, max(numerator / denominator, low), beyond, args=given)
        assert root == pytest.approx(high, rel=1e-6)
    else:
        assert excess(beyond * max(1, low), *given) <= 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((math.nan, 1.0, (1.0, 1.0), 0.0, 1.7), (math.nan, math.nan)),
        ((4.0, 2.0, (math.nan, 1.0), 0.0, 1.7), (0.0, math.inf)),
        ((4.0, 2.0, (1.0, 1.0), 0.0, math.inf), (0.0, math.inf)),
        ((0.1, 0.1, (1.0, 1.0), 0.0, 1.7), (0.0, math.inf)),  # neither is known from 0
        ((4.0, 2.0, (0.0, 0.0), 0.0, 1.7), (2.0, 2.0)),
        ((4.0, 0.0, (0.0, 0.0), 0.0, 1.7), (math.inf, math.inf)),
        ((4.0, -3.0, (0.1, 0.1), 0.0, 1.7), (math.inf, math.inf)),  # a gap below 0 for certain
        ((-4.0, 3.0, (0.1, 0.1), 0.0, 1.7), (0.0, 0.0)),
        ((-4.0, -3.0, (0.1, 0.1), 0.0, 1.7), (0.0, 0.0)),
        ((-4.0, 0.1, (0.1, 0.1), 0.0, 1.7), (0.0, math.inf)),
    ],
)
def test_limits(given, expected):
    assert fieller(*given) == pytest.approx(expected, nan_ok=True)


def residual_covariance(x, p, y, q):
    """Σ pq(x − X)(y − Y), unbiased for values of one covariance."""
    products = p * q * (x - (p * x).sum()) * (y - (q * y).sum())
    return products.sum() / (1 - (p * q * (p + q)).sum() / (p * q).sum() + (p * q).sum())


@pytest.mark.parametrize("smoothings", [(0.95, 0.95), (0.9, 0.7)])
@pytest.mark.parametrize("steps", [2, 3, 60])
def test_the_covariance_is_the_sum_of_its_definition(steps, smoothings):
    rng = np.random.default_rng(steps)
    x, y = rng.multivariate_normal([5, 2], [[4, 1.2], [1.2, 1]], steps).T
    w, v = rng.integers(4, 20, steps).astype(float), rng.integers(4, 90, steps).astype(float)
    averages = [MovingAverage(smoothing) for smoothing in smoothings]
    joint = JointAverages(*averages)
    for step in range(steps):
        joint.update((x[step], w[step]), (y[step], v[step]))
    age = np.arange(steps - 1, -1, -1.0)
    shares = [decay**age * weights for decay, weights in zip(smoothings, (w, v), strict=True)]
    p, q = (share / share.sum() for share in shares)
    expected = residual_covariance(x, p, y, q)
    bound = math.sqrt(residual_covariance(x, p, x, p) * residual_covariance(y, q, y, q))
    assert joint.covariance() == pytest.approx(min(max(expected, -bound), bound), rel=1e-8)


def test_a_value_left_out_of_one_average_leaves_the_other_its_own():
    rng = np.random.default_rng(0)
    x, y = rng.multivariate_normal([5, 2], [[4, 1.2], [1.2, 1]], 30).T
    x[7] = x[0] = math.nan
    joint = JointAverages(MovingAverage(0.9), MovingAverage(0.9))
    for step in range(30):
        joint.update((x[step], 8.0), (y[step], 8.0))
    alone = MovingAverage(0.9)
    for value in y:
        alone.update(value, 8.0)
    assert joint.averages[1].state_dict() == alone.state_dict()
    both = np.isfinite(x)
    p, q = np.zeros(30), 0.9 ** np.arange(29, -1, -1.0)
    p[both] = 0.9 ** np.arange(both.sum() - 1, -1, -1.0)
    p, q, at = p / p.sum(), q / q.sum(), np.where(both, x, 0)
    raw = (p * q * (at - (p * at).sum()) * (y - (q * y).sum())).sum()
    # But for the correction for the lost degrees of freedom.
    assert joint.covariance() == pytest.approx(raw, rel=0.1)


def test_known_errors_keep_the_correlation_of_the_residuals():
    rng = np.random.default_rng(1)
    plain, known = (JointAverages(MovingAverage(), MovingAverage()) for _ in range(2))
    for x, y in rng.multivariate_normal([5, 2], [[4, 1.2], [1.2, 1]], 100):
        plain.update((x, 16), (y, 16))
        known.update((x, 16, 3.0, 15), (y, 16))
    ratio = known.averages[0].std_error() / plain.averages[0].std_error()
    assert ratio != pytest.approx(1, abs=0.1)
    assert known.covariance() == pytest.approx(plain.covariance() * ratio, rel=1e-9)


@pytest.mark.parametrize("state_after", [1, 25])
def test_state_goes_on_bit_for_bit(state_after):
    rng = np.random.default_rng(2)
    values = rng.normal(3, 1, (50, 2)).tolist()
    whole = JointAverages(MovingAverage(), MovingAverage())
    for step, (x, y) in enumerate(values):
        whole.update((x, 8), (y, 16))
        if step == state_after:
            parts, joint = [average.state_dict() for average in whole.averages], whole.state_dict()
    resumed = JointAverages(MovingAverage(), MovingAverage())
    for average, part in zip(resumed.averages, parts, strict=True):
        average.load_state_dict(part)
    resumed.load_state_dict(joint)
    for x, y in values[state_after + 1 :]:
        resumed.update((x, 8), (y, 16))
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.ratio_interval() == whole.ratio_interval()
    with pytest.raises(ValueError, match="holds 0 pairs of averages"):
        resumed.load_state_dict({"sums": []})


def test_before_two_steps_nothing_is_known():
    joint = JointAverages(MovingAverage(), MovingAverage())
    assert joint.ratio_interval() == (0.0, math.inf)
    joint.update((4.0, 16), (2.0, 16))
    assert joint.ratio_interval() == (0.0, math.inf)
    joint.update((4.2, 16), (1.9, 16))
    low, high = joint.ratio_interval(0.5)
    assert low < 4.1 / 1.95 < high


def test_quantiles_and_the_error_of_a_trace():
    assert student_quantile(0.9, 12.5) == pytest.approx(stats.t.ppf(0.95, 12.5))
    assert student_quantile(0.9, 0.0) == student_quantile(0.9, -1.0) == math.inf
    grads = torch.randn(8, 3, dtype=torch.float64)
    mean = grads.mean(0)
    sq_norms, inner_products = grads.square().sum(1), grads @ mean
    moments = GradientMoments(8, sq_norms, float(mean @ mean), inner_products=inner_products)
    assert trace_error(moments) == (moments.std_error, 7)
    few = GradientMoments(2, torch.ones(2), 1.0, inner_products=torch.ones(2))
    assert math.isnan(trace_error(few)[0])
