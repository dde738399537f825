"""A parameter used more than once: its per-sample gradient is the sum over the uses, and only then squared.

Legend: N samples, T positions of a head, S positions of an embedding, V entries of the vocabulary, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adabatch.grad_sample.factors.base import Dense, Factor, OneHotOuter, Outer
from adabatch.kernels.chunks import CHUNK_BYTES, accumulation_dtype, sample_chunks


def merge_factors(factors: Sequence[Factor]) -> Factor:
    """One factor for the sum of several uses of a parameter.

    Outer products concatenate along T, look-ups along their positions; a look-up and an outer product (tied embedding and head) keep their cheap
    cross term; anything else is added up densely, a chunk of samples at a time.

    Raises:
        ValueError: the uses saw different numbers of samples.

    Example:
        >>> use = Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4))
        >>> merge_factors([use, use]).sq_norms()  # (1 + 1)² in each of 12 entries
        tensor([48., 48.])
    """
    merged = [_concatenate(group) for group in _by_kind(factors)]
    return merged[0] if len(merged) == 1 else SumOfFactors(tuple(merged))


def _by_kind(factors: Sequence[Factor]) -> list[list[Factor]]:
    kinds: dict[object, list[Factor]] = {}
    for factor in factors:
        key = type(factor) if isinstance(factor, (Outer, OneHotOuter, Dense)) else id(factor)
        kinds.setdefault(key, []).append(factor)
    return list(kinds.values())


def _concatenate(group: list[Factor]) -> Factor:
    first = group[0]
    if len(group) == 1:
        return first
    if isinstance(first, Dense):
        return Dense(torch.stack(_alike([use.grad for use in group])).sum(0))
    if isinstance(first, Outer):
        return Outer(_cat([use.left for use in group]), _cat([use.right for use in group]))
    return OneHotOuter(_cat([use.ids for use in group]), _cat([use.right for use in group]), first.num_embeddings)


def _cat(tensors: list[Tensor]) -> Tensor:
    return torch.cat(_alike(tensors), dim=1)


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        raise ValueError(f"a parameter is used with different numbers of samples in one backward pass: {sorted(sizes)}; their rows cannot be matched")
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
                return lookups[0].sq_norms() + outers[0].sq_norms() + 2 * _lookup_dot_outer(lookups[0], outers[0])
        return torch.cat([grad.flatten(1).square().sum(1) for grad in self._chunks()])

    def second_moment(self) -> Tensor:
        return sum(grad.square().sum(0) for grad in self._chunks())

    def dot(self, other: Tensor) -> Tensor:
        return sum(factor.dot(other) for factor in self.factors)

    def dense(self) -> Tensor:
        return sum(factor.dense() for factor in self.factors)

    def select(self, indices: Tensor | slice) -> SumOfFactors:
        return SumOfFactors(tuple(factor.select(indices) for factor in self.factors))

    def _chunks(self) -> Iterator[Tensor]:
        size = max(1, CHUNK_BYTES // max(1, 4 * math.prod(self.shape)))
        for start in range(0, max(1, self.n_samples), size):
            yield self.select(slice(start, start + size)).dense()


def _lookup_dot_outer(lookup: OneHotOuter, outer: Outer) -> Tensor:
    """⟨look-up's g_i, outer's g_i⟩ = Σ_{t,s} b_it[id_is] (a_it·e_is), [N]: neither gradient [V, D] is formed."""
    dtype = accumulation_dtype(outer.left, outer.right, lookup.right)
    cross = []
    for a_NTD, b_NTV, e_NSD, ids_NS in sample_chunks(2 * outer.left.shape[1] * lookup.ids.shape[1], dtype, outer.right, outer.left, lookup.right, lookup.ids):
        picked_NTS = b_NTV.gather(2, ids_NS.long().unsqueeze(1).expand(-1, b_NTV.shape[1], -1))
        cross.append((torch.bmm(a_NTD.to(dtype), e_NSD.to(dtype).mT) * picked_NTS).sum((1, 2)))
    return torch.cat(cross)
