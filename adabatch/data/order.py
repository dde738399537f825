"""The order of an epoch, computed or by a user's sampler, and one process's part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch.utils.data import (
    IterableDataset, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler)

from adabatch._checks import integer
from adabatch._types import Part, Source
from adabatch.data.rng import GOLDEN, splitmix64, words

MAX_SAMPLES, MAX_WORD = 2**62, 2**64 - 1
# With 16 rounds all 720 orders of six samples are equally likely; large n would do with eight.
_ROUNDS = 16
# Indices computed at a time: few for the first batch to come at once, then NumPy is cheaper.
_FIRST_BLOCK, _BLOCK = 1024, 8192
# Samplers of torch that draw a new order each time.
SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class KeyedPermutation:
    """A pseudo-random permutation π of 0 … n−1 with the key (seed, epoch), at any position.

    Memory is constant and any position can be computed alone, so that a run resumes from a position
    and processes read disjoint parts of one order without communication.

    The order is part of the checkpoint format: 64-bit integer arithmetic, the same on every
    platform. Modulo 2⁶⁴, with φ = 0x9E3779B97F4A7C15 and the finalizer of splitmix64::

        mix(z):  z ← (z ^ z>>30)·0xBF58476D1CE4E5B9
                 z ← (z ^ z>>27)·0x94D049BB133111EB;  z ^ z>>31
        key_k  = mix(mix(mix(seed + φ) + epoch) + (k+1)·φ)                      k = 0 … 15
        A = ⌈√n⌉ rounded up to an even number,  B = ⌈n/A⌉
        position p = l·B + r,  0 <= l < A,  0 <= r < B
        even k:  l ← (l + ⌊h·A / 2³²⌋) mod A,   h = mix(r·φ + key_k) >> 32
        odd k:   r ← (r + ⌊h·B / 2³²⌋) mod B,   h = mix(l·φ + key_k) >> 32
        π(p) = l·B + r;  where that is >= n, all rounds are repeated on it until it is < n

    Each round can be undone, so the rounds permute 0 … AB−1 (a Feistel network on a rectangle),
    and cycle walking restricts that to 0 … n−1. Fewer than A of the AB values lie outside, so
    repetition is rare. It is a shuffle, not a cipher.

    Args:
        n: number of samples, 0 … 2⁶².
        seed, epoch: 0 … 2⁶⁴ − 1.

    Raises:
        TypeError, ValueError: an argument is not an integer, or out of range.

    Example:
        >>> order = KeyedPermutation(10, seed=0, epoch=0)
        >>> sorted(order(slice(None)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> order([7, 8]).tolist() == [order(7), order(8)]
        True
        >>> len(KeyedPermutation(10**10, seed=0, epoch=0)(range(5_000_000_000, 5_000_000_064)))
        64

    References:
        Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002. Steele, Lea, Flood,
        "Fast splittable pseudorandom number generators", OOPSLA 2014 (splitmix64).
    """

    def __init__(self, n: int, seed: int, epoch: int = 0) -> None:
        self.n = integer("n", n, 0, MAX_SAMPLES)
        self.seed = integer("seed", seed, 0, MAX_WORD)
        self.epoch = integer("epoch", epoch, 0, MAX_WORD)
        rows = math.isqrt(max(self.n - 1, 0)) + 1
        # Rotations of odd length are even permutations: with both sides odd, half of all orders
        # could never come.
        rows += rows % 2
        self._rows, self._columns = np.uint64(rows), np.uint64(max(1, -(-self.n // rows)))
        base = splitmix64(splitmix64(words(self.seed) + GOLDEN) + words(self.epoch))
        self._keys = list(splitmix64(base + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * GOLDEN))

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"KeyedPermutation(n={self.n}, seed={self.seed}, epoch={self.epoch})"

    @overload
    def __call__(self, positions: int) -> int: ...
    @overload
    def __call__(self, positions: slice | range | np.ndarray | list[int]) -> np.ndarray: ...
    def __call__(self, positions: object) -> int | np.ndarray:
        """The samples at `positions`: an int for an int, otherwise an int64 array of their shape.

        Raises:
            TypeError: positions that are not integers.
            IndexError: a position outside 0 … n−1 (negative ones do not count from the end).
        """
        if isinstance(positions, slice):
            positions = range(*positions.indices(self.n))
        if isinstance(positions, range):
            positions = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        array = np.asarray(positions)
        if array.size == 0:
            return np.empty(array.shape, dtype=np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"positions must be integers, got {positions!r}.")
        if array.min() < 0 or array.max() >= self.n:
            found = f"{array.min()} … {array.max()}"
            raise IndexError(f"positions must lie in 0 … {self.n - 1}, got {found}.")
        samples = self._encipher(np.atleast_1d(array).astype(np.uint64))
        while (outside := np.flatnonzero(samples.ravel() >= np.uint64(self.n))).size:
            samples.ravel()[outside] = self._encipher(samples.ravel()[outside])
        result = samples.astype(np.int64).reshape(array.shape)
        return int(result) if array.ndim == 0 else result

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        """All rounds once: a permutation of 0 … AB−1, uint64 to uint64."""
        left = values // self._columns
        right = values - left * self._columns
        for r in range(0, _ROUNDS, 2):
            left = _rotate(left, self._rows, right, self._keys[r])
            right = _rotate(right, self._columns, left, self._keys[r + 1])
        return left * self._columns + right


def _rotate(
    values: np.ndarray, modulus: np.uint64, other: np.ndarray, key: np.uint64
) -> np.ndarray:
    """One round: (values + an offset hashed from `other`) mod `modulus`."""
    z = other * GOLDEN
    z += key
    splitmix64(z)
    # Scaling the upper half is far cheaper than a modulo; its bias, modulus / 2³², cannot be seen.
    z >>= np.uint64(32)
    z *= modulus
    z >>= np.uint64(32)
    z += values
    # Below the modulus the difference wraps to a huge number, so the smaller one is the residue.
    return np.minimum(z, z - modulus, out=z)


def indices(positions: range, permutation: KeyedPermutation | None) -> Iterator[int]:
    """The samples at these positions, computed a block at a time.

    Example:
        >>> list(indices(range(1, 8, 3), None))
        [1, 4, 7]
    """
    if permutation is None:
        return iter(positions)
    edges = chain([0], range(_FIRST_BLOCK, len(positions), _BLOCK))
    sizes = chain([_FIRST_BLOCK], iter(lambda: _BLOCK, 0))
    blocks = (positions[at : at + size] for at, size in zip(edges, sizes, strict=False))
    return chain.from_iterable(permutation(block).tolist() for block in blocks)


@runtime_checkable
class EpochAware(Protocol):
    """A sampler or data set whose order depends on an epoch that is set from outside."""

    def set_epoch(self, epoch: int) -> None: ...


def generator_of(sampler: object) -> torch.Generator | None:
    """The generator that repeats a sampler's order, if it has one and keeps no state itself."""
    generator = getattr(sampler, "generator", None)
    plain = isinstance(generator, torch.Generator) and not isinstance(sampler, Part)
    return generator if plain else None


def length_of(sampler: Source) -> int | None:
    """len(sampler), or None where it has none."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return None


def check_shared(sampler: object) -> int:
    """Samples of a user's order that processes share; ValueError where they could not."""
    name, length = type(sampler).__name__, length_of(sampler)
    if isinstance(sampler, SHUFFLING) and generator_of(sampler) is None:
        raise ValueError(
            f"{name} has no generator, so each process would draw another order. Give it a "
            "generator with the same seed in all processes, or use shuffle=True.")
    if length is None:
        raise ValueError(
            f"the sampler ({name}) has no length, so processes could have different numbers of "
            "batches: give it __len__.")
    return length


class StreamOrder(Sampler[int]):
    """The order of an iterable data set, known to nobody else: its indices count the samples."""

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        return count()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shard:
    """This process among those that share one global order; all have equally many batches.

    Legend: W processes, this one of rank r; p a position in the order of the epoch, m the size of
    a global batch. The batch at p covers p … p + m − 1, and this process draws those positions q
    with q mod W = r. They do not depend on later sizes, so workers may fetch them ahead of time.

    TypeError, ValueError unless 0 <= rank < world_size are integers.

    Example:
        >>> [Shard(rank, 3).local_size(10, 8) for rank in range(3)]
        [2, 3, 3]
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        integer("world_size", self.world_size, 1)
        integer("rank", self.rank, 0, self.world_size - 1)

    def local_size(self, position: int, size: int) -> int:
        """Samples of this process in the batch of `size` at `position`; within 1 of the others'."""
        if self.world_size == 1:
            return size
        return self._before(position + size) - self._before(position)

    def _before(self, position: int) -> int:
        return (position - self.rank + self.world_size - 1) // self.world_size

    def first(self, position: int) -> int:
        """The first position of this process from `position` on."""
        return position + (self.rank - position) % self.world_size

    def next_size(self, size: int, left: int, drop_last: bool) -> int:
        """Global size of the next batch if `size` is requested and `left` samples are left.

        A remainder too small to give each process a sample is added to this batch, or W samples
        are kept for the last one, whichever leaves this batch at W or more. 0 at the end.

        Example:
            >>> [Shard(0, 4).next_size(8, left, False) for left in (20, 8, 10, 3)]
            [8, 8, 6, 3]
            >>> Shard(0, 4).next_size(5, 7, False), Shard(0, 4).next_size(5, 7, True)
            (7, 5)
        """
        if drop_last:
            return size if left >= size else 0
        rest = left - size
        if rest <= 0:
            return left
        if rest >= self.world_size:
            return size
        fewer = left - self.world_size
        return fewer if fewer >= self.world_size else left

    def sizes_to_come(self, size: int, left: int, drop_last: bool) -> tuple[int, list[int]]:
        """(number of whole batches, sizes of the others) in `left` samples at this size.

        Example:
            >>> Shard(0, 4).sizes_to_come(8, 26, False)
            (2, [6, 4])
        """
        whole, rest = divmod(left, size)
        if drop_last or not rest:
            return whole, []
        if rest >= self.world_size or not whole:
            return whole, [rest]
        last = self.next_size(size, size + rest, False)
        return whole - 1, [last, size + rest - last] if last < size else [last]

    def positions(self, start: int, stop: int) -> range:
        """The positions of this process from `start` to before `stop`.

        Where a run saved by fewer processes leaves fewer samples than processes, those without
        one get a sample of another process, which counts nowhere, so that all join the step.
        """
        if 0 < stop - start < self.world_size and not self.local_size(start, stop - start):
            position = start + self.rank % (stop - start)
            return range(position, position + 1)
        return range(self.first(start), stop, self.world_size)

    def of_order(self, order: Iterator[int], start: int, stop: int | None) -> Iterator[int]:
        """This process's part of an order that begins at `start`; `stop` None: end unknown."""
        if self.world_size == 1:
            return order
        mine = range(self.first(start), start) if stop is None else self.positions(start, stop)
        return islice(order, mine.start - start, None, self.world_size)

    def check_epoch(self, num_samples: int) -> None:
        """Raise ValueError for an epoch in which some process would have no sample."""
        if self.world_size > 1 and num_samples < self.world_size:
            raise ValueError(
                f"an epoch of {num_samples} samples cannot give each of {self.world_size} "
                "processes a sample: use fewer processes or more data")

    def check_batch_size(self, batch_size: int) -> int:
        """`batch_size` as an int; TypeError, ValueError unless each process gets a sample."""
        size = integer("batch_size", batch_size, 1)
        if size < self.world_size:
            raise ValueError(
                f"batch_size is that of the global batch, and each of the {self.world_size} "
                f"processes needs a sample of it: it must be an integer >= {self.world_size}, "
                f"got {batch_size!r}.")
        return size


ONE_PROCESS = Shard()
