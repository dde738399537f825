"""Random numbers that repeat: splitmix64, and the global generators seeded for each sample."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


def words(*values: int) -> np.ndarray:
    """The integers modulo 2⁶⁴ as uint64."""
    return np.array([value & _MASK for value in values], dtype=np.uint64)


def splitmix64(z: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, in place: z ^= z>>30, z *= m₁, z ^= z>>27, z *= m₂, z ^= z>>31.

    z: uint64, not a scalar, of which NumPy would warn. Steele, Lea, Flood, OOPSLA 2014.
    """
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MULTIPLIERS[0]
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= _MULTIPLIERS[1]
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def mix(*values: int) -> int:
    """One 64-bit word from several, in their order.

    Example:
        >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
        (True, False)
    """
    state = words(0)
    for value in values:
        state = splitmix64(state + words(value) + GOLDEN)
    return int(state[0])


def sample_keys(stream: int, start: int, count: int, stride: int = 1) -> list[int]:
    """mix(stream, position) at `count` positions: start, start + stride, …"""
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    return splitmix64(offsets + words(mix(stream) + start) + GOLDEN).tolist()


def seed_generators(key: int) -> None:
    """Seed torch's (on the CPU), NumPy's and Python's global generators."""
    torch.default_generator.manual_seed(key)
    np.random.seed(key >> 32)  # noqa: NPY002 the generator that data sets use is the global one
    random.seed(key)


@contextmanager
def generators_restored() -> Iterator[None]:
    """A context after which the three global generators are as they were before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
