"""The second moment contracted with a diagonal preconditioner, Σ P∘Σ_n G_n², one number each.

No second copy of the parameters is kept: for a Linear it comes from a kernel, elsewhere one
layer's second moment exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.estimators.gradients import whole_gradient
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.statistics.second_moment import SecondMoment
from adabatch.kernels import accumulation_dtype

Preconditioner = Callable[[Tensor], Tensor | None]


@dataclass
class PreconditionedSums:
    """What is known of each parameter, by name.

    Attributes:
        squares: Σ P∘Σ_n g_n² over the measured samples.
        gradient: Σ P∘g²/‖g‖², ‖g‖² over all parameters, so that scales of the loss cancel; NaN
            while there is no P.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)


class PreconditionedTrace(SecondMoment):
    """Σ P∘Σ_n G_n² of each parameter.

    A compiled graph cannot read the optimizer's state, which changes from step to step: it reports
    Σ_n G_n², which is contracted when the pass has ended.

    Args:
        preconditioner: parameter -> P of its shape, or None while there is none.

    Example:
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([4.0, 0.0])
        >>> trace = PreconditionedTrace(lambda parameter: torch.tensor([1.0, 0.5]))
        >>> trace.attach({"weight": weight})
        >>> trace.of_factor("weight", Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor(20.)
        >>> trace.of_gradient()
        {'weight': tensor(1.)}
    """

    name = "preconditioned_trace"

    def __init__(self, preconditioner: Preconditioner):
        self.preconditioner = preconditioner

    def of_factor(self, name: str, factor: Factor, grad: Tensor | None = None) -> Tensor | None:
        if torch.compiler.is_compiling():
            return super().of_factor(name, factor, grad)
        weights = self._weights(name)
        return None if weights is None else factor.preconditioned_trace(weights)

    def of_fused(
        self, name: str, sq_norms: Tensor, second_moment: Tensor | None
    ) -> Tensor | None:
        if second_moment is None or torch.compiler.is_compiling():
            return second_moment
        return self.from_leaf(name, second_moment)

    def from_leaf(self, name: str, value: Tensor) -> Tensor | None:
        weights = self._weights(name)
        return None if weights is None else (value * weights.to(value.dtype)).sum()

    @torch.no_grad()
    def of_gradient(self) -> dict[str, Tensor]:
        grads = {name: whole_gradient(parameter.grad)
                 for name, parameter in self._parameters.items()}
        squares = {name: grad.to(accumulation_dtype(grad)).square()
                   for name, grad in grads.items() if grad is not None}
        length = sum(square.sum() for square in squares.values())
        found: dict[str, Tensor] = {}
        for name, square in squares.items():
            value = self.from_leaf(name, square)
            if value is None:
                found[name] = square.new_full((), torch.nan)
            else:
                tiny = torch.finfo(value.dtype).tiny
                found[name] = value / length.to(value.device).clamp(min=tiny)  # type: ignore[union-attr]
        return found

    def pool(
        self, passes: Sequence[Mapping[str, Tensor]], scales: Sequence[float],
        gradient: Mapping[str, Tensor],
    ) -> PreconditionedSums:
        return PreconditionedSums(super().pool(passes, scales, gradient), dict(gradient))

    def over_samples(self, pooled: PreconditionedSums) -> list[Tensor]:
        return list(pooled.squares.values())

    @torch.no_grad()
    def _weights(self, name: str) -> Tensor | None:
        return whole_gradient(self.preconditioner(self._parameters[name]))
