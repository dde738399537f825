"""A parameter used more than once: its per-sample gradients are summed over the uses, then squared.

Legend: N samples, T positions of a head, S positions of an embedding, V entries of the vocabulary,
D embedding width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.outer import OneHotOuter, Outer
from adabatch.kernels import CHUNK_BYTES, accumulation_dtype, sample_chunks


def merge_factors(factors: Sequence[Factor]) -> Factor:
    """One factor for the sum of several uses of a parameter.

    Outer products are concatenated along T, look-ups along their positions; a look-up and an outer
    product (tied embedding and head) keep their cheap cross term; anything else is added up
    densely, a chunk of samples at a time.

    Raises:
        ValueError: the uses saw different numbers of samples.

    Example:
        >>> use = Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4))
        >>> merge_factors([use, use]).sq_norms()  # (1 + 1)² in each of 12 entries
        tensor([48., 48.])
    """
    kinds: dict[object, list[Factor]] = {}
    for factor in factors:
        mergeable = isinstance(factor, (Outer, OneHotOuter, Dense))
        kinds.setdefault(type(factor) if mergeable else id(factor), []).append(factor)
    merged = [_concatenate(group) for group in kinds.values()]
    return merged[0] if len(merged) == 1 else SumOfFactors(tuple(merged))


def _concatenate(group: Sequence[Factor]) -> Factor:
    if len(group) == 1:
        return group[0]
    outers = [factor for factor in group if isinstance(factor, Outer)]
    if outers:
        return Outer(_cat([use.left for use in outers]), _cat([use.right for use in outers]))
    lookups = [factor for factor in group if isinstance(factor, OneHotOuter)]
    if lookups:
        ids, right = _cat([use.ids for use in lookups]), _cat([use.right for use in lookups])
        return OneHotOuter(ids, right, lookups[0].num_embeddings)
    grads = [factor.grad for factor in group if isinstance(factor, Dense)]
    return Dense(torch.stack(_same_type(grads)).sum(0))


def _cat(tensors: list[Tensor]) -> Tensor:
    return torch.cat(_same_type(tensors), dim=1)


def _same_type(tensors: list[Tensor]) -> list[Tensor]:
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        raise ValueError(
            "a parameter is used with different numbers of samples in one backward pass: "
            f"{sorted(sizes)}; their rows cannot be matched"
        )
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@dataclass(frozen=True)
class SumOfFactors(Factor):
    """The sum of factors of different kinds, all of one parameter and over the same samples."""

    factors: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.factors[0].shape

    @property
    def n_samples(self) -> int:
        return self.factors[0].n_samples

    def sq_norms(self) -> Tensor:
        if len(self.factors) == 2:
            lookups = [factor for factor in self.factors if isinstance(factor, OneHotOuter)]
            outers = [factor for factor in self.factors if isinstance(factor, Outer)]
            if lookups and outers:
                cross = _lookup_dot_outer(lookups[0], outers[0])
                return lookups[0].sq_norms() + outers[0].sq_norms() + 2 * cross
        return torch.cat([grad.flatten(1).square().sum(1) for grad in self._chunks()])

    def second_moment(self) -> Tensor:
        return functools.reduce(torch.add, (grad.square().sum(0) for grad in self._chunks()))

    def dot(self, other: Tensor) -> Tensor:
        return functools.reduce(torch.add, [factor.dot(other) for factor in self.factors])

    def dense(self) -> Tensor:
        return functools.reduce(torch.add, [factor.dense() for factor in self.factors])

    def select(self, indices: Tensor | slice) -> SumOfFactors:
        return SumOfFactors(tuple(factor.select(indices) for factor in self.factors))

    def _chunks(self) -> Iterator[Tensor]:
        size = max(1, CHUNK_BYTES // max(1, 4 * math.prod(self.shape)))
        for start in range(0, max(1, self.n_samples), size):
            yield self.select(slice(start, start + size)).dense()


def _lookup_dot_outer(lookup: OneHotOuter, outer: Outer) -> Tensor:
    """⟨look-up's G_n, outer's G_n⟩ = Σ_{t,s} b_nt[id_ns] (a_nt·e_ns), [N], without either G_n."""
    left, right = outer.left, outer.right
    dtype = accumulation_dtype(left, right, lookup.right)
    numel, cross = 2 * left.shape[1] * lookup.ids.shape[1], []
    chunks = sample_chunks(numel, dtype, right, left, lookup.right, lookup.ids)
    for a_NTD, b_NTV, e_NSD, ids_NS in chunks:
        ids_NTS = ids_NS.long().unsqueeze(1).expand(-1, b_NTV.shape[1], -1)
        products_NTS = torch.bmm(a_NTD.to(dtype), e_NSD.to(dtype).mT)
        cross.append((products_NTS * b_NTV.gather(2, ids_NTS)).sum((1, 2)))
    return torch.cat(cross)
