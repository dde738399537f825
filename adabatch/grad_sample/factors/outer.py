"""Outer products: weights that multiply their input, and tables whose rows are looked up.

Legend: N samples, T positions, I in, O out, D embedding width, V rows of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch import kernels
from adabatch.grad_sample.factors.base import Factor
from adabatch.kernels import accumulation_dtype


@dataclass(frozen=True)
class Outer(Factor):
    """G_n = Σ_t left_nt right_ntᵀ, [O, I]: a matrix that multiplies its input. left: the output
    gradients, [N, T, O]; right: the activations, [N, T, I].

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

    def total_times(self, vector: Tensor) -> Tensor:
        dtype = accumulation_dtype(self.left, self.right)
        right = self.right.to(dtype).flatten(0, 1) @ vector.to(dtype)
        return right @ self.left.to(dtype).flatten(0, 1)

    def select(self, indices: Tensor | slice) -> Outer:
        return Outer(self.left[indices], self.right[indices])


@dataclass(frozen=True)
class OneHotOuter(Factor):
    """G_n = Σ_t onehot(ids_nt) right_ntᵀ, [V, D]: a table whose rows are looked up.

    Args:
        ids: [N, T], integers in [0, V).
        right: the output gradients, [N, T, D]; zero where a position must not count.
        num_embeddings: V.

    Example:
        >>> ids, right = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1.0, 1.0], [3.0, 4.0]])
        >>> OneHotOuter(ids, right.unsqueeze(2), num_embeddings=2).sq_norms()
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
        dtype, samples = accumulation_dtype(self.right), self.ids.shape[0]
        sample = torch.arange(samples, device=self.ids.device).unsqueeze(1)
        rows = (self.ids + self.num_embeddings * sample).flatten()
        table = samples * self.num_embeddings, self.right.shape[2]
        grad = self.right.new_zeros(table, dtype=dtype)
        grad.index_add_(0, rows, self.right.flatten(0, 1).to(dtype))
        return grad.view(samples, *self.shape)

    def total_times(self, vector: Tensor) -> Tensor:
        dtype = accumulation_dtype(self.right)
        right = self.right.to(dtype).flatten(0, 1) @ vector.to(dtype)
        return right.new_zeros(self.num_embeddings).index_add_(0, self.ids.flatten(), right)

    def select(self, indices: Tensor | slice) -> OneHotOuter:
        return OneHotOuter(self.ids[indices], self.right[indices], self.num_embeddings)
