"""Factors: how the per-sample gradient of one parameter is built, without building it.

Legend: N samples, T positions, I in, O out, D embedding width, V rows of an embedding, C channels, K kernel, g groups.

A factor answers sq_norms() -> [N], second_moment() -> [*shape], dot(other [*shape]) -> [N], dense() -> [N, *shape], has a shape (the parameter's) and can
select(indices) some of its samples. Results are float32, or float64 if a tensor of the factor is. They are of the contributions to the loss that was
differentiated: under a mean loss each carries 1/m, which the caller takes out. sq_norms, second_moment and dot come from the kernels; only dense() holds all
N gradients at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch import kernels
from adabatch.kernels.chunks import accumulation_dtype

__all__ = ["ConvOuter", "Dense", "Factor", "OneHotOuter", "Outer"]


class Factor:
    """One parameter's per-sample gradients G_n, in factored form; see the subclasses.

    A subclass is a frozen dataclass of tensors and numbers that answers what the module's docstring lists.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        raise NotImplementedError

    @property
    def n_samples(self) -> int:
        """N."""
        return next(value for value in vars(self).values() if isinstance(value, Tensor)).shape[0]

    def sq_norms(self) -> Tensor:
        """Squared norms ‖G_n‖², [N]."""
        raise NotImplementedError

    def second_moment(self) -> Tensor:
        """Elementwise Σ_n G_n², [*shape]: a sum over the samples, not a mean."""
        raise NotImplementedError

    def preconditioned_trace(self, preconditioner: Tensor) -> Tensor:
        """Σ P∘Σ_n G_n², a number, with P [*shape]; the second moment lives no longer than this call."""
        moment = self.second_moment()
        return (moment * preconditioner.to(moment.dtype)).sum()

    def dot(self, other: Tensor) -> Tensor:
        """Inner products ⟨G_n, other⟩, [N], with other [*shape]."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The gradients themselves, [N, *shape]."""
        raise NotImplementedError

    def select(self, indices: Tensor) -> Factor:
        """The same for the samples at indices [s] only."""
        raise NotImplementedError

    def compact(self) -> Factor:
        """The same gradients in the form that is small to keep and cheap to ask more than once."""
        return self


@dataclass(frozen=True)
class Outer(Factor):
    """G_n = Σ_t left_nt right_ntᵀ, [O, I]: a matrix that multiplies its input.

    Args:
        left: the output gradients, [N, T, O].
        right: the activations, [N, T, I].

    Example:
        >>> factor = Outer(left=torch.tensor([[[1.0]], [[2.0]]]), right=torch.ones(2, 1, 4))
        >>> factor.shape, factor.sq_norms()
        ((1, 4), tensor([ 4., 16.]))
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[2], self.right.shape[2]

    def sq_norms(self) -> Tensor:
        return kernels.outer_sq_norms(self.right, self.left)

    def second_moment(self) -> Tensor:
        return kernels.outer_second_moment(self.right, self.left)

    def preconditioned_trace(self, preconditioner: Tensor) -> Tensor:
        return kernels.preconditioned_trace(self.right, self.left, preconditioner)

    def dot(self, other: Tensor) -> Tensor:
        return kernels.outer_dot(self.right, self.left, other)

    def dense(self) -> Tensor:
        dtype = accumulation_dtype(self.left, self.right)
        return torch.bmm(self.left.to(dtype).mT, self.right.to(dtype))

    def select(self, indices: Tensor) -> Outer:
        return Outer(self.left[indices], self.right[indices])


@dataclass(frozen=True)
class OneHotOuter(Factor):
    """G_n = Σ_t onehot(ids_nt) right_ntᵀ, [V, D]: a table whose rows are looked up.

    Args:
        ids: [N, T], integers in [0, V).
        right: the output gradients, [N, T, D]; zero where a position must not count.
        num_embeddings: V.

    Example:
        >>> factor = OneHotOuter(torch.tensor([[0, 0], [0, 1]]), torch.tensor([[[1.0], [1.0]], [[3.0], [4.0]]]), num_embeddings=2)
        >>> factor.sq_norms()
        tensor([ 4., 25.])
    """

    ids: Tensor
    right: Tensor
    num_embeddings: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.right.shape[2]

    def sq_norms(self) -> Tensor:
        return kernels.embedding_sq_norms(self.ids, self.right)

    def second_moment(self) -> Tensor:
        return kernels.embedding_second_moment(self.ids, self.right, self.num_embeddings)

    def dot(self, other: Tensor) -> Tensor:
        return kernels.embedding_dot(self.ids, self.right, other)

    def dense(self) -> Tensor:
        dtype = accumulation_dtype(self.right)
        samples = self.ids.shape[0]
        rows = self.ids + self.num_embeddings * torch.arange(samples, device=self.ids.device).unsqueeze(1)
        grad = self.right.new_zeros(samples * self.num_embeddings, self.right.shape[2], dtype=dtype)
        return grad.index_add_(0, rows.flatten(), self.right.flatten(0, 1).to(dtype)).view(samples, *self.shape)

    def select(self, indices: Tensor) -> OneHotOuter:
        return OneHotOuter(self.ids[indices], self.right[indices], self.num_embeddings)


@dataclass(frozen=True)
class ConvOuter(Factor):
    """G_n[o, c, k] = Σ over output positions p of backprops_n[o, p] activations_n[c, p·stride + k·dilation − padding], [O, C/g, *K]: a convolution's weight.

    Args:
        activations: [N, C, *S], any padding but an equal number of zeros on both sides already in it.
        backprops: [N, O, *S'].
        weight_shape: (O, C/g, *K).
        stride, padding, dilation: one number per dimension.
        groups: g.

    Example:
        >>> factor = ConvOuter(torch.ones(2, 1, 6), torch.ones(2, 1, 3), (1, 1, 4), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> factor.sq_norms()
        tensor([36., 36.])
    """

    activations: Tensor
    backprops: Tensor
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape

    def sq_norms(self) -> Tensor:
        return kernels.conv_sq_norms(self.activations, self.backprops, self.weight_shape, *self._geometry)

    def second_moment(self) -> Tensor:
        return kernels.conv_second_moment(self.activations, self.backprops, self.weight_shape, *self._geometry)

    def dot(self, other: Tensor) -> Tensor:
        return kernels.conv_dot(self.activations, self.backprops, other, *self._geometry)

    def dense(self) -> Tensor:
        return kernels.conv_grad_sample(self.activations, self.backprops, self.weight_shape, *self._geometry)

    def select(self, indices: Tensor) -> ConvOuter:
        return ConvOuter(self.activations[indices], self.backprops[indices], self.weight_shape, *self._geometry)

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.groups


@dataclass(frozen=True)
class Dense(Factor):
    """G_n at hand, [*shape] each: biases, scales, shifts.

    Args:
        grad: [N, *shape].

    Example:
        >>> Dense(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).sq_norms()
        tensor([25.,  1.])
    """

    grad: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.grad.shape[1:])

    def sq_norms(self) -> Tensor:
        return kernels.dense_sq_norms(self.grad)

    def second_moment(self) -> Tensor:
        return kernels.dense_second_moment(self.grad)

    def dot(self, other: Tensor) -> Tensor:
        return kernels.dense_dot(self.grad, other)

    def dense(self) -> Tensor:
        return self.grad.to(accumulation_dtype(self.grad))

    def select(self, indices: Tensor) -> Dense:
        return Dense(self.grad[indices])
