"""The elementwise second moment Σ_n G_n² of each parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adabatch.grad_sample.cost import PASS, LayerCost
from adabatch.grad_sample.factors.base import Factor
from adabatch.interfaces import Statistic


class SecondMoment(Statistic):
    """Σ_n G_n² over the measured samples, of the parameter's shape: a sum, not a mean.

    Example:
        >>> import torch
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> SecondMoment().of_factor("weight", Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor([10., 20.])
    """

    name = "second_moment"
    needs_second_moment = True

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def of_factor(self, name: str, factor: Factor, grad: Tensor | None = None) -> Tensor | None:
        return factor.second_moment()

    def of_fused(
        self, name: str, sq_norms: Tensor, second_moment: Tensor | None
    ) -> Tensor | None:
        return second_moment

    def leaf_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def cost(self, layer: LayerCost, samples: int, measured: int, fused: bool) -> float:
        """The products that norms do without, and passes over gradient and sum."""
        if fused:
            return PASS * layer.numel * (samples + 2)
        squares = 2 * PASS * layer.numel if layer.product > layer.numel else 0.0
        return measured * (layer.product + squares) + 2 * PASS * layer.numel
