"""An oracle for models with dropout: float64, one backward pass per sample through the graph of ONE forward pass, whose draws the hooks' pass repeats."""

from __future__ import annotations

import contextlib

import torch

from adabatch import GradSampleHooks
from tests.grad_sample.measuring import close

SEED = 7


def outputs_loss(model, batch):
    """Per-sample losses [N] of a model called with the batch's tensors, whatever it returns; distinct for every output."""
    output = model(*batch)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    rows = output.reshape(len(output), -1)
    weights = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype)
    return (rows * weights).square().sum(1) + (rows * weights).sum(1)


def grads_of_one_forward(model, batch, loss_fn=outputs_loss):
    """{name of a trainable parameter: [N, *shape]}."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(SEED)
    losses = loss_fn(model, batch)
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return {name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows]) for k, (name, p) in enumerate(parameters.items())}


def double(batch):
    """Its floating-point tensors in float64."""
    return tuple(each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in batch)


def exact(model, *batch, loss_fn=outputs_loss, steps=2, rtol=1e-9, around=contextlib.nullcontext, **options):
    """Assert that the hooks' norms and the gradient are those of one backward pass per sample, in several steps; the last step's moments."""
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
            close(moments.sq_norms, expected if moments.indices is None else expected[moments.indices], rtol)
    finally:
        hooks.remove()
    return moments
