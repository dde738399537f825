"""Pooling against closed forms in NumPy: what the reduction, the accumulation and the loss scale
did to autograd's sums is undone."""

import numpy as np
import pytest
import torch

from adabatch.estimators.moments import BackwardPass, PoolOptions
from adabatch.estimators.moments import pool_passes as pool
from adabatch.grad_sample.statistics import SecondMoment

SHAPES = {"a": (3,), "b": (2, 2)}


def pool_passes(passes, grad_sq_norms, loss_scale=1.0, **options):
    options = PoolOptions(statistics=[SecondMoment()], **options)
    return pool(passes, grad_sq_norms, loss_scale=loss_scale, options=options)


def step(size, norms, indices=None, moments=None):
    values = {} if moments is None else {"second_moment": moments}
    return BackwardPass(size, {"sq_norms": norms}, indices, values)


def autograd_passes(sizes, loss_reduction, loss_scale, rows=None):
    """Per-sample gradients {name: [m, *shape]} and what the passes of a step with them leave:
    contributions z_i = a_i g_i, and the finished gradient."""
    generator = np.random.default_rng(0)
    grads = {
        name: generator.normal(size=(sum(sizes), *shape)) + 1 for name, shape in SHAPES.items()
    }
    k, passes, start = len(sizes), [], 0
    finished = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for size in sizes:
        weight = loss_scale * (1 / (k * size) if loss_reduction == "mean" else 1.0)
        part = {name: weight * value[start : start + size] for name, value in grads.items()}
        finished = {name: finished[name] + value.sum(0) for name, value in part.items()}
        measured = (
            part
            if rows is None or rows >= size
            else {name: value[::-1][:rows] for name, value in part.items()}
        )
        indices = (
            None if rows is None or rows >= size else torch.arange(size - 1, size - 1 - rows, -1)
        )
        norms = [
            torch.tensor(np.square(value).reshape(len(value), -1).sum(1))
            for value in measured.values()
        ]
        moments = {name: torch.tensor(np.square(value).sum(0)) for name, value in measured.items()}
        passes.append(step(size, norms, indices, moments))
        start += size
    return grads, passes, torch.tensor([np.square(value).sum() for value in finished.values()])


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("loss_scale", [1.0, 4096.0])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(6,), (4, 4), (2, 7, 3), (1, 1)], ids=str)
def test_per_sample_gradients_come_back(sizes, loss_reduction, loss_scale, rows):
    grads, passes, finished = autograd_passes(sizes, loss_reduction, loss_scale, rows)
    moments = pool_passes(
        passes,
        finished,
        loss_reduction=loss_reduction,
        loss_scale=loss_scale,
        group_of_row=(0, 1),
        row_names=("a", "b"),
    )

    weights = np.concatenate(
        [
            np.full(size, 1 / (len(sizes) * size) if loss_reduction == "mean" else 1 / sum(sizes))
            for size in sizes
        ]
    )
    offsets = np.cumsum([0, *sizes[:-1]])
    chosen = [
        np.arange(size) if rows is None or rows >= size else np.arange(size)[::-1][:rows]
        for size in sizes
    ]
    index = np.concatenate([rows + offset for rows, offset in zip(chosen, offsets, strict=True)])
    assert moments.batch_size == sum(sizes)
    assert moments.n_measured == len(index)
    if moments.indices is None:
        assert list(index) == list(range(sum(sizes)))
    else:
        assert moments.indices.tolist() == list(index)
    sq_norms = {
        name: np.square(value[index]).reshape(len(index), -1).sum(1)
        for name, value in grads.items()
    }
    grad_sq_norms = {
        name: np.square(np.tensordot(weights, value, 1)).sum() for name, value in grads.items()
    }
    np.testing.assert_allclose(moments.sq_norms, sum(sq_norms.values()), rtol=1e-12)
    np.testing.assert_allclose(moments.grad_sq_norm, sum(grad_sq_norms.values()), rtol=1e-12)
    m_eff = 1 / np.square(weights).sum()
    for group, name in enumerate(SHAPES):
        part = moments.by_group[group]
        np.testing.assert_allclose(moments.by_parameter[name], sq_norms[name], rtol=1e-12)
        np.testing.assert_allclose(part.sq_norms, sq_norms[name], rtol=1e-12)
        np.testing.assert_allclose(part.grad_sq_norm, grad_sq_norms[name], rtol=1e-12)
        np.testing.assert_allclose(
            part.variance_trace,
            (sq_norms[name].mean() - grad_sq_norms[name]) / (1 - 1 / m_eff),
            rtol=1e-9,
        )
        np.testing.assert_allclose(
            moments.second_moment[name], np.square(grads[name][index]).sum(0), rtol=1e-12
        )


@pytest.mark.parametrize("row_names", [None, ("a", "b")])
def test_rows_of_one_group_add_up(row_names):
    grads, passes, finished = autograd_passes((5,), "mean", 1.0)
    moments = pool_passes(passes, finished, group_of_row=(3, 3), row_names=row_names)
    assert moments.by_group == {}
    assert set(moments.by_parameter) == set(row_names or ())
    np.testing.assert_allclose(
        moments.sq_norms,
        sum(np.square(value).reshape(5, -1).sum(1) for value in grads.values()),
        rtol=1e-12,
    )


def test_a_row_without_a_report_in_some_pass_counts_zero_there():
    first = step(2, [torch.tensor([1.0, 2.0]), None], None)
    second = step(2, [torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])], None)
    moments = pool_passes(
        [first, second],
        torch.tensor([1.0, 1.0]),
        loss_reduction="sum",
        group_of_row=(0, 1),
        row_names=("a", "b"),
    )
    assert moments.by_parameter["b"].tolist() == [0, 0, 5, 6]
    assert moments.sq_norms.tolist() == [1, 2, 8, 10]


def test_a_second_moment_missing_in_one_pass():
    passes = [step(2, [torch.ones(2)], None, {"a": torch.ones(3)}), step(2, [torch.ones(2)])]
    moments = pool_passes(passes, torch.ones(1), loss_reduction="mean")
    assert moments.second_moment["a"].tolist() == [16.0] * 3


def test_an_empty_pass():
    for reduction in ("mean", "sum"):
        moments = pool_passes([step(0, [torch.ones(0)])], torch.zeros(1), loss_reduction=reduction)
        assert (moments.batch_size, moments.n_measured, moments.grad_sq_norm) == (0, 0, 0.0)


def test_equal_passes_have_no_other_effective_size():
    _, passes, finished = autograd_passes((4, 4), "mean", 1.0)
    assert pool_passes(passes, finished, group_of_row=(0, 0)).effective_batch_size is None
    _, passes, finished = autograd_passes((2, 6), "mean", 1.0)
    assert pool_passes(passes, finished, group_of_row=(0, 0)).effective_batch_size == pytest.approx(
        4 / (1 / 2 + 1 / 6)
    )
    assert (
        pool_passes(
            passes, finished, loss_reduction="sum", group_of_row=(0, 0)
        ).effective_batch_size
        is None
    )
