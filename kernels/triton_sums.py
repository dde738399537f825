"""How a sum over samples that is split over programs comes together: added in whatever order they come, or kept apart and added at the end."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_partial_sums", "partial_sums", "store_tile"]


@triton.jit
def store_tile(ptr, tile, offsets, inside, place, WANTED: tl.constexpr, ATOMIC: tl.constexpr):
    """A program's tile, stored at its split's own place, or added atomically to the one place there is."""
    if WANTED:
        if ATOMIC:
            tl.atomic_add(ptr + offsets, tile, mask=inside, sem="relaxed")
        else:
            tl.store(ptr + place + offsets, tile, mask=inside)


def partial_sums(empty: Tensor, wanted: bool, shape: Sequence[int], splits: int, atomic: bool) -> Tensor:
    """Room for store_tile: zeros [1, *shape] to add to, or [splits, *shape] to be written once each; `empty` itself if nothing is wanted."""
    if not wanted:
        return empty
    return empty.new_zeros(1, *shape) if atomic else empty.new_empty(splits, *shape)


def add_partial_sums(sums: Tensor) -> Tensor:
    """Σ over the splits, in their order; without a sample there are no splits, and the sum is zero."""
    return sums if sums.dim() == 1 else sums[0] if sums.shape[0] == 1 else sums.sum(0)
