"""The global random generators that data sets draw from, those of torch (on the CPU), NumPy and Python: has one moved, seed it, give it back."""

from __future__ import annotations

import random
import struct
from ctypes import c_char, sizeof, string_at
from typing import Any

import numpy as np
import torch

# A Mersenne Twister, which all three are: its words, and the place of the next.
_WORDS = 624
_State = c_char * (4 * (_WORDS + 1))


class Torch:
    """Each generator has begin() before a chunk, seed() before a sample, and end(), which gives it back as it was and tells whether it had moved.

    `used`: it is known to be drawn from, and not looked at any more.
    """

    used = False

    def __init__(self):
        generator = torch.default_generator
        self.seed, self._state, self._set_state = generator.manual_seed, generator.get_state, generator.set_state

    def begin(self) -> None:
        self._before = self._state()

    def end(self) -> bool:
        if not self.used:
            before, after = self._before, self._state()
            # torch.equal takes three times as long.
            if string_at(after.data_ptr(), after.nbytes) == string_at(before.data_ptr(), before.nbytes):
                return False
        self._set_state(self._before)
        return True


class NumPy:
    """The global RandomState is given a bit generator of our own meanwhile: swapping is a hundred times faster than saving the state."""

    used = False

    def __init__(self):
        self._own = np.random.MT19937(0)
        self._memory = _State.from_address(self._own.ctypes.state_address)

    def begin(self) -> None:
        self._theirs = np.random.get_bit_generator()
        self._before = self._memory.raw
        np.random.set_bit_generator(self._own)

    def seed(self, key: int) -> None:
        np.random.seed(key >> 32)  # noqa: NPY002 the generator that data sets use is the global one

    def end(self) -> bool:
        np.random.set_bit_generator(self._theirs)
        return self.used or self._memory.raw != self._before


class Python:
    """Its state is read from memory where it lies as expected, because getstate() makes 625 numbers of it, which takes as long as several samples."""

    used = False

    def __init__(self):
        self._memory = _memory_of_python()

    def _state(self) -> Any:
        return random.getstate() if self._memory is None else (self._memory.raw, random._inst.gauss_next)

    def begin(self) -> None:
        self._before = self._state()

    def seed(self, key: int) -> None:
        random.seed(key)

    def end(self) -> bool:
        if not self.used and self._state() == self._before:
            return False
        random.setstate(self._before if self._memory is None else _as_tuple(*self._before))
        return True


class PythonInWorker:
    """Nobody else draws in a worker: a twin tells what the next number is if the data set has drawn none."""

    used = False

    def __init__(self):
        # Begun from torch's own seed of this worker: a collate_fn may draw too, and not the same in all workers.
        seed = random.getrandbits(64)
        random.seed(seed)
        self._twin = random.Random(seed)

    def begin(self) -> None:
        pass

    def seed(self, key: int) -> None:
        random.seed(key)

    def end(self) -> bool:
        return self.used or random.random() != self._twin.random()


def _as_tuple(memory: bytes, gauss_next: float | None) -> tuple:
    place, *words = struct.unpack(f"=i{_WORDS}I", memory)
    return random.Random.VERSION, (*words, place), gauss_next


def _memory_of_python() -> Any:
    """Where the state of the global random.Random lies, or None where it does not lie as in CPython."""
    probe, offset = random.Random(7), object.__basicsize__
    probe.random()
    if type(random._inst) is not random.Random or random.Random.__basicsize__ < offset + sizeof(_State):
        return None
    known = _as_tuple(_State.from_address(id(probe) + offset).raw, None) == probe.getstate()
    return _State.from_address(id(random._inst) + offset) if known else None
