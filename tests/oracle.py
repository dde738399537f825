"""The one oracle of the tests: float64, one backward pass per sample.

Batches are a tensor, or tuples, lists and dicts of them, samples first. loss_fn(model, batch)
returns the per-sample losses [N]. Call before hooks are attached: the model is copied with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]


def per_sample_grads(model: nn.Module, loss_fn: LossFunction, batch: Any) -> dict[str, Tensor]:
    """Gradients of the samples' losses, {name of a trainable parameter: [N, *shape] float64}.

    Each sample is run alone through a fresh copy of the model, in the mode it is in.
    """
    grads = {name: [] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for sample in range(num_samples(batch)):
        copied = copy.deepcopy(model).double()
        copied.zero_grad(set_to_none=True)
        _backward(loss_fn(
            copied, map_tensors(batch, lambda tensor, i=sample: _double(tensor[i : i + 1]))).sum())
        for name, parameter in copied.named_parameters():
            if parameter.requires_grad:
                grads[name].append(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return {name: torch.stack(rows) for name, rows in grads.items()}


def contributions(model: nn.Module, loss_fn: LossFunction, batch: Any) -> dict[str, Tensor]:
    """Contribution of each sample to the gradient of the summed loss, {name: [N, *shape] float64};
    for models that mix samples, as train-mode batch norm does.

    Every sample i gets its own parameters θ_i, all of equal value. A layer's output row i is that
    of the layer run on the whole batch with θ_i. The gradient of the summed loss with respect to
    θ_i is the contribution of sample i: it passes through the rows of sample i only, and the
    contributions add up to the whole gradient. Parameters must belong to layers that return one
    tensor, samples first.
    """
    copied = copy.deepcopy(model).double()
    samples = num_samples(batch)
    trainable = {
        name: parameter for name, parameter in copied.named_parameters() if parameter.requires_grad}
    own = {
        parameter: parameter.detach().expand(samples, *parameter.shape).clone().requires_grad_()
        for parameter in trainable.values()}
    for layer in copied.modules():
        if any(parameter in own for parameter in layer._parameters.values()):
            layer.forward = _forward_with_own_parameters(layer, own, samples)
    _backward(loss_fn(copied, map_tensors(batch, _double)).sum())
    thetas = {name: own[parameter] for name, parameter in trainable.items()}
    return {
        name: torch.zeros_like(theta) if theta.grad is None else theta.grad
        for name, theta in thetas.items()}


def sq_norms(grads: dict[str, Tensor]) -> Tensor:
    """‖g_i‖² over all parameters, [N]."""
    return sum(grad.reshape(len(grad), -1).square().sum(1) for grad in grads.values())


def second_moment(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Elementwise Σ_i g_i², a sum over the samples, {name: [*shape]}."""
    return {name: grad.square().sum(0) for name, grad in grads.items()}


def variance_trace(grads: dict[str, Tensor]) -> Tensor:
    """Σ_i ‖g_i − ḡ‖² / (N − 1) over all parameters; grads: of the samples' own losses."""
    return sum(grad.var(0, correction=1).sum() for grad in grads.values())


def num_samples(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch.shape[0]


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with the function applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    return type(batch)(map_tensors(value, function) for value in batch)


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _forward_with_own_parameters(
    layer: nn.Module, own: dict[nn.Parameter, Tensor], samples: int
) -> Callable[..., Tensor]:
    forward, shared = layer.forward, dict(layer._parameters)

    def per_sample_forward(*args: Any, **kwargs: Any) -> Tensor:
        rows = []
        for sample in range(samples):
            layer._parameters.update({
                name: own[parameter][sample] for name, parameter in shared.items()
                if parameter in own})
            rows.append(forward(*args, **kwargs)[sample : sample + 1])
        layer._parameters.update(shared)
        return torch.cat(rows)

    return per_sample_forward
