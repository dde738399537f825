"""Measuring a small model through the hooks, and comparing the result with the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from tests import oracle

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Double(torch.autograd.Function):
    """2x, by a function that autograd knows nothing of."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def untraceable(x):
    """x, by operations that are not known to keep samples apart."""
    return x.flip(0).flip(0)


def squared_error(model, batch):
    """Per-sample losses [N] of a model with one input; no gradient cancels."""
    inputs, targets = batch
    return (model(inputs).flatten(1) - targets).square().sum(1)


def make_mlp(dtype=torch.float32):
    """Two Linear layers with an in-place ReLU between."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).to(dtype)


def make_batch(samples=8, dtype=torch.float32, width=4, targets=3):
    """(inputs [samples, width], targets [samples, targets])."""
    return torch.randn(samples, width, dtype=dtype), torch.randn(samples, targets, dtype=dtype)


def backward(model, batch, loss_fn=squared_error, loss_reduction="mean", divisor=1):
    """One training pass: forward, reduced loss, backward."""
    (getattr(loss_fn(model, batch), loss_reduction)() / divisor).backward()


def measure(model, batch, loss_fn=squared_error, loss_reduction="mean", **options):
    """Moments of one step on a model without hooks."""
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, **options)
    model.zero_grad()
    try:
        backward(model, batch, loss_fn, loss_reduction)
        return hooks.collect()
    finally:
        hooks.remove()


def close(actual, expected, rtol):
    """Relative to the largest entry: small ones are sums that cancel."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(largest, 0.1))


def raises_while_compiling(match):
    """An error raised in what is being compiled."""
    return pytest.raises(Exception, match=match)


def mean_grad_sq_norm(grads):
    """‖g‖² of the batch-mean gradient from per-sample gradients."""
    return float(sum(grad.mean(0).square().sum() for grad in grads.values()))


def agrees(moments, grads, rtol=1e-5):
    """The moments are those of the oracle's per-sample gradients, of the measured rows."""
    sq_norms = oracle.sq_norms(grads)
    measured = sq_norms if moments.indices is None else sq_norms[moments.indices]
    close(moments.sq_norms, measured, rtol)
    close(moments.grad_sq_norm, mean_grad_sq_norm(grads), rtol)
    if moments.indices is None:
        difference = abs(moments.variance_trace - float(oracle.variance_trace(grads)))
        assert difference <= 4 * rtol * max(float(sq_norms.mean()), 0.1)
