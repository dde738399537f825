"""What taps report of Σ_i g_i²: all of it, elementwise, or only its sum weighed by a diagonal preconditioner P, one number a parameter.

The weighed sum needs no second copy of the parameters: a linear layer's comes from a kernel, elsewhere one layer's second moment exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adabatch.grad_sample.factors.base import Factor

Preconditioner = Callable[[Tensor], Tensor | None]


class SecondMoments:
    """The second moments of a model's parameters as its taps report them.

    A compiled graph cannot read the optimizer's state, which changes from step to step: its taps report all of Σ_i g_i², weighed when the pass has ended.

    Args:
        parameters: the measured ones by name.
        preconditioner: parameter -> P of its shape, or None while there is none; None: nothing is weighed.

    Example:
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([4.0, 0.0])
        >>> moments = SecondMoments({"weight": weight}, lambda parameter: torch.tensor([1.0, 0.5]))
        >>> moments.of("weight", Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))  # 1 + 9 + (4 + 16)/2
        tensor(20.)
        >>> gradient_shares(moments)
        {'weight': tensor(1.)}
    """

    def __init__(self, parameters: Mapping[str, Tensor], preconditioner: Preconditioner | None = None):
        self.parameters, self.preconditioner = parameters, preconditioner

    @classmethod
    def wanted(cls, parameters: Mapping[str, Tensor], second_moment: bool, preconditioner: Preconditioner | None) -> SecondMoments | None:
        """What serves both proposals, None for neither: all of Σ_i g_i² tells its weighed sum as well."""
        return cls(parameters, None if second_moment else preconditioner) if second_moment or preconditioner is not None else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what a tap reports."""
        return () if self._is_weighed_at_once(name) else tuple(self.parameters[name].shape)

    def of(self, name: str, factor: Factor) -> Tensor | None:
        """What a tap reports of a use, None while there is no P."""
        if not self._is_weighed_at_once(name):
            return factor.second_moment()
        weights = self._weights(name)
        return None if weights is None else factor.preconditioned_trace(weights)

    def of_whole(self, name: str, moment: Tensor) -> Tensor | None:
        """The same from Σ_i g_i² where a tap has it at hand."""
        return self.weighed(name, moment) if self._is_weighed_at_once(name) else moment

    def finish(self, moments: dict[str, Tensor]) -> None:
        """Weigh what was reported whole."""
        if self.preconditioner is None:
            return
        for name in [name for name, moment in moments.items() if moment.shape == self.parameters[name].shape]:
            value = self.weighed(name, moments.pop(name))
            if value is not None:
                moments[name] = value

    def _is_weighed_at_once(self, name: str) -> bool:
        return self.preconditioner is not None and not torch.compiler.is_compiling() and self.parameters[name].dim() > 0

    def weighed(self, name: str, moment: Tensor) -> Tensor | None:
        """Σ P∘moment, None while there is no P."""
        weights = self._weights(name)
        return None if weights is None else (moment * weights.to(moment.dtype)).sum()

    @torch.no_grad()
    def _weights(self, name: str) -> Tensor | None:
        weights = self.preconditioner(self.parameters[name])
        return None if weights is None else _whole(weights)


@torch.no_grad()
def gradient_shares(moments: SecondMoments | None) -> dict[str, Tensor]:
    """Σ P∘g²/‖g‖² of each parameter with a gradient, NaN while it has no P: ‖g‖² over all of them, so that scales of the loss fall out."""
    if moments is None or moments.preconditioner is None:
        return {}
    grads = {name: _whole(parameter.grad) for name, parameter in moments.parameters.items() if parameter.grad is not None}
    squares = {name: (grad.to_dense() if grad.is_sparse else grad).to(_wide(grad)).square() for name, grad in grads.items()}
    length = sum(square.sum() for square in squares.values())
    shares = {}
    for name, square in squares.items():
        value = moments.weighed(name, square)
        shares[name] = square.new_full((), torch.nan) if value is None else value / length.to(value.device).clamp(min=torch.finfo(value.dtype).tiny)
    return shares


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
