"""The trace from inner_products, its standard error and interval: against definitions, and against
linear regression, whose gradient covariance is known."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from adabatch import GradientMoments, GradSampleHooks
from adabatch.estimators.moments import BackwardPass, pool_passes
from tests import oracle
from tests.estimators.test_moments import Regression, within_three_standard_errors


def moments_of(grads, rows=None):
    """GradientMoments with inner_products, of per-sample gradients [m, P]."""
    mean = grads.mean(0)
    picked = grads if rows is None else grads[rows]
    return GradientMoments(
        len(grads),
        sq_norms=picked.square().sum(1),
        grad_sq_norm=float(mean @ mean),
        inner_products=picked @ mean,
        indices=rows,
    )


def test_definitions():
    grads, m, s = torch.randn(9, 5, dtype=torch.float64) + 1, 9, 4
    rows = torch.tensor([1, 4, 5, 8])
    moments, whole = moments_of(grads, rows), moments_of(grads)
    centred = (grads - grads.mean(0)).square().sum(1)
    torch.testing.assert_close(moments.centred_sq_norms, centred[rows])
    assert moments.variance_trace == pytest.approx(
        m / (m - 1) * float(centred[rows].mean()), rel=1e-12
    )
    assert moments.biased_variance_trace == pytest.approx(float(centred[rows].mean()), rel=1e-12)
    shared = ((m - 1) ** 2 + s - 1) / (m * (m - 2))
    assert moments.std_error == pytest.approx(
        m / (m - 1) * float(centred[rows].std()) * math.sqrt(shared / s), rel=1e-12
    )
    assert moments.true_grad_sq_norm == pytest.approx(
        moments.grad_sq_norm - moments.variance_trace / m, rel=1e-12
    )
    assert whole.variance_trace == pytest.approx(float(grads.var(0, correction=1).sum()), rel=1e-12)
    low, high = whole.interval(0.9)
    for end in (
        low,
        high,
    ):  # at either end T̂ lies t errors away, the error of that end being in proportion to it
        error = whole.std_error * end / whole.variance_trace
        assert abs(whole.variance_trace - end) == pytest.approx(
            stats.t.ppf(0.95, 8) * error, rel=1e-9
        )
    assert 0 < low < whole.interval(0.5)[0] < whole.variance_trace < high


@pytest.mark.parametrize(("m", "s"), [(3, 3), (8, 8), (64, 4), (64, 64)])
def test_the_squared_error_of_normal_gradients_is_unbiased(m, s):
    """T̂ of m normal gradients of one dimension has the variance 2σ⁴/(m − 1) where all are
    measured; else it is that of many draws."""
    generator = torch.Generator().manual_seed(m + s)
    batches = torch.randn(4000, m, 1, generator=generator, dtype=torch.float64)
    made = [moments_of(batch, torch.arange(s)) for batch in batches]
    squares = torch.tensor([moments.std_error**2 for moments in made])
    spread = float(torch.tensor([moments.variance_trace for moments in made]).var())
    assert float(squares.mean()) == pytest.approx(2 / (m - 1) if s == m else spread, rel=0.12)


def test_an_interval_reaches_from_nothing_to_infinity():
    equal = GradientMoments(
        4, sq_norms=torch.ones(4), grad_sq_norm=1.0, inner_products=torch.ones(4)
    )
    assert equal.interval() == (0.0, 0.0)
    wild = moments_of(torch.tensor([[0.0], [0.1], [9.0]], dtype=torch.float64))
    low, high = wild.interval(0.99)
    assert 0 < low < wild.variance_trace
    assert high == math.inf


def test_subsets_average_to_the_trace_of_the_whole_batch():
    grads = torch.randn(5, 4, dtype=torch.float64)
    traces = [
        moments_of(grads, rows).variance_trace for rows in torch.combinations(torch.arange(5), 2)
    ]
    assert sum(traces) / len(traces) == pytest.approx(
        float(grads.var(0, correction=1).sum()), rel=1e-12
    )


def test_never_negative():
    """Equal gradients: rounding alone would make d_i of either sign."""
    grads = torch.full((6, 3), 1 / 3, dtype=torch.float32) * torch.tensor([1.0, 3.0, 7.0])
    mean = grads.mean(0)
    moments = GradientMoments(
        6,
        sq_norms=grads.square().sum(1) * (1 - 1e-7),
        grad_sq_norm=float(mean @ mean),
        inner_products=grads @ mean,
    )
    assert 0 <= moments.variance_trace < 1e-5
    assert bool((moments.centred_sq_norms >= 0).all())


@pytest.mark.parametrize("level", [0, 1, -0.1, 90, float("nan")])
def test_levels_are_checked(level):
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        moments_of(torch.randn(4, 2)).interval(level)


def test_too_few_samples_or_no_inner_products_raise():
    one = moments_of(torch.randn(4, 2), rows=torch.tensor([2]))
    assert one.variance_trace >= 0
    with pytest.raises(ValueError, match="at least 2 measured samples, got 1"):
        one.interval()
    with pytest.raises(ValueError, match="at least 2 samples, got a batch of 1"):
        moments_of(torch.randn(1, 2)).std_error  # noqa: B018
    with pytest.raises(ValueError, match="at least 3 samples, got 2"):
        moments_of(torch.randn(2, 2)).interval()
    plain = GradientMoments(4, sq_norms=torch.ones(4), grad_sq_norm=0.5)
    for read in (lambda: plain.std_error, plain.interval, lambda: plain.centred_sq_norms):
        with pytest.raises(
            ValueError,
            match=r"spread of the norms alone is not the error"
                  r".*PerSample\(inner_products=True"
                  r".*variance_trace_std_error",
        ):
            read()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_is_finite_reads_inner_products(bad):
    moments = GradientMoments(
        2, sq_norms=torch.ones(2), grad_sq_norm=1.0, inner_products=torch.tensor([1.0, bad])
    )
    assert not moments.is_finite


@pytest.mark.parametrize(("m", "samples"), [(64, None), (256, None), (512, 256)])
def test_intervals_cover_the_truth(m, samples):
    """90 % intervals of 500 independent batches, through the hooks. Below s = 64 these fourth
    powers of normal numbers are too skewed: .82 at s = 8."""
    regression = Regression(dimensions=8, distance=0.2)
    model = regression.model()
    hooks = GradSampleHooks(model, samples=samples, statistics=["inner_products"])
    covered, traces = 0, []
    for _ in range(500):
        model.zero_grad()
        inputs, targets = regression.draw(m)
        nn.functional.mse_loss(model(inputs).squeeze(1), targets).backward()
        moments = hooks.collect()
        assert moments.n_measured == (samples or m)
        low, high = moments.interval(0.9)
        covered += low <= regression.trace <= high
        traces.append(moments.variance_trace)
    assert 0.85 <= covered / 500 <= 0.95
    within_three_standard_errors(traces, regression.trace)


@pytest.mark.parametrize("sizes", [(8,), (2, 6), (2, 9, 5)], ids=str)
@pytest.mark.parametrize("samples", [None, 3])
def test_unbiased_also_for_unequal_passes(sizes, samples):
    regression, k = Regression(), len(sizes)
    traces, true = [], []
    for _ in range(1500):
        grads = regression.grads(sum(sizes))
        mean = torch.stack([part.mean(0) for part in grads.split(sizes)]).mean(0)
        passes = []
        for part in grads.split(sizes):
            rows = (
                None
                if samples is None
                else torch.randperm(len(part), generator=regression.generator)[:samples]
            )
            shares = (part if rows is None else part[rows]) / (k * len(part))
            passes.append(
                BackwardPass(
                    len(part),
                    {"sq_norms": [shares.square().sum(1)], "inner_products": [shares @ mean]},
                    rows,
                )
            )
        moments = pool_passes(passes, (mean @ mean).unsqueeze(0))
        traces.append(moments.variance_trace)
        true.append(moments.true_grad_sq_norm)
    assert min(traces) >= 0
    within_three_standard_errors(traces, regression.trace)
    within_three_standard_errors(true, regression.grad_sq_norm)


def test_inner_products_are_far_steadier_where_the_signal_is_strong():
    """m = 64, s = 16, G² = 9 T: without inner_products T̂ carries the sampling noise of mean
    ‖g_i‖², of which nine tenths are signal."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((10,), 3.0, dtype=torch.float64)  # G² = 90
    with_products, without = [], []
    for _ in range(400):
        grads = mean + torch.randn(64, 10, generator=generator, dtype=torch.float64)  # T = 10
        moments = moments_of(grads, torch.arange(16))
        with_products.append(moments.variance_trace)
        without.append(GradientMoments(64, moments.sq_norms, moments.grad_sq_norm).variance_trace)
    for values in (with_products, without):
        assert abs(sum(values) / 400 - 10) < 3 * float(torch.tensor(values).std()) / 20
    assert float(torch.tensor(with_products).std()) < 0.3 * float(torch.tensor(without).std())
    assert min(with_products) > 0 > min(without)


def test_the_same_through_the_hooks():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    with torch.no_grad():
        model.bias.add_(20.0)  # every residual is large, so that the gradients point one way
    loss_fn = lambda model, batch: model(batch).square()[:, 0]  # noqa: E731
    plain, with_products = [], []
    for _ in range(60):
        inputs = 1 + 0.3 * torch.randn(64, 6)
        truth = (
            float(oracle.variance_trace(oracle.per_sample_grads(model, loss_fn, inputs)))
            if len(plain) < 5
            else None
        )
        hooks = GradSampleHooks(model, samples=16, statistics=["inner_products"], seed=len(plain))
        model.zero_grad()
        loss_fn(model, inputs).mean().backward()
        moments = hooks.collect()
        hooks.remove()
        plain.append(GradientMoments(64, moments.sq_norms, moments.grad_sq_norm).variance_trace)
        with_products.append(moments.variance_trace)
        if truth is not None:
            assert abs(with_products[-1] - truth) < 4 * moments.std_error
    assert float(torch.tensor(with_products).std()) < 0.5 * float(torch.tensor(plain).std())
