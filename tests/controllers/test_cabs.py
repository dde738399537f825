"""CABS against the published rule, written independently in NumPy: float32 as the authors' code,
float64 for ours."""

import math
import warnings

import numpy as np
import pytest
import torch

from adabatch import CABS, GradientMoments
from adabatch.scheduler.decision import SizeRule

REFERENCE_BOUNDS = SizeRule(16, 2048)


def moments_of(sq_norms, grad_sq_norm, batch_size=None):
    """Moments with these per-sample squared norms, all of them measured unless the batch is said to
    be larger."""
    norms = torch.as_tensor(np.asarray(sq_norms), dtype=torch.float64)
    return GradientMoments(batch_size=len(norms) if batch_size is None else batch_size,
                           sq_norms=norms, grad_sq_norm=float(grad_sq_norm))


def random_run(seed, steps=120):
    """A plausible training run: per-sample norms, ‖g‖², losses and rates, drawn so that proposals
    fall below, between and above the bounds."""
    rng = np.random.default_rng(seed)
    level = np.exp(rng.normal(4, 3))
    for step in range(steps):
        m = int(rng.integers(2, 300))
        sq_norms = rng.gamma(1.5, level, m)
        loss = float(3 * math.exp(-step / 40) * rng.uniform(0.5, 1.5))
        yield sq_norms, float(sq_norms.mean()
                              * rng.uniform(0, 0.9)), loss, float(10 ** rng.uniform(-2, 0))


class TensorFlowRule:
    """The published code in float32, one operation at a time: averages start at 0 and 1, divisor m,
    rounded half to even, then clipped."""

    def __init__(self, mu=0.95, eps=0.0, c=1.0):
        self.mu, self.eps, self.c = np.float32(mu), np.float32(eps), np.float32(c)
        self.xi_avg, self.loss_avg = np.float32(0.0), np.float32(1.0)

    def __call__(self, sq_norms, grad_sq_norm, loss, lr):
        one = np.float32(1.0)
        xi = np.float32(np.mean(sq_norms) - grad_sq_norm)
        self.loss_avg = self.mu * self.loss_avg + (one - self.mu) * np.float32(loss)
        self.xi_avg = self.mu * self.xi_avg + (one - self.mu) * xi
        return self.c * np.float32(lr) * self.xi_avg / (self.loss_avg + self.eps)


@pytest.mark.parametrize("options",
                         [{}, {"scale": 0.25}, {"smoothing": 0.5, "eps": 0.1}, {"smoothing": 0.0}])
@pytest.mark.parametrize("seed", range(12))
def test_reference_is_the_published_code_up_to_float32_rounding(seed, options):
    ours = CABS.reference(**options)
    theirs = TensorFlowRule(options.get("smoothing", 0.95), options.get("eps", 0.0),
                            options.get("scale", 1.0))
    for sq_norms, grad_sq_norm, loss, lr in random_run(seed):
        proposal = ours.propose(moments_of(sq_norms, grad_sq_norm), loss=loss, lr=lr)
        expected = theirs(sq_norms, grad_sq_norm, loss, lr)
        # Fifty roundings of float32 bound the error of the averages: each new value enters with
        # weight 1 - mu.
        assert abs(proposal - expected) <= 50 * np.finfo(np.float32).eps * abs(expected)
        size = int(np.clip(np.rint(expected), 16, 2048))
        from_a_tie = abs(abs(proposal - math.floor(proposal)) - 0.5)
        near_a_tie = from_a_tie <= 50 * np.finfo(np.float32).eps * abs(proposal)
        assert REFERENCE_BOUNDS.size_for(proposal) == size or near_a_tie


def test_the_runs_reach_below_between_and_above_the_bounds():
    sizes = []
    for seed in range(12):
        rule = TensorFlowRule()
        sizes += [int(np.clip(np.rint(rule(*step)), 16, 2048)) for step in random_run(seed)]
    assert {16, 2048} < set(sizes)
    assert len(set(sizes)) > 100


@pytest.mark.parametrize(("proposal", "size"), [(16.5, 16), (17.5, 18), (18.5, 18), (15.9, 16),
                                                (2048.5, 2048), (2047.5, 2048), (1e30, 2048),
                                                (-3.0, 16)])
def test_rounds_half_to_even_then_clips(proposal, size):
    theirs = int(np.clip(np.rint(np.float32(proposal)), 16, 2048))
    assert REFERENCE_BOUNDS.size_for(proposal) == size == theirs


def test_reference_starts_low():
    rule = CABS.reference()
    moments = moments_of([4.0, 4.0], 0.0)
    assert rule.propose(moments, loss=1.0, lr=10.0) == pytest.approx(0.05 * 4 * 10)
    assert CABS().propose(moments, loss=1.0, lr=10.0) == pytest.approx(2 * 4 * 10)


@pytest.mark.parametrize(("trace", "proposal"),
                         [(1.0, math.inf), (0.0, math.nan), (-1.0, -math.inf)])
def test_reference_divides_by_zero_as_floats_do(trace, proposal):
    rule = CABS.reference(smoothing=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.float32(trace) / np.float32(0.0)
    ours = rule.propose(moments_of([trace, trace], 0.0), loss=0.0, lr=1.0)
    assert ours == pytest.approx(expected, nan_ok=True) == pytest.approx(proposal, nan_ok=True)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "f_star": 0.4, "smoothing": 0.8,
                                          "eps": 0.05}, {"smoothing": 0.0}])
@pytest.mark.parametrize("seed", range(4))
def test_cabs_is_the_ratio_of_bias_corrected_sample_weighted_averages(seed, options):
    rule = CABS(**options)
    mu, scale = options.get("smoothing", 0.95), options.get("scale", 1.0)
    traces, losses, weights = [], [], []
    for sq_norms, grad_sq_norm, loss, lr in random_run(seed, steps=60):
        m = len(sq_norms)
        traces.append((sq_norms.mean() - grad_sq_norm) * m / (m - 1))
        losses.append(loss)
        weights.append(m)
        decay = np.array(weights) * mu ** np.arange(len(weights) - 1, -1, -1, dtype=float)
        average = np.average(losses, weights=decay)
        gap = average - options.get("f_star", 0.0) + options.get("eps", 0.0)
        expected = scale * lr * np.average(traces, weights=decay) / gap if gap > 0 else math.inf
        assert rule.propose(moments_of(sq_norms, grad_sq_norm), loss=loss, lr=lr) == pytest.approx(
            expected, rel=1e-9
        )


def test_the_trace_is_weighted_by_measured_samples_the_loss_by_all():
    rule = CABS(smoothing=0.5)
    rule.propose(moments_of([8.0] * 4, 0.0, batch_size=100), loss=1.0, lr=1.0)
    proposal = rule.propose(moments_of([2.0] * 2, 0.0, batch_size=10), loss=3.0, lr=1.0)
    trace = (0.5 * 4 * 8 * 100 / 99 + 2 * 2 * 10 / 9) / (0.5 * 4 + 2)
    loss = (0.5 * 100 * 1 + 10 * 3) / (0.5 * 100 + 10)
    assert proposal == pytest.approx(trace / loss, rel=1e-12)


def test_the_lr_enters_unsmoothed():
    rule = CABS()
    first = rule.propose(moments_of([4.0, 4.0], 1.0), loss=1.0, lr=0.1)
    assert rule.propose(moments_of([4.0, 4.0], 1.0), loss=1.0, lr=0.3) == pytest.approx(3 * first)


@pytest.mark.parametrize("f_star", [1.0, 1.5])
def test_a_loss_at_or_below_its_floor_proposes_infinity(f_star):
    assert CABS(f_star=f_star).propose(moments_of([4.0, 4.0], 1.0), loss=1.0, lr=0.1) == math.inf
    assert CABS(f_star=f_star).propose(moments_of([1.0, 1.0], 1.0), loss=1.0, lr=0.1) == 0.0


def test_a_negative_trace_proposes_zero_but_counts_in_the_average():
    rule = CABS(smoothing=0.5)
    assert rule.propose(moments_of([1.0, 1.0], 5.0), loss=1.0, lr=1.0) == 0.0
    traces, weights = (2 * (1 - 5), 2 * (21 - 5)), (0.5, 1)
    assert rule.propose(moments_of([21.0, 21.0], 5.0), loss=1.0, lr=1.0) == pytest.approx(
        np.average(traces, weights=weights)
    )


def test_eps_keeps_a_vanishing_loss_finite():
    moments = moments_of([1.0, 1.0], 0.0)
    assert CABS(eps=0.5).propose(moments, loss=0.0, lr=1.0) == pytest.approx(2 / 0.5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (CABS, {"scale": 0.0}, "scale must be a positive number, got 0.0"),
        (CABS, {"scale": math.nan}, "scale must be"),
        (CABS, {"f_star": math.inf}, "f_star must be a finite number or 'auto', got inf"),
        (CABS, {"eps": -1e-3}, "eps must be a number >= 0, got -0.001"),
        (CABS, {"smoothing": 1.0}, "smoothing must be a number from 0 to below 1.*got 1.0"),
        (CABS.reference, {"scale": -1.0}, "scale must be a positive number, got -1.0"),
        (CABS.reference, {"smoothing": 1.5}, "smoothing must be .* got 1.5"),
        (CABS.reference, {"eps": math.nan}, "eps must be a number >= 0, got nan"),
    ],
)
def test_arguments_out_of_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("losses", [[-0.5], [2.0, -0.1], [0.5, 0.3, -3.0]])
@pytest.mark.parametrize("f_star", [0.0, "auto"])
def test_a_negative_loss_is_named_once_and_a_floor_is_the_cure(losses, f_star):
    controller = CABS(f_star=f_star)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss in [*losses, -1.0]:
            controller.propose(moments_of([4.0, 4.0], 1.0), loss=loss, lr=0.1)
    assert len(caught) == 1
    assert "CABS(f_star=" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cured = CABS(f_star=-4.0)
        for loss in losses:
            proposal = cured.propose(moments_of([4.0, 4.0], 1.0), loss=loss, lr=0.1)
            assert 0 < proposal < math.inf


def test_a_loss_of_zero_is_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CABS().propose(moments_of([4.0, 4.0], 1.0), loss=0.0, lr=0.1)
