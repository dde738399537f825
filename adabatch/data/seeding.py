"""Random augmentation that repeats: what a sample draws depends on (seed, epoch, position in the order) alone, not on workers or batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adabatch.data.generators import NumPy, Python, PythonInWorker, Torch

_MASK = 2**64 - 1
# Keys worked out at a time: NumPy's cost per call is shared by many.
_BLOCK = 1024


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


class Keys:
    """mix(stream, position) of many positions, worked out a block at a time.

    Example:
        >>> Keys().at(7, 10, 3, 2) == [mix(7, 10), mix(7, 13)]
        True
    """

    def __init__(self):
        self._of, self._first, self._block = (0, 0), 0, []

    def at(self, stream: int, start: int, stride: int, count: int) -> list[int]:
        """Those of the positions start, start + stride, …"""
        row = (start - self._first) // stride
        known = (stream, stride) == self._of and 0 <= row <= len(self._block) - count and self._first + row * stride == start
        if not known:
            self._of, self._first, row = (stream, stride), start, 0
            self._block = _mix_last(stream, start, stride, max(count, _BLOCK))
        return self._block[row : row + count]


def _mix_last(stream: int, start: int, stride: int, count: int) -> list[int]:
    state = np.arange(count, dtype=np.uint64) * np.uint64(stride) + np.uint64((mix(stream) + start + 0x9E3779B97F4A7C15) & _MASK)
    state = (state ^ (state >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> 27)) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> 31)).tolist()


class SampleSeeds:
    """Fetches samples with the global CPU generators of torch, NumPy and Python seeded for each, where the data set draws from them at all.

    A generator that nothing was drawn from so far is looked at before and after each chunk. If it has moved, the chunk is fetched a second time, and those and
    all later samples one by one, that generator seeded before each by mix(stream, position). So the first sample that draws at all is seeded too, however late
    it comes; a data set whose fetching has effects besides sees them twice in that one chunk. In the training process the generators are given back as they
    were.

    Args:
        in_worker: whether this process fetches and does nothing else.

    Example:
        >>> import random
        >>> seeds = SampleSeeds(in_worker=False)
        >>> draws = lambda indices: [random.random() for _ in indices]
        >>> four = seeds.fetch(draws, lambda index: random.random(), 7, 0, range(4))
        >>> four[2:] == seeds.fetch(draws, lambda index: random.random(), 7, 2, range(2, 4))
        True
    """

    def __init__(self, in_worker: bool):
        self._sources = (Torch(), NumPy(), PythonInWorker() if in_worker else Python())
        self._used: list[Any] = []
        self._keys = Keys()

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
        while True:
            first, second, third = self._sources
            first.begin(), second.begin(), third.begin()
            try:
                samples = self._fetch_seeded(fetch_one, stream, start, indices, stride) if self._used else fetch_all(indices)
            finally:
                moved = first.end(), second.end(), third.end()
            if not self._note(moved):
                return samples

    def _note(self, moved: tuple[bool, ...]) -> bool:
        """Keep in mind which generators were found to be in use; whether one was found only now."""
        if True not in moved:
            return False
        found = [source for source, has_moved in zip(self._sources, moved, strict=True) if has_moved and not source.used]
        for source in found:
            source.used = True
        self._used += found
        return bool(found)

    def _fetch_seeded(self, fetch_one: Callable[[Any], Any], stream: int, start: int, indices: Sequence[Any], stride: int) -> list[Any]:
        keys, samples = self._keys.at(stream, start, stride, len(indices)), []
        seed, *others = [source.seed for source in self._used]
        if not others:
            for key, index in zip(keys, indices, strict=True):
                seed(key)
                samples.append(fetch_one(index))
            return samples
        for key, index in zip(keys, indices, strict=True):
            seed(key)
            for also in others:
                also(key)
            samples.append(fetch_one(index))
        return samples

    def seeded(self, key: int, run: Callable[[], Any]) -> Any:
        """run(), all three generators seeded with `key` before it and given back after it."""
        for source in self._sources:
            source.used = True
            source.begin()
        try:
            for source in self._sources:
                source.seed(key)
            return run()
        finally:
            for source in self._sources:
                source.end()
