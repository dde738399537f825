"""The rules against float64 NumPy on full per-sample gradients: one backward pass a sample, sums
written out."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.controllers import AdaScale, GradientDiversity, InnerProductTest, NoiseScale, NormTest
from adabatch.controllers.adascale import gain
from tests import oracle

MODELS = {
    "linear": lambda: nn.Linear(3, 2),
    "two layers": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "normalized": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(),
                                        nn.Linear(4, 2, bias=False)),
}


def loss_fn(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(1) / 2


class Run:
    """A few steps of SGD on a random model: for each step its moments as measured, and its full
    gradients [N, P] from the oracle."""

    def __init__(self, make, seed, needs, sizes=(7, 12, 3, 20)):
        torch.manual_seed(seed)
        model = make()
        self.moments, self.grads = [], []
        for size in sizes:
            batch = (torch.randn(size, 3), torch.randn(size, 2) + 1)
            rows = oracle.per_sample_grads(model, loss_fn, batch)
            self.grads.append(torch.cat([rows[name].flatten(1) for name in sorted(rows)],
                                        1).numpy())
            hooks = GradSampleHooks(model,
                                    statistics=[each for each in needs if each == "inner_products"])
            loss_fn(model, batch).mean().backward()
            self.moments.append(hooks.collect())
            hooks.remove()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None

    def proposals(self, controller):
        given = []
        for moments in self.moments:
            controller.on_step(samples=moments.batch_size, epoch=0)
            given.append(controller.propose(moments, loss=1.0, lr=0.1))
        return given


def trace_of(grads):
    return grads.var(0, ddof=1).sum()


def signal_of(grads):
    return (grads.mean(0) ** 2).sum() - trace_of(grads) / len(grads)


def weighted(values, sizes, mu):
    decays = np.array(sizes, float) * mu ** np.arange(len(sizes) - 1, -1, -1.0)
    return float(np.average(values, weights=decays))


def smoothed(statistic, run, mu):
    """The averages of a statistic after each step."""
    values, sizes = [statistic(grads) for grads in run.grads], [len(grads) for grads in run.grads]
    return [weighted(values[: n + 1], sizes[: n + 1], mu) for n in range(len(sizes))]


def clamped(numerator, denominator):
    return 0.0 if numerator <= 0 else numerator / denominator if denominator > 0 else math.inf


def along(grads):
    """Var_i⟨g_i, g⟩, divisor m − 1."""
    return (grads @ grads.mean(0)).var(ddof=1)


def across(grads):
    """The trace of the covariance of the parts of g_i orthogonal to g, divisor m − 1."""
    direction = grads.mean(0) / np.linalg.norm(grads.mean(0))
    rest = grads - np.outer(grads @ direction, direction)
    return (rest**2).sum() / (len(grads) - 1)


every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
seeds = pytest.mark.parametrize("seed", range(4))


@every_model
@seeds
def test_norm_test(make, seed):
    run = Run(make, seed, ())
    raw = [trace_of(grads) / (0.7**2 * (grads.mean(0) ** 2).sum()) for grads in run.grads]
    assert run.proposals(NormTest(theta=0.7, signal="raw")) == pytest.approx(raw, rel=1e-4)
    expected = [clamped(t, 0.7**2 * s) for t, s in zip(smoothed(trace_of, run, 0.8),
                                                       smoothed(signal_of, run, 0.8), strict=True)]
    assert run.proposals(NormTest(theta=0.7, smoothing=0.8)) == pytest.approx(expected, rel=1e-3)


@every_model
@seeds
def test_noise_scale(make, seed):
    run = Run(make, seed, ())
    expected = [clamped(0.4 * t, s) for t, s in zip(smoothed(trace_of, run, 0.9),
                                                    smoothed(signal_of, run, 0.9), strict=True)]
    assert run.proposals(NoiseScale(scale=0.4, smoothing=0.9)) == pytest.approx(expected, rel=1e-3)


@every_model
@seeds
def test_inner_product_and_orthogonality_tests(make, seed):
    run = Run(make, seed, {"inner_products"})
    squares = [(grads.mean(0) ** 2).sum() for grads in run.grads]
    inner = [along(grads) / (0.6**2 * square**2)
             for grads, square in zip(run.grads, squares, strict=True)]
    orthogonal = [across(grads) / (0.8**2 * square)
                  for grads, square in zip(run.grads, squares, strict=True)]
    assert run.proposals(InnerProductTest(theta=0.6, signal="raw")) == pytest.approx(
        inner, rel=1e-3
    )
    both = list(map(max, inner, orthogonal))
    assert run.proposals(InnerProductTest(theta=0.6, nu=0.8, signal="raw")) == pytest.approx(
        both, rel=1e-3
    )
    averages = zip(smoothed(along, run, 0.8), smoothed(across, run, 0.8),
                   smoothed(signal_of, run, 0.8), strict=True)
    expected = [max(clamped(v, 0.6**2 * s**2 if s > 0 else 0), clamped(t, 0.8**2 * s))
                for v, t, s in averages]
    assert run.proposals(InnerProductTest(theta=0.6, nu=0.8, smoothing=0.8)) == pytest.approx(
        expected, rel=2e-3
    )


@every_model
@seeds
def test_gradient_diversity_is_of_whole_epochs(make, seed):
    run = Run(make, seed, (), sizes=(8, 8, 12, 4, 16))
    proposals = run.proposals(GradientDiversity(delta=0.3, epoch_samples=16))

    def decided(steps):
        sizes = np.array([len(run.grads[step]) for step in steps])
        squares = np.array([(run.grads[step] ** 2).sum(1).mean() for step in steps])
        return clamped(0.3 * (sizes * squares).sum(),
                       (sizes * np.array([signal_of(run.grads[step]) for step in steps])).sum())

    expected = [8.0, decided([0, 1]), decided([0, 1]), decided([2, 3]), decided([4])]
    assert proposals == pytest.approx(expected, rel=1e-3)


@every_model
@seeds
def test_adascale(make, seed):
    run = Run(make, seed, ())
    rule, clock = AdaScale(64, base_batch_size=16, smoothing=0.9), 0.0
    for moments, trace, signal in zip(run.moments, smoothed(trace_of, run, 0.9),
                                      smoothed(signal_of, run, 0.9), strict=True):
        clock += rule.lr_factor()(64)
        rule.on_step(samples=64, epoch=0)
        assert rule.base_steps == pytest.approx(clock)
        assert rule.propose(moments, loss=1.0, lr=0.1) == 64.0
        expected = (trace / 16 + max(0, signal)) / (trace / 64 + max(0, signal))
        assert rule.lr_factor()(64) == pytest.approx(expected, rel=1e-3)
        assert 1 <= expected <= 4


def test_adascale_counts_single_steps_before_the_first_measurement():
    rule = AdaScale(64, base_batch_size=16)
    assert rule.lr_factor()(64) == 1.0


@pytest.mark.parametrize(
    ("size", "base", "noise_scale"),
    [(64, 16, 100.0), (16, 16, 3.0), (1000, 10, 0.0), (64, 16, 0.5)]
)
def test_the_gain_is_the_ratio_of_expected_squared_norms(size, base, noise_scale):
    trace, square = noise_scale, 1.0
    expected = (trace / base + square) / (trace / size + square)
    assert gain(size, base, noise_scale) == pytest.approx(expected)
    assert gain(size, base, math.inf) == pytest.approx(size / base)


def test_missing_inner_products_are_an_error():
    run = Run(MODELS["linear"], 0, ())
    with pytest.raises(ValueError, match="inner_products"):
        InnerProductTest().propose(run.moments[0], loss=1.0, lr=0.1)
