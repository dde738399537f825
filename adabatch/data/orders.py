"""Where the order of an epoch comes from: computed, or a sampler of the caller's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import torch
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from adabatch.data.order import KeyedPermutation

# Indices worked out at a time: few for the first batch to come at once, then enough to make NumPy's cost per call small.
_FIRST_BLOCK, _BLOCK = 1024, 8192
# Samplers of torch's that draw a new order each time.
SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def indices(positions: range, permutation: KeyedPermutation | None) -> Iterator[int]:
    """The samples at these positions, a block at a time: memory does not grow with the epoch.

    Example:
        >>> list(indices(range(1, 8, 3), None))
        [1, 4, 7]
    """
    if permutation is None:
        return iter(positions)
    later = (permutation(positions[at : at + _BLOCK]).tolist() for at in range(_FIRST_BLOCK, len(positions), _BLOCK))
    return chain.from_iterable(chain((permutation(part).tolist() for part in (positions[:_FIRST_BLOCK],)), later))


def is_stateful(sampler: Any) -> bool:
    """Whether a sampler saves and restores its own position."""
    return hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict")


def generator_of(sampler: Any) -> torch.Generator | None:
    """The generator that repeats a sampler's order, if it has one and does not keep its own state."""
    generator = getattr(sampler, "generator", None)
    return generator if isinstance(generator, torch.Generator) and not is_stateful(sampler) else None


def check_shared(sampler: Any) -> int:
    """Number of samples of an order of the caller's own that several processes go through.

    Raises:
        ValueError: its length is unknown, so that the processes could have different numbers of batches, or each process would draw another order.
    """
    name = type(sampler).__name__
    if isinstance(sampler, SHUFFLING) and generator_of(sampler) is None:
        raise ValueError(
            f"{name} has no generator, so that each process would draw another order: give it a generator with the same seed in all, or use shuffle=True."
        )
    try:
        return len(sampler)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"the sampler ({name}) has no length, so that processes could have different numbers of batches: give it __len__.") from error


class StreamOrder(Sampler):
    """The order of an iterable data set, which only it knows: its indices count its samples."""

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        return count()

    def __len__(self) -> int:
        return len(self.dataset)
