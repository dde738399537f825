"""GradientMoments against the definition of a covariance, and against a distribution whose
covariance is known in closed form."""

import math

import pytest
import torch
from torch import nn

from adabatch import GradientMoments, GradSampleHooks
from adabatch.estimators.averages import MovingAverage


def moments_of(grads, rows=None, **options):
    """GradientMoments of per-sample gradients [m, P]."""
    sq_norms = grads.square().sum(1)
    grad_sq_norm = float(grads.mean(0).square().sum())
    return GradientMoments(
        batch_size=len(grads),
        sq_norms=sq_norms if rows is None else sq_norms[rows],
        grad_sq_norm=grad_sq_norm,
        indices=rows,
        **options,
    )


def test_all_samples_measured():
    grads = torch.randn(9, 5, dtype=torch.float64) + 1
    moments, m = moments_of(grads), 9
    trace = float(grads.var(0, correction=1).sum())
    assert moments.n_measured == 9
    assert moments.variance_trace == pytest.approx(trace, rel=1e-12)
    assert moments.biased_variance_trace == pytest.approx(
        float(grads.var(0, correction=0).sum()), rel=1e-12
    )
    true = float(grads.mean(0).square().sum()) - trace / m
    assert moments.true_grad_sq_norm == pytest.approx(true, rel=1e-12)
    assert moments.noise_scale == pytest.approx(trace / true, rel=1e-12)
    assert moments.snr == pytest.approx(m * true / trace, rel=1e-12)


@pytest.mark.parametrize("s", [1, 3, 5])
def test_subsets_average_to_the_trace_of_the_whole_batch(s):
    """Exactly, not only in expectation over data: T̂ is linear in the measured norms."""
    grads = torch.randn(5, 4, dtype=torch.float64)
    subsets = torch.combinations(torch.arange(5), s)
    traces = [moments_of(grads, rows).variance_trace for rows in subsets]
    assert sum(traces) / len(traces) == pytest.approx(
        float(grads.var(0, correction=1).sum()), rel=1e-12
    )


def test_a_gradient_of_unequal_weights():
    moments = GradientMoments(
        batch_size=10, sq_norms=torch.full((10,), 3.0), grad_sq_norm=1.0, effective_batch_size=5.0
    )
    assert moments.variance_trace == pytest.approx(2 / (1 - 1 / 5))
    assert moments.true_grad_sq_norm == pytest.approx(1 - 2.5 / 5)
    assert moments.snr == pytest.approx(5 * 0.5 / 2.5)


@pytest.mark.parametrize("size", [0, 1])
def test_fewer_than_two_samples_have_no_variance(size):
    moments = GradientMoments(batch_size=size, sq_norms=torch.ones(size), grad_sq_norm=1.0)
    for name in ("variance_trace", "true_grad_sq_norm", "noise_scale", "snr"):
        with pytest.raises(ValueError, match=f"at least 2 samples, got a batch of {size}"):
            getattr(moments, name)


def test_nothing_measured():
    moments = GradientMoments(batch_size=4, sq_norms=torch.ones(0), grad_sq_norm=1.0)
    with pytest.raises(ValueError, match="no sample was measured"):
        moments.variance_trace  # noqa: B018


@pytest.mark.parametrize(
    ("sq_norms", "grad_sq_norm", "noise_scale", "snr"),
    [
        ([1.0, 1.0], 1.0, 0.0, math.inf),
        ([0.0, 0.0], 0.0, math.nan, math.nan),
        ([1.0, 3.0], 1.0, math.inf, 0.0),
        ([1.0, 1.0], 0.0, -2.0, -1.0),
    ],
)
def test_ratios_at_their_limits(sq_norms, grad_sq_norm, noise_scale, snr):
    moments = GradientMoments(
        batch_size=2, sq_norms=torch.tensor(sq_norms), grad_sq_norm=grad_sq_norm
    )
    assert moments.noise_scale == pytest.approx(noise_scale, nan_ok=True)
    assert moments.snr == pytest.approx(snr, nan_ok=True)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_is_finite(bad):
    good = torch.ones(3)
    assert GradientMoments(batch_size=3, sq_norms=good, grad_sq_norm=1.0).is_finite
    assert not GradientMoments(batch_size=3, sq_norms=good, grad_sq_norm=bad).is_finite
    assert not GradientMoments(
        batch_size=3, sq_norms=torch.tensor([1.0, bad, 1.0]), grad_sq_norm=1.0
    ).is_finite


def test_sums_of_float32_norms_are_kept_in_float64():
    sq_norms = torch.cat((torch.tensor([2.0**24]), torch.ones(2**20)))
    assert GradientMoments(
        batch_size=len(sq_norms), sq_norms=sq_norms, grad_sq_norm=0.0
    ).mean_sq_norm == (2**24 + 2**20) / len(sq_norms)


class Regression:
    """Linear regression y = ⟨w*, x⟩ + σ ε with x and ε standard normal, at w = w* + δ: the gradient
    of (⟨w, x⟩ − y)² is g = 2 (⟨δ, x⟩ − σ ε) x.

    E g = 2δ, so G² = 4‖δ‖².   E‖g‖² = 4 (σ² E‖x‖² + E[⟨δ, x⟩² ‖x‖²]) = 4 (σ² d + ‖δ‖² (d + 2)), so
    T = tr Cov g = 4 (σ² d + ‖δ‖² (d + 1)).
    """

    def __init__(self, dimensions=3, noise=0.7, distance=0.5):
        self.generator = torch.Generator().manual_seed(1)
        self.d, self.noise = dimensions, noise
        self.delta = torch.full((dimensions,), distance)
        self.grad_sq_norm = 4 * dimensions * distance**2
        self.trace = 4 * (noise**2 * dimensions + dimensions * distance**2 * (dimensions + 1))

    def draw(self, *shape):
        """Inputs [*shape, d], targets [*shape] for w* = 0."""
        return torch.randn(*shape, self.d, generator=self.generator), self.noise * torch.randn(
            *shape, generator=self.generator
        )

    def grads(self, *shape):
        inputs, targets = self.draw(*shape)
        return 2 * (inputs @ self.delta - targets).unsqueeze(-1) * inputs

    def model(self):
        layer = nn.Linear(self.d, 1, bias=False)
        layer.weight.data.copy_(self.delta)
        return layer


def within_three_standard_errors(values, truth):
    values = torch.tensor(values, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    assert error < 0.2 * truth
    assert abs(float(values.mean()) - truth) < 3 * error


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("sizes", "samples"),
    [((8,), None), ((8,), 3), ((2,), None), ((2, 6), None), ((2, 9), 2)],
    ids=str,
)
def test_unbiased_through_the_hooks(sizes, samples, loss_reduction):
    """Whole batches, measured in part or whole, and two accumulated passes of unequal size."""
    regression = Regression()
    model, k = regression.model(), len(sizes)
    hooks = GradSampleHooks(model, samples=samples, accumulate=k, loss_reduction=loss_reduction)
    traces, true = [], []
    for _ in range(600 if sum(sizes) > 2 else 1500):
        model.zero_grad()
        for size in sizes:
            inputs, targets = regression.draw(size)
            loss = nn.functional.mse_loss(
                model(inputs).squeeze(1), targets, reduction=loss_reduction
            )
            (loss / k if loss_reduction == "mean" else loss).backward()
        moments = hooks.collect()
        traces.append(moments.variance_trace)
        true.append(moments.true_grad_sq_norm)
    within_three_standard_errors(traces, regression.trace)
    within_three_standard_errors(true, regression.grad_sq_norm)


@pytest.mark.parametrize(
    ("sizes", "samples"), [((16,), None), ((16,), 6), ((64, 16, 8, 32), None)], ids=str
)
def test_intervals_of_the_smoothed_trace_cover_the_truth(sizes, samples):
    """90 % intervals from step-to-step residuals, 1,000 runs of 100 steps."""
    regression, covered, runs = Regression(), 0, 1000
    steps = [sizes[step % len(sizes)] for step in range(100)]
    grads = regression.grads(runs, sum(steps))
    for run in grads:
        average = MovingAverage(0.95)
        for batch in run.split(steps):
            rows = None if samples is None else torch.arange(samples)
            moments = moments_of(batch, rows)
            average.update(moments.variance_trace, moments.n_measured)
        low, high = average.interval(0.9)
        covered += low <= regression.trace <= high
    assert 0.85 <= covered / runs <= 0.95
