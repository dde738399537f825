"""A shuffled order of 0 … n−1 that is computed, not stored: a permutation keyed by (seed, epoch)."""

from __future__ import annotations

import math

import numpy as np

from adabatch.data.arguments import MAX_SAMPLES, checked_int

# Sixteen are what it takes until all 720 orders of six samples are equally likely; large n would do with eight.
_ROUNDS = 16
_MASK = 2**64 - 1
# The increment and the multipliers of splitmix64.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U64_GOLDEN, _U64_MIX_1, _U64_MIX_2 = np.uint64(_GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_U64_27, _U64_30, _U64_31, _U64_32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


class KeyedPermutation:
    """A pseudo-random permutation π of 0 … n−1, drawn by the key (seed, epoch) and evaluated at any position by itself.

    Memory is constant and any position can be asked for at once, so an order of 10¹⁰ samples costs no more than one of ten, a run can be resumed from a
    position alone, and processes can read disjoint parts of one order without talking to each other.

    The order is part of the checkpoint format: 64-bit integer arithmetic only, the same on every platform, never to be changed within a format version.
    With all arithmetic modulo 2⁶⁴, φ = 0x9E3779B97F4A7C15 and the finaliser of splitmix64::

        mix(z):  z ← (z ^ z>>30)·0xBF58476D1CE4E5B9;  z ← (z ^ z>>27)·0x94D049BB133111EB;  z ^ z>>31
        key_k  = mix(mix(mix(seed + φ) + epoch) + (k+1)·φ)                      k = 0 … 15
        A = ⌈√n⌉ rounded up to an even number,  B = ⌈n/A⌉;   position p = l·B + r,  0 <= l < A,  0 <= r < B
        even k:  l ← (l + ⌊h·A / 2³²⌋) mod A,   h = mix(r·φ + key_k) >> 32
        odd k:   r ← (r + ⌊h·B / 2³²⌋) mod B,   h = mix(l·φ + key_k) >> 32
        π(p) = l·B + r;  where that is >= n, all rounds are repeated on it until it is < n

    Each round can be undone, so the rounds permute 0 … AB−1 (a Feistel network on a rectangle), and following the cycle until it is back below n permutes
    0 … n−1. Fewer than A of the AB values lie outside, so the repetition is rare. It is a shuffle, not a cipher.

    Args:
        n: number of samples, 0 … 2⁶².
        seed: 0 … 2⁶⁴ − 1.
        epoch: 0 … 2⁶⁴ − 1; each epoch has its own order.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range.

    Example:
        >>> order = KeyedPermutation(10, seed=0, epoch=0)
        >>> sorted(order(slice(None)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> order([7, 8]).tolist() == [order(7), order(8)]
        True
        >>> len(KeyedPermutation(10**10, seed=0, epoch=0)(range(5_000_000_000, 5_000_000_064)))
        64

    References:
        Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (cycle walking, Feistel networks on rectangles).
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (splitmix64).
    """

    def __init__(self, n: int, seed: int, epoch: int = 0) -> None:
        self.n = checked_int("n", n, 0, MAX_SAMPLES)
        self.seed = checked_int("seed", seed, 0, _MASK)
        self.epoch = checked_int("epoch", epoch, 0, _MASK)
        rows = math.isqrt(max(self.n - 1, 0)) + 1
        # Rotations of odd length are even permutations: with both sides odd half of all orders could never come.
        rows += rows % 2
        self._rows, self._columns = np.uint64(rows), np.uint64(max(1, -(-self.n // rows)))
        base = _mix(_mix((self.seed + _GOLDEN) & _MASK) + self.epoch & _MASK)
        self._keys = [np.uint64(_mix(base + (r + 1) * _GOLDEN & _MASK)) for r in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"KeyedPermutation(n={self.n}, seed={self.seed}, epoch={self.epoch})"

    def __call__(self, positions: int | slice | range | np.ndarray | list[int]) -> int | np.ndarray:
        """The samples at ``positions`` of the order: an int for an int, otherwise an int64 array of the shape of ``positions``.

        Raises:
            TypeError: positions that are no integers.
            IndexError: a position outside 0 … n−1 (negative ones are not counted from the end).
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
            raise IndexError(f"positions must lie in 0 … {self.n - 1}, got {array.min()} … {array.max()}.")
        # One dimension at least: NumPy warns of overflow in scalars, where wrapping is what is meant here.
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


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * _MIX_1 & _MASK
    z = (z ^ z >> 27) * _MIX_2 & _MASK
    return z ^ z >> 31


def _rotate(values: np.ndarray, modulus: np.uint64, other: np.ndarray, key: np.uint64) -> np.ndarray:
    """(values + an offset hashed from ``other``) mod ``modulus``: one round, undone by subtracting the same offset."""
    z = other * _U64_GOLDEN
    z += key
    shifted = z >> _U64_30
    z ^= shifted
    z *= _U64_MIX_1
    z ^= np.right_shift(z, _U64_27, out=shifted)
    z *= _U64_MIX_2
    z ^= np.right_shift(z, _U64_31, out=shifted)
    # Scaling the upper half is far cheaper than a modulo, and its bias, modulus / 2³², is far below what any order can show.
    z >>= _U64_32
    z *= modulus
    z >>= _U64_32
    z += values
    # Below the modulus the difference wraps to a huge number, so the smaller one is the residue.
    return np.minimum(z, np.subtract(z, modulus, out=shifted), out=z)
