"""The weight of a convolution in one, two or three dimensions.

Legend: N samples, C channels in, O channels out, S and S' positions in and out, K kernel, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch import kernels
from adabatch.grad_sample.factors.base import Factor
from adabatch.kernels import accumulation_dtype

Ints = tuple[int, ...]


@dataclass(frozen=True)
class ConvOuter(Factor):
    """G_n[o, c, k] = Σ_p backprops_n[o, p] activations_n[c, p·stride + k·dilation − padding] over
    output positions p, [O, C/g, *K]. Arguments as for kernels.conv_sq_norms.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, 1, 6), torch.ones(2, 1, 3)
        >>> ConvOuter(a, b, (1, 1, 4), (1,), (0,), (1,), groups=1).sq_norms()
        tensor([36., 36.])
    """

    activations: Tensor
    backprops: Tensor
    weight_shape: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @property
    def shape(self) -> Ints:
        return self.weight_shape

    @property
    def _geometry(self) -> tuple[Ints, Ints, Ints, int]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def _arguments(self) -> tuple[Tensor, Tensor, Ints, Ints, Ints, Ints, int]:
        return (self.activations, self.backprops, self.weight_shape, *self._geometry)

    def sq_norms(self) -> Tensor:
        return kernels.conv_sq_norms(*self._arguments)

    def second_moment(self) -> Tensor:
        return kernels.conv_second_moment(*self._arguments)

    def dot(self, other: Tensor) -> Tensor:
        return kernels.conv_dot(self.activations, self.backprops, other, *self._geometry)

    def dense(self) -> Tensor:
        return kernels.conv_grad_sample(*self._arguments)

    def total(self) -> Tensor:
        dtype = accumulation_dtype(self.activations, self.backprops)
        activations, backprops = self.activations.to(dtype), self.backprops.to(dtype)
        weight = activations.new_empty(1).expand(self.weight_shape)  # only its shape is read
        return torch.ops.aten.convolution_backward(
            backprops, activations, weight, None, self.stride, self.padding, self.dilation, False,
            (0,) * len(self.stride), self.groups, (False, True, False))[1]

    def select(self, indices: Tensor | slice) -> ConvOuter:
        activations, backprops = self.activations[indices], self.backprops[indices]
        return ConvOuter(activations, backprops, self.weight_shape, *self._geometry)
