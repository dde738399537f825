"""An oracle for models with dropout: float64, one backward pass per sample through the graph of ONE
forward pass, whose draws the hooks' pass repeats."""

from __future__ import annotations

import contextlib

import torch

from adabatch import GradSampleHooks
from tests.grad_sample.measuring import close

SEED = 7


def outputs_loss(model, batch):
    """Per-sample losses [N] of a model called with the batch's tensors, of any output structure;
    distinct for every output."""
    output = model(*batch)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    rows = output.reshape(len(output), -1)
    weights = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype)
    return (rows * weights).square().sum(1) + (rows * weights).sum(1)


def grads_of_one_forward(model, batch, loss_fn=outputs_loss):
    """{name of a trainable parameter: [N, *shape]}."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    torch.manual_seed(SEED)
    grads = {name: [] for name in parameters}
    for loss in loss_fn(model, batch):
        row = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), row, strict=True):
            grads[name].append(torch.zeros_like(parameter) if grad is None else grad)
    return {name: torch.stack(rows) for name, rows in grads.items()}


def double(batch):
    """Its floating-point tensors in float64."""
    return tuple(
        each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in batch)


def exact(
    model, *batch, loss_fn=outputs_loss, steps=2, rtol=1e-9, around=contextlib.nullcontext,
    **options,
):
    """Assert that the hooks' norms and the gradient are those of one backward pass per sample, in
    several steps; the last step's moments."""
    model, batch = model.double(), double(batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with around():
        grads = grads_of_one_forward(model, batch, loss_fn)
    expected = sum(grad.reshape(len(grad), -1).square().sum(1) for grad in grads.values())
    hooks = GradSampleHooks(model, **options)
    try:
        for _ in range(steps):
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            model.zero_grad()
            torch.manual_seed(SEED)
            with around():
                loss = loss_fn(model, batch).mean()
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    close(parameter.grad, grads[name].mean(0), rtol)
            moments = hooks.collect()
            measured = expected if moments.indices is None else expected[moments.indices]
            close(moments.sq_norms, measured, rtol)
    finally:
        hooks.remove()
    return moments
