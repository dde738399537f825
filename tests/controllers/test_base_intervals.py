"""Intervals of proposals: Fieller's inequality on averages computed here with NumPy for the noise
scale and CABS, the rule at the ends of its inputs for all others."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from adabatch import CABS, GradientMoments
from adabatch.controllers import (
    AdaDamp,
    AdaScale,
    Annealed,
    AtLeast,
    AtMost,
    Average,
    GradientDiversity,
    InnerProductTest,
    Monotone,
    NoiseScale,
    NormTest,
    PadaDamp,
    Scheduled,
    Warmup,
)

SMOOTHING, STEPS = 0.9, 60


class Run:
    """A run of moments of normal gradients, losses and sizes, with what the rules average."""

    def __init__(self, seed=0, inner_products=False, steps=STEPS):
        generator = torch.Generator().manual_seed(seed)
        self.moments, self.losses = [], []
        for step in range(steps):
            m = (8, 32, 16)[step % 3]
            grads = 0.4 + torch.randn(m, 6, generator=generator, dtype=torch.float64)
            mean = grads.mean(0)
            products = grads @ mean if inner_products else None
            self.moments.append(GradientMoments(m, grads.square().sum(1), float(mean @ mean),
                                                inner_products=products))
            self.losses.append(1.5 + float(torch.randn((), generator=generator)) / m**0.5)
        self.sizes = np.array([moments.batch_size for moments in self.moments], float)
        self.traces = np.array([moments.variance_trace for moments in self.moments])
        self.signals = np.array([moments.true_grad_sq_norm for moments in self.moments])

    def feed(self, rule, lr=0.3):
        for moments, loss in zip(self.moments, self.losses, strict=True):
            rule.on_step(samples=moments.batch_size, epoch=0)
            proposal = rule.propose(moments, loss=loss, lr=lr)
        return proposal


def covered_ratios(run, x, y, errors=None):
    """A function of a ratio: whether a 90 % test on the averages of x and y keeps it."""
    p = SMOOTHING ** np.arange(len(x) - 1, -1, -1.0) * run.sizes
    p /= p.sum()
    dx, dy = x - p @ x, y - p @ y
    lost = 1 - 2 * (p**3).sum() / (p**2).sum() + (p**2).sum()
    cov = np.array([[(p**2 * a * b).sum() / lost for a in (dx, dy)] for b in (dx, dy)])
    if errors is not None:
        factor = math.sqrt((p**2 * errors**2).sum() / cov[0, 0])
        cov *= np.array([[factor**2, factor], [factor, 1]])
    shares = p**2 / run.sizes
    quantile = stats.t.ppf(0.95, shares.sum() ** 2 / (shares**2).sum() - 1)
    return lambda ratio: (p @ x - ratio * (p @ y)) ** 2 <= quantile**2 * (
        cov[0, 0] - 2 * ratio * cov[0, 1] + ratio**2 * cov[1, 1]
    )


def is_interval(inside, low, high, scale=1.0):
    """The test keeps what lies just within the interval and rejects what lies just beyond it."""
    return all(inside(end * (1 + shift) / scale) == (shift * side > 0)
               for end, side in ((low, 1), (high, -1)) for shift in (1e-6, -1e-6))


@pytest.mark.parametrize("inner_products", [False, True])
def test_noise_scale(inner_products):
    run, rule = Run(inner_products=inner_products), NoiseScale(scale=0.7, smoothing=SMOOTHING)
    proposal = run.feed(rule)
    low, high = rule.interval(0.9)
    errors = np.array([moments.std_error for moments in run.moments]) if inner_products else None
    assert low < proposal < high
    assert is_interval(covered_ratios(run, run.traces, run.signals, errors), low, high, 0.7)


def test_cabs():
    run, rule = Run(), CABS(scale=2.0, f_star=0.4, eps=0.1, smoothing=SMOOTHING)
    proposal = run.feed(rule, lr=0.3)
    low, high = rule.interval(0.9)
    assert low < proposal < high
    assert is_interval(covered_ratios(run, run.traces, np.array(run.losses) - 0.3), low, high, 0.6)
    assert rule.metrics() == {"f_star": 0.4, "f_star_std_error": 0.0}


def test_cabs_near_its_floor_has_no_upper_end():
    rule = CABS(f_star=1.5, smoothing=SMOOTHING)
    Run().feed(rule)
    low, high = rule.interval()
    assert low > 0
    assert high == math.inf


def test_cabs_counts_the_errors_of_clipping_and_of_an_estimated_floor():
    run = Run()
    plain, clipped = CABS(smoothing=SMOOTHING), CABS(smoothing=SMOOTHING, max_grad_norm=1.0)
    proposals = [run.feed(rule) for rule in (plain, clipped)]
    intervals = [rule.interval() for rule in (plain, clipped)]
    lengths = [(high - low) / proposal
               for (low, high), proposal in zip(intervals, proposals, strict=True)]
    assert lengths[1] > 1.02 * lengths[0]
    auto = CABS(f_star="auto", smoothing=SMOOTHING)
    run.feed(auto)
    assert all(math.isnan(value) for value in CABS(f_star="auto").metrics().values())
    known = CABS(f_star=auto.floor.bounded, smoothing=SMOOTHING)
    run.feed(known)
    assert auto.floor.std_error > 0
    assert auto.interval()[0] < known.interval()[0]
    assert auto.metrics() == {"f_star": auto.floor.bounded,
                              "f_star_std_error": auto.floor.std_error}


def ends(values, weights, level=0.9, smoothing=SMOOTHING):
    """average ∓ t·SE of a decayed average, from the residuals."""
    p = smoothing ** np.arange(len(values) - 1, -1, -1.0) * weights
    p /= p.sum()
    lost = 1 - 2 * (p**3).sum() / (p**2).sum() + (p**2).sum()
    error = math.sqrt((p**2 * (values - p @ values) ** 2).sum() / lost)
    shares = p**2 / weights
    quantile = stats.t.ppf((1 + level) / 2, shares.sum() ** 2 / (shares**2).sum() - 1)
    return p @ values - quantile * error, p @ values + quantile * error


def test_norm_test_at_the_ends_of_its_averages():
    run, rule = Run(), NormTest(theta=0.5, smoothing=SMOOTHING)
    proposal = run.feed(rule)
    traces, signals = ends(run.traces, run.sizes), ends(run.signals, run.sizes)
    assert rule.interval(0.9) == pytest.approx((4 * traces[0] / signals[1],
                                                4 * traces[1] / signals[0]))
    assert rule.interval(0.9)[0] < proposal < rule.interval(0.9)[1]


def test_inner_product_test_is_the_larger_of_its_two_tests():
    run = Run(inner_products=True)
    rule = InnerProductTest(theta=0.5, nu=0.3, smoothing=SMOOTHING)
    proposal = run.feed(rule)
    squares = np.array([moments.grad_sq_norm for moments in run.moments])
    variances = np.array([moments.inner_product_variance for moments in run.moments])
    along, signals = ends(variances, run.sizes), ends(run.signals, run.sizes)
    across = ends(run.traces - variances / squares, run.sizes)
    pairs = ((0, 1), (1, 0))
    expected = [
        max(4 * along[i] / signals[j] ** 2, across[i] / signals[j] / 0.09) for i, j in pairs
    ]
    assert rule.interval(0.9) == pytest.approx(expected)
    assert expected[0] < proposal < expected[1]


@pytest.mark.parametrize("rule", [NormTest(signal="raw"), PadaDamp(16, 1.0), AdaScale(64, 16),
                                  Scheduled("0:16 1K:32"), AtMost(PadaDamp(16, 1.0), 64)])
def test_rules_without_an_error_have_no_interval(rule):
    Run().feed(rule)
    assert all(math.isnan(end) for end in rule.interval())


@pytest.mark.parametrize("make", [CABS, NoiseScale, NormTest])
def test_after_one_step_nothing_is_known(make):
    rule = make()
    Run(steps=1).feed(rule)
    assert rule.interval() == (0.0, math.inf)


def test_diversity_has_the_interval_of_its_last_epoch():
    rule, run = GradientDiversity(delta=0.5, epoch_samples=20 * 56), Run(steps=75)
    proposal = run.feed(rule)
    used = run.moments[:60]  # 20 times 8 + 32 + 16 samples
    names = ("mean_sq_norm", "true_grad_sq_norm", "batch_size")
    x, y, sizes = (np.array([getattr(moments, name) for moments in used], float) for name in names)
    assert proposal == pytest.approx(0.5 * (sizes @ x) / (sizes @ y))
    norms, signals = ends(x, sizes, smoothing=1.0), ends(y, sizes, smoothing=1.0)
    expected = (0.5 * norms[0] / signals[1], 0.5 * norms[1] / signals[0])
    assert rule.interval(0.9) == pytest.approx(expected, rel=1e-5)


def test_adadamp_by_the_error_of_its_loss():
    rule, run = AdaDamp(16, f_star=0.5, initial_loss=3.0, smoothing=SMOOTHING), Run()
    run.feed(rule)
    low, high = rule.average.interval(0.9)
    assert rule.interval(0.9) == pytest.approx((16 * 2.5 / (high - 0.5), 16 * 2.5 / (low - 0.5)))


def test_annealed_has_the_interval_of_its_cap_up_to_its_size():
    cap, run = NoiseScale(smoothing=SMOOTHING), Run()
    rule = Annealed(1200, 4, cap=NoiseScale(smoothing=SMOOTHING), rule="linear")
    run.feed(cap)
    proposal = run.feed(rule)
    low, high = cap.interval()
    grown = 4 / rule.step_per_sample
    assert rule.interval() == (min(grown, max(low, 4.0)), min(grown, high))
    assert rule.interval()[0] <= proposal <= rule.interval()[1]
    assert all(math.isnan(end) for end in Annealed(100, 4, cap=8, rule="linear").interval())


def test_combinators_combine_the_ends():
    def interval_of(build):
        rule = build(NoiseScale(smoothing=SMOOTHING))
        Run().feed(rule)
        return rule.interval()

    low, high = interval_of(lambda rule: AtLeast(rule))
    middle = (low + high) / 2
    assert interval_of(lambda rule: AtLeast(rule, middle)) == (middle, high)
    assert interval_of(lambda rule: AtMost(rule, middle)) == (low, middle)
    assert interval_of(lambda rule: Average(rule, 10.0, weights=(1, 3))) == pytest.approx(
        ((low + 30) / 4, (high + 30) / 4)
    )
    assert interval_of(lambda rule: Monotone(AtMost(rule, 1000.0)))[0] >= low
    fast = interval_of(lambda rule: Warmup(rule, growth=1e6, samples=1))
    slow = interval_of(lambda rule: Warmup(AtLeast(rule, 1e9), growth=1.1, samples=1000))
    assert fast == (low, high)
    assert slow[0] == slow[1] < 1e9


def test_a_saved_rule_has_the_interval_it_had():
    run = Run()
    for make in (lambda: CABS(smoothing=SMOOTHING), lambda: NoiseScale(smoothing=SMOOTHING),
                 lambda: InnerProductTest(smoothing=SMOOTHING)):
        unbroken, resumed = make(), make()
        measured = Run(inner_products=True)
        for moments, loss in zip(measured.moments[:30], run.losses, strict=False):
            unbroken.propose(moments, loss=loss, lr=0.3)
        resumed.load_state_dict(unbroken.state_dict())
        for rule in (unbroken, resumed):
            for moments, loss in zip(measured.moments[30:], run.losses[30:], strict=True):
                rule.propose(moments, loss=loss, lr=0.3)
        assert resumed.interval() == unbroken.interval()
