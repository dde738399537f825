"""Factors: how the per-sample gradients of one parameter are built, without building them.

Legend: N samples. Results are float32, or float64 if a tensor of the factor is. They are of the
contributions to the loss that was differentiated: under a mean loss each carries 1/m, which the
caller takes out. Only dense() needs memory for all N gradients at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch import kernels
from adabatch.kernels import CHUNK_BYTES, accumulation_dtype


class Factor:
    """One parameter's per-sample gradients G_n, in factored form.

    A subclass is a frozen dataclass of tensors and numbers with `shape`, `dense` and `select`; it
    overrides what it can answer without forming all G_n.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        raise NotImplementedError

    @property
    def n_samples(self) -> int:
        """N."""
        return next(value for value in vars(self).values() if isinstance(value, Tensor)).shape[0]

    def dense(self) -> Tensor:
        """The gradients themselves, [N, *shape]."""
        raise NotImplementedError

    def select(self, indices: Tensor | slice) -> Factor:
        """The same for the samples at indices [s] only."""
        raise NotImplementedError

    def sq_norms(self) -> Tensor:
        """Squared norms ‖G_n‖², [N]."""
        return kernels.dense_sq_norms(self.dense())

    def second_moment(self) -> Tensor:
        """Elementwise Σ_n G_n², [*shape]: a sum over the samples, not a mean."""
        return kernels.dense_second_moment(self.dense())

    def preconditioned_trace(self, preconditioner: Tensor) -> Tensor:
        """Σ P∘Σ_n G_n², a number, with P [*shape]; the second moment lives only for this call."""
        moment = self.second_moment()
        return (moment * preconditioner.to(moment.dtype)).sum()

    def dot(self, other: Tensor) -> Tensor:
        """Inner products ⟨G_n, other⟩, [N], with other [*shape]."""
        return kernels.dense_dot(self.dense(), other)

    def total(self) -> Tensor:
        """Σ_n G_n, [*shape], some samples at a time."""
        if torch.compiler.is_compiling():  # the number of chunks would be the graph's
            return self.dense().sum(0)
        size = max(1, CHUNK_BYTES // max(1, 4 * math.prod(self.shape)))
        parts = [self.select(slice(start, start + size)).dense().sum(0)
                 for start in range(0, max(1, self.n_samples), size)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def total_times(self, vector: Tensor) -> Tensor:
        """Σ_n G_n v, [O], of matrices G_n [O, I]."""
        total = self.total()
        return total @ vector.to(total.dtype)

    def compact(self) -> Factor:
        """The same gradients in the form that is small to keep and cheap to read repeatedly."""
        return self


@dataclass(frozen=True)
class Dense(Factor):
    """The G_n themselves, grad [N, *shape]: biases, scales, shifts.

    Example:
        >>> import torch
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

    def select(self, indices: Tensor | slice) -> Dense:
        return Dense(self.grad[indices])
