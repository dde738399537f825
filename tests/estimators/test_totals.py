"""Moments from sums over processes: the samples of one batch, cut into unequal parts, give the
moments of the batch."""

from dataclasses import replace

import pytest
import torch

from adabatch import GradientMoments
from adabatch.estimators.totals import between_processes, sums_of, totals_of

QUANTITIES = (
    "n_measured",
    "mean_sq_norm",
    "variance_trace",
    "biased_variance_trace",
    "true_grad_sq_norm",
    "noise_scale",
    "snr",
)
WITH_PRODUCTS = ("std_error", "inner_product_variance")


def batch(
    m: int, *, inner_products: bool, weights: bool = False, corrections: bool = False
) -> tuple[GradientMoments, torch.Tensor]:
    """The moments of m normal gradients around (2, 0, 0), and the gradients."""
    generator = torch.Generator().manual_seed(m)
    grads = torch.randn(m, 3, generator=generator, dtype=torch.float64) + torch.tensor(
        [2.0, 0.0, 0.0]
    )
    w = torch.rand(m, generator=generator, dtype=torch.float64) + 0.5
    w = w / w.mean() if weights else None
    mean = grads.mean(0)
    options = {
        "inner_products": grads @ mean if inner_products else None,
        "weights": w,
        "corrections": torch.rand(m, generator=generator).double() if corrections else None,
    }
    return GradientMoments(m, grads.square().sum(1), float(mean.square().sum()), **options), grads


def part(moments: GradientMoments, rows: slice, share: float, grad_share: float) -> GradientMoments:
    cut = {
        name: None if getattr(moments, name) is None else getattr(moments, name)[rows]
        for name in ("sq_norms", "inner_products", "weights", "corrections")
    }
    return replace(moments, **cut, grad_sq_norm=moments.grad_sq_norm * grad_share, share=share)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 2, 7), (1, 12)], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {"inner_products": False},
        {"inner_products": True},
        {"inner_products": True, "weights": True},
        {"inner_products": True, "corrections": True},
    ],
    ids=str,
)
def test_parts_add_up_to_the_batch(sizes, kind):
    m = sum(sizes)
    whole, _ = batch(m, **kind)
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    parts = [
        part(whole, slice(end - size, end), size / m, 1 / len(sizes))
        for size, end in zip(sizes, ends, strict=True)
    ]
    sums = [
        sum(values) for values in zip(*(sums_of(each, each.share) for each in parts), strict=True)
    ]
    grad_sq_norm, totals = totals_of(sums, m, has_inner_products=kind["inner_products"])
    found = replace(parts[0], grad_sq_norm=grad_sq_norm, totals=totals)
    for name in QUANTITIES + (WITH_PRODUCTS if kind["inner_products"] else ()):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    assert found.is_finite
    if kind["inner_products"]:
        assert found.interval(0.9) == pytest.approx(whole.interval(0.9), rel=1e-9)


def test_processes_that_measure_other_rates_count_by_their_samples():
    """One process measures 1 of its 8 samples, one both of its 2: the mean is (8·n_0 + 2·(n_8 +
    n_9)/2)/10."""
    norms = torch.arange(1.0, 11.0)
    parts = [
        GradientMoments(10, norms[:1], 0.0, share=0.8),
        GradientMoments(10, norms[8:], 0.0, share=0.2),
    ]
    sums = [
        sum(values) for values in zip(*(sums_of(each, each.share) for each in parts), strict=True)
    ]
    _, totals = totals_of(sums, 10, has_inner_products=False)
    assert totals.n_measured == 3
    assert totals.mean_sq_norm == pytest.approx((8 * 1.0 + 2 * 9.5) / 10)


def test_a_value_that_is_not_finite_shows():
    moments = GradientMoments(2, torch.tensor([1.0, float("nan")]), 1.0)
    grad_sq_norm, totals = totals_of(sums_of(moments, 1.0), 2, has_inner_products=False)
    assert not replace(moments, grad_sq_norm=grad_sq_norm, totals=totals).is_finite


@pytest.mark.parametrize("sizes", [(4, 4), (1, 2, 6), (3, 3, 3, 2)], ids=str)
def test_trace_between_processes(sizes):
    """Σ b_r‖g_r − ḡ‖²/(k − 1) worked out as it stands, and its error T̂√(2/(k − 1))."""
    _, grads = batch(sum(sizes), inner_products=False)
    m, means = sum(sizes), [each.mean(0) for each in grads.split(list(sizes))]
    whole = grads.mean(0)
    expected = sum(
        size * (mean - whole).square().sum() for size, mean in zip(sizes, means, strict=True)
    ).item() / (len(sizes) - 1)
    parts = [
        GradientMoments(
            m, mean.square().sum()[None], float(whole.square().sum()) / len(sizes), share=size / m
        )
        for size, mean in zip(sizes, means, strict=True)
    ]
    sums = [
        sum(values) for values in zip(*(sums_of(each, each.share) for each in parts), strict=True)
    ]
    grad_sq_norm, totals = totals_of(sums, m, has_inner_products=False)
    found = replace(
        parts[0], grad_sq_norm=grad_sq_norm, totals=between_processes(totals, grad_sq_norm, m)
    )
    assert found.variance_trace == pytest.approx(expected, rel=1e-9)
    assert found.std_error == pytest.approx(expected * (2 / (len(sizes) - 1)) ** 0.5)
    assert found.n_measured == len(sizes)
