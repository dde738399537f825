"""Random augmentation that repeats: what a sample draws depends on (seed, epoch, position in the order) alone, not on workers or batch sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

_MASK = 2**64 - 1
# Looking whether generators have moved takes as long as fetching several samples, so that it is not done for every batch.
_LOOK_EVERY = 1024


def mix(*words: int) -> int:
    """One 64-bit word from several: splitmix64's finalizer after each.

    Example:
        >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
        (True, False)

    References:
        Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class SampleSeeds:
    """Fetches samples with the global CPU generators of torch, NumPy and Python seeded for each, where the data set draws from them at all.

    Samples are fetched at once first; if a generator has moved, the data set is random, and those and all later samples are fetched one by one,
    that generator seeded before each by mix(stream, position). In the training process the generators are given back as they were.

    Generators are looked at for the first 1,024 samples and once in so many after them.

    Args:
        in_worker: whether this process fetches and does nothing else.

    Example:
        >>> seeds = SampleSeeds(in_worker=False)
        >>> draws = lambda indices: [random.random() for _ in indices]
        >>> four = seeds.fetch(draws, lambda index: random.random(), 7, 0, range(4))
        >>> four[2:] == seeds.fetch(draws, lambda index: random.random(), 7, 2, range(2, 4))
        True
    """

    def __init__(self, in_worker: bool):
        self._sources = (_Torch(), _NumPy(), _PythonInWorker() if in_worker else _Python())
        self._unwatched = -_LOOK_EVERY

    def fetch(
        self,
        fetch_all: Callable[[Sequence[Any]], list[Any]],
        fetch_one: Callable[[Any], Any],
        stream: int,
        start: int,
        indices: Sequence[Any],
        stride: int = 1,
    ) -> list[Any]:
        """The samples of these indices, at the positions start, start + stride, … of the order."""
        first, second, third = self._sources
        looks = self._looks(len(indices))
        while True:
            used = [source for source in self._sources if source.used]
            if not used and not looks:
                return fetch_all(indices)
            first.begin(looks), second.begin(looks), third.begin(looks)
            try:
                if used:
                    samples = [self._fetch_seeded(used, fetch_one, mix(stream, start + row * stride), index) for row, index in enumerate(indices)]
                else:
                    samples = fetch_all(indices)
                moved = (first.find(), second.find(), third.find()) if looks else ()
            finally:
                first.end(), second.end(), third.end()
            if True not in moved:
                return samples

    def _looks(self, count: int) -> bool:
        looks = self._unwatched <= 0 or self._unwatched >= _LOOK_EVERY
        self._unwatched = (min(self._unwatched, 1) if looks else self._unwatched) + count
        return looks

    def seeded(self, key: int, run: Callable[[], Any]) -> Any:
        """run(), all three generators seeded with `key` before it and given back after it."""
        for source in self._sources:
            source.used = True
            source.begin(True)
        try:
            return self._fetch_seeded(self._sources, lambda _: run(), key, None)
        finally:
            for source in self._sources:
                source.end()

    @staticmethod
    def _fetch_seeded(sources: Sequence[Any], fetch_one: Callable[[Any], Any], key: int, index: Any) -> Any:
        for source in sources:
            source.seed(key)
        return fetch_one(index)


class _Torch:
    """Each source has begin() before a chunk, seed() before a sample, find() whether it is found to be in use only now, and end() to give it back."""

    used = False

    def begin(self, looks: bool) -> None:
        self._before = torch.default_generator.get_state() if self.used or looks else None

    def find(self) -> bool:
        if self.used:
            return False
        self.used = not torch.equal(self._before, torch.default_generator.get_state())
        return self.used

    def seed(self, key: int) -> None:
        torch.default_generator.manual_seed(key)

    def end(self) -> None:
        if self.used and self._before is not None:
            torch.default_generator.set_state(self._before)


class _NumPy:
    """The global RandomState is given a bit generator of our own meanwhile: swapping is a hundred times faster than saving the state."""

    used = False

    def __init__(self):
        self._own, self._twin = np.random.MT19937(0), np.random.MT19937(0)

    def begin(self, looks: bool) -> None:
        self._theirs = np.random.get_bit_generator()
        np.random.set_bit_generator(self._own)

    def find(self) -> bool:
        if self.used:
            return False
        self.used = self._own.random_raw() != self._twin.random_raw()
        return self.used

    def seed(self, key: int) -> None:
        np.random.seed(key >> 32)  # noqa: NPY002 the generator that data sets use is the global one

    def end(self) -> None:
        np.random.set_bit_generator(self._theirs)


class _Python:
    used = False

    def begin(self, looks: bool) -> None:
        self._before = random.getstate() if self.used or looks else None

    def find(self) -> bool:
        if self.used:
            return False
        self.used = self._before is not None and self._before != random.getstate()
        return self.used

    def seed(self, key: int) -> None:
        random.seed(key)

    def end(self) -> None:
        if self.used and self._before is not None:
            random.setstate(self._before)


class _PythonInWorker:
    """Nobody else draws in a worker: a twin tells what the next number is if the data set has drawn none."""

    used = False

    def __init__(self):
        # Begun from torch's own seed of this worker: a collate_fn may draw too, and not the same in all workers.
        seed = random.getrandbits(64)
        random.seed(seed)
        self._twin = random.Random(seed)

    def begin(self, looks: bool) -> None:
        pass

    def find(self) -> bool:
        if self.used:
            return False
        self.used = random.random() != self._twin.random()
        return self.used

    def seed(self, key: int) -> None:
        random.seed(key)

    def end(self) -> None:
        pass
