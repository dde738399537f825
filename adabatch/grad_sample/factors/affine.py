"""Factors of what a normalization layer multiplies by and adds, y = x̂ ∘ scale + shift.

Legend: N samples, T positions that share the parameters, P elements of the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from adabatch import kernels
from adabatch.grad_sample.factors.base import Dense, Factor


@dataclass(frozen=True)
class Scale(Factor):
    """G_n = Σ_t backprops_nt ∘ x̂_nt, x̂ = (activations − mean) · rstd; neither is stored. Arguments
    as for kernels.affine_sq_norms; the parameter's shape has P elements.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]])
        >>> Scale(a, b, torch.tensor([[[2.0]]]), None, (2,)).dense()
        tensor([[-2.,  1.]])
    """

    activations: Tensor
    backprops: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    weight_shape: tuple[int, ...]
    # Results for scale and shift; torch.compile does not know cached_property.
    _found: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape

    def both_sq_norms(self) -> tuple[Tensor, Tensor]:
        """Squared norms [N] of the scale's and the shift's gradients, read in one pass."""
        if "sq_norms" not in self._found:
            self._found["sq_norms"] = kernels.affine_sq_norms(
                self.activations, self.backprops, self.mean, self.rstd)
        return self._found["sq_norms"]

    def both_dense(self) -> tuple[Tensor, Tensor]:
        """The gradients [N, *shape] of the scale and of the shift."""
        if "dense" not in self._found:
            scale, shift = kernels.affine_grad_sample(
                self.activations, self.backprops, self.mean, self.rstd)
            shape = (scale.shape[0], *self.weight_shape)
            self._found["dense"] = (scale.view(shape), shift.view(shape))
        return self._found["dense"]

    def sq_norms(self) -> Tensor:
        return self.both_sq_norms()[0]

    def dense(self) -> Tensor:
        return self.both_dense()[0]

    def select(self, indices: Tensor | slice) -> Scale:
        n_samples = self.activations.shape[0]  # the property reads vars(): not in graphs of 2.11
        mean, rstd = (each if each is None or each.shape[0] != n_samples else each[indices]
                      for each in (self.mean, self.rstd))
        activations, backprops = self.activations[indices], self.backprops[indices]
        return Scale(activations, backprops, mean, rstd, self.weight_shape)

    def compact(self) -> Dense:
        return Dense(self.dense())


@dataclass(frozen=True)
class Shift(Factor):
    """G_n = Σ_t backprops_nt, of the same layer as a scale, with which it shares results."""

    scale: Scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scale.weight_shape

    @property
    def n_samples(self) -> int:
        return self.scale.n_samples

    def sq_norms(self) -> Tensor:
        return self.scale.both_sq_norms()[1]

    def dense(self) -> Tensor:
        return self.scale.both_dense()[1]

    def select(self, indices: Tensor | slice) -> Shift:
        return Shift(self.scale.select(indices))

    def compact(self) -> Dense:
        return Dense(self.dense())
