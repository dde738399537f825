"""A check of the first measured backward pass: do the samples' contributions add up to the gradient?

It sees what a layer that is run again sample by sample cannot know: that it mixes samples, or that a buffer changed while it ran. A use that no tap saw
shows as well.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch._engine import running_backward
from adabatch.grad_sample.factors.base import Factor

DIFFERS = (
    "the samples' contributions do not add up to the gradient of these parameters: {listed}. A layer without a rule that mixes samples or changes its buffers "
    "while it runs, a use that the hooks do not see, or a term of the loss that passes by the samples can be the cause: adabatch.check(model, batch, loss_fn) "
    "finds it. Give the layer a rule with register_grad_sampler, take the term out of the loss, or pass ignore=[...]"
)


@dataclass
class _Sums:
    """Of one parameter, over its uses: Σ_i ⟨g_i, r⟩, Σ_i |⟨g_i, r⟩|, and whether the gradient was empty before."""

    signed: Tensor | float
    absolute: Tensor | float
    fresh: bool


class GradientSumCheck:
    """Compares Σ_i ⟨g_i, r⟩ with ⟨p.grad, r⟩ for each parameter p and one random direction r, in passes of which all samples are measured.

    Only layers without a rule, traced operations and parameters with several uses are heard: rules are tested. Gradients that were not empty before
    the pass, that other hooks may change, or that processes share, are left out.

    Example:
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> witness = GradientSumCheck({"weight": weight})
        >>> witness.hear({"weight": "weight"}, {"weight": Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))})
        >>> weight.grad = torch.tensor([4.0, 6.0])
        >>> witness.compare(task=-1)
        True
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters
        self._forget(-1)

    def _forget(self, task: int) -> None:
        self._task, self._eps = task, torch.finfo(torch.float64).eps
        self._sums: dict[str, _Sums] = {}

    def hear(self, names: Mapping[str, str], factors: Mapping[str, Factor]) -> None:
        """A use, told while the gradient is not complete: {own name: name in the model} and {own name: factor}."""
        if self._task != running_backward():
            self._forget(running_backward())
        for own, factor in factors.items():
            parameter = self._parameters[names[own]]
            sums = self._sums.setdefault(names[own], _Sums(0.0, 0.0, _is_empty(parameter.grad)))
            inner_products = factor.dot(_direction(parameter))
            sums.signed, sums.absolute = sums.signed + inner_products.sum(), sums.absolute + inner_products.abs().sum()
            tensors = [parameter, *(value for value in vars(factor).values() if isinstance(value, Tensor))]
            self._eps = max(self._eps, *(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()))

    def compare(self, task: int) -> bool:
        """Whether something could be compared, when that backward pass has ended.

        Raises:
            RuntimeError: contributions do not add up to the gradient; all parameters concerned are listed.
        """
        if task != self._task or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        sums = {name: each for name, each in self._sums.items() if each.fresh and not _is_changed_by_others(self._parameters[name])}
        eps = self._eps
        self._forget(-1)
        largest = max((float(each.absolute) for each in sums.values()), default=0.0)
        wrong = []
        for name, each in sums.items():
            parameter = self._parameters[name]
            direction = _direction(parameter)
            whole = 0.0 if parameter.grad is None else float((parameter.grad.to_dense().to(direction) * direction).sum())
            # What is zero but for rounding, as a key's bias in attention, is held against the other parameters.
            allowed = _tolerance(direction, eps) * (float(each.absolute) + abs(whole) + 0.1 * largest)
            if abs(float(each.signed) - whole) > allowed:  # not when a value is not finite
                wrong.append(name)
        if wrong:
            raise RuntimeError(DIFFERS.format(listed=", ".join(wrong)))
        return bool(sums)


def _tolerance(like: Tensor, eps: float) -> float:
    """Rounding and order of summation, far from what a mistake makes; on accelerators float32 products may be rounded to 10 bits."""
    if eps <= torch.finfo(torch.float64).eps:
        return 1e-7
    return max(1e-3 if like.device.type == "cpu" else 1e-2, 30 * eps)


def _direction(parameter: Tensor) -> Tensor:
    """Standard normal, the same for a parameter whenever it is asked for, without a draw from the global generator."""
    generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=dtype)


def _is_empty(grad: Tensor | None) -> bool:
    return grad is None or (not grad.is_sparse and not bool(torch.count_nonzero(grad)))


def _is_changed_by_others(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks) or bool(parameter._post_accumulate_grad_hooks)
