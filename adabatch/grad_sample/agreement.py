"""Whether a rule gives what autograd gives, on a small copy of a layer: for layers known by their
class's name, of whose package there are many versions.

Legend: N samples.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adabatch.grad_sample.layout import Layout

if TYPE_CHECKING:
    from adabatch.grad_sample.registry import Example, FusedBackward, Rule

# Of the largest entry: layers that compute in float32 whatever their parameters are.
TOLERANCE = 1e-4


def wave(*shape: int) -> Tensor:
    """Unlike numbers between -1.5 and 1.5, without drawing random ones.

    Example:
        >>> wave(2, 2).unique().numel()
        4
    """
    counted = torch.arange(1, 1 + torch.Size(shape).numel(), device="cpu", dtype=torch.float32)
    return (1.5 * (counted * 1.7).sin()).view(shape)


def small_copy(
    layer: nn.Module, parameters: dict[str, tuple[int, ...]], **attributes: Any
) -> nn.Module:
    """The layer with its own parameters replaced by others of these shapes, on a CPU, and some
    attributes; without hooks, which a call of its forward() does not run.

    Example:
        >>> layer = nn.Linear(300, 200)
        >>> small = small_copy(layer, {"weight": (2, 3), "bias": (2,)}, in_features=3)
        >>> small.forward(torch.ones(1, 3)).shape, layer.weight.shape
        (torch.Size([1, 2]), torch.Size([200, 300]))
    """
    copied = object.__new__(type(layer))
    copied.__dict__.update(vars(layer))
    copied.__dict__["_parameters"] = {
        name: None if layer._parameters.get(name) is None else nn.Parameter(wave(*shape))
        for name, shape in parameters.items()}
    copied.__dict__.update(attributes)
    return copied


def agrees_with_autograd(
    layer: nn.Module, rule: Rule, fused: FusedBackward | None, example: Example
) -> bool:
    """Whether the layer takes one input, and rule and fused backward pass give every sample's
    gradient on the example; False too where the example does not run."""
    signature = inspect.signature(type(layer).forward)
    if len(signature.parameters) != 2:  # self and the input: a rule gets nothing else
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            copied, inputs = example(layer)
            return _agrees(copied, inputs, rule, fused)
    except Exception:  # another version of the layer may lack anything
        return False


def _agrees(
    layer: nn.Module, inputs: Tensor, rule: Rule, fused: FusedBackward | None
) -> bool:
    parameters = {name: each for name, each in layer._parameters.items() if each is not None}
    leaf = inputs.clone().requires_grad_()
    outputs = layer.forward(leaf)
    backprops = wave(*outputs.shape)

    def grads(rows: slice) -> list[Tensor]:
        return [*torch.autograd.grad(
            outputs[rows], [*parameters.values(), leaf], backprops[rows], retain_graph=True)]

    single = [grads(slice(row, row + 1)) for row in range(len(inputs))]
    expected = {name: torch.stack([sample[index] for sample in single])
                for index, name in enumerate(parameters)}
    factors = rule(layer, inputs, backprops)
    if factors.keys() != parameters.keys() or any(
            not _close(factors[name].dense(), grad) for name, grad in expected.items()):
        return False
    layout, samples = Layout.BATCH_FIRST, len(inputs)
    if fused is None or not fused.supports(layer, leaf, outputs, layout, True):
        return True
    saved = (inputs, *(fused.from_node(outputs) if fused.from_node else ()))
    weight = parameters["weight"].detach()
    result = fused.backward(layer, saved, weight, backprops, samples, layout, needs_inputs=True)
    assert result.grad_inputs is not None
    return _close(result.grad_inputs, grads(slice(None))[-1]) and all(
        _close(result.grads[name], grad.sum(0))
        and _close(result.sq_norms[name], grad.flatten(1).square().sum(1))
        for name, grad in expected.items())


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp(min=1e-3)
    return bool((found - expected).abs().max() < TOLERANCE * scale)
