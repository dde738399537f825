"""The gradients of a parameter that is used through a view: reshaped, permuted, or a slice of it.

Legend: N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from adabatch.grad_sample.factors.base import Factor


@dataclass(frozen=True)
class Viewed(Factor):
    """G_n is zero but for the elements that the view shows, which are inner's G_n; no element is
    shown twice.

    Args:
        inner: the factor of the view.
        parameter_shape: of the whole parameter.
        size, stride, offset: of the view, of a contiguous parameter, as in torch.as_strided.

    Example:
        >>> import torch
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> rows = torch.zeros(3, 2)[1:]
        >>> inner = Dense(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        >>> factor = Viewed(inner, (3, 2), (2, 2), rows.stride(), rows.storage_offset())
        >>> factor.dense(), factor.sq_norms()
        (tensor([[[0., 0.],
                 [3., 0.],
                 [0., 4.]]]), tensor([25.]))
    """

    inner: Factor
    parameter_shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter_shape

    @property
    def n_samples(self) -> int:
        return self.inner.n_samples

    def _of(self, whole: Tensor) -> Tensor:
        return whole.contiguous().as_strided(self.size, self.stride, self.offset)

    def sq_norms(self) -> Tensor:
        return self.inner.sq_norms()

    def second_moment(self) -> Tensor:
        part = self.inner.second_moment()
        whole = part.new_zeros(self.parameter_shape)
        self._of(whole).copy_(part)
        return whole

    def dot(self, other: Tensor) -> Tensor:
        return self.inner.dot(self._of(other).contiguous())

    def total(self) -> Tensor:
        part = self.inner.total()
        whole = part.new_zeros(self.parameter_shape)
        self._of(whole).copy_(part)
        return whole

    def total_times(self, vector: Tensor) -> Tensor:
        total = self.total()
        return total @ vector.to(total.dtype)

    def dense(self) -> Tensor:
        part = self.inner.dense()
        samples, numel = len(part), math.prod(self.parameter_shape)
        whole = part.new_zeros(samples, *self.parameter_shape)
        whole.as_strided((samples, *self.size), (numel, *self.stride), self.offset).copy_(part)
        return whole

    def select(self, indices: Tensor | slice) -> Viewed:
        return Viewed(self.inner.select(indices), self.parameter_shape, self.size, self.stride,
                      self.offset)

    def compact(self) -> Viewed:
        return Viewed(self.inner.compact(), self.parameter_shape, self.size, self.stride,
                      self.offset)
