"""Squared norms ‖G_n‖², summed over the parameters: what every other moment is built on."""

from __future__ import annotations

from torch import Tensor

from adabatch.grad_sample.factors.base import Factor
from adabatch.interfaces import Statistic


class SqNorms(Statistic):
    """‖G_n‖² of each measured sample, [S]; always measured, its cost is the layers' own."""

    name = "sq_norms"
    per_sample = True

    def of_factor(self, name: str, factor: Factor, grad: Tensor | None = None) -> Tensor:
        return factor.sq_norms()

    def of_fused(self, name: str, sq_norms: Tensor, second_moment: Tensor | None) -> Tensor:
        return sq_norms
