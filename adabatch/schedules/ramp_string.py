"""Batch-size ramps as large trainers write them: functions samples -> batch size, and RampBS."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from typing_extensions import Unpack

from adabatch._checks import function, integer, integers
from adabatch.interfaces import State
from adabatch.schedules.base import Bounds, BSScheduler, clipped
from adabatch.schedules.managers import Loader

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)

Ramp = Callable[[int], int]


def parse_count(text: str) -> int:
    """A whole number with an optional suffix K, M, B or T (10³, 10⁶, 10⁹, 10¹²), in either case;
    decimals if the result is whole. Anything else is a ValueError.

    Example:
        >>> parse_count("1.5B"), parse_count("768")
        (1500000000, 768)
    """
    from decimal import Decimal  # takes 6 ms to import, and few runs parse a count

    match = _COUNT.fullmatch(text.strip())
    count = Decimal(match[1]) * UNITS[match[2].upper()] if match else None
    if count is None or count != int(count):
        raise ValueError("a count must be a whole number, with an optional suffix K, M, B or T, "
                         f"got {text!r}")
    return int(count)


def parse_ramp(text: str) -> list[tuple[int, int]]:
    """The (samples seen, batch size) pairs of a ramp, such as "0:768 250B:1536 500B:3072".

    The ``from:size`` pairs are separated by spaces or commas. The first starts at 0, each at more
    than the one before: a ValueError otherwise, a TypeError for what is not a string.

    Example:
        >>> parse_ramp("0:768 1.5K:1536")
        [(0, 768), (1500, 1536)]
    """
    if not isinstance(text, str):
        raise TypeError('a ramp must be a string such as "0:768 250B:1536", '
                        f"got {text!r} ({type(text).__name__})")
    pairs = []
    for item in text.replace(",", " ").split():
        start, colon, size = item.partition(":")
        if not colon:
            raise ValueError('a ramp must consist of from:size pairs such as "250B:1536", '
                             f"got {item!r} in {text!r}")
        batch_size = integer(f"the batch size of {item!r}", parse_count(size), at_least=1)
        pairs.append((parse_count(start), batch_size))
    starts = [start for start, _ in pairs]
    if not pairs or starts[0] != 0 or any(later <= start for start, later in pairwise(starts)):
        raise ValueError(f"a ramp must start at 0, with increasing counts, got {text!r}")
    return pairs


def stepwise_ramp(text: str) -> Ramp:
    """The ramp of a string, as in :func:`parse_ramp`: the size of the last pair reached.

    Example:
        >>> ramp = stepwise_ramp("0:768 250B:1536")
        >>> ramp(249_999_999_999), ramp(250_000_000_000)
        (768, 1536)
    """
    return _Steps(text)


class _Steps:
    """The function that a ramp's string stands for, which is its repr."""

    def __init__(self, text: str):
        self._text = text
        self._starts, self._sizes = zip(*parse_ramp(text), strict=True)

    def __call__(self, seen: int) -> int:
        return self._sizes[bisect_right(self._starts, seen) - 1]

    def __repr__(self) -> str:
        return repr(self._text)


def increment_ramp(start: int, increment: int, samples: int, final: int) -> Ramp:
    """From start to final in equal steps of increment, spread evenly over samples:
    start + increment · ⌊seen · steps / samples⌋, at most final. final - start must be a multiple of
    increment.

    Example:
        >>> ramp = increment_ramp(start=32, increment=16, samples=1000, final=64)
        >>> ramp(0), ramp(499), ramp(500), ramp(5000)
        (32, 32, 48, 64)
    """
    start = integer("start", start, at_least=1)
    increment = integer("increment", increment, at_least=1)
    samples = integer("samples", samples, at_least=1)
    final = integer("final", final, at_least=start)
    if (final - start) % increment:
        raise ValueError(f"final - start must be a multiple of increment ({increment}), "
                         f"got {final} - {start} = {final - start}")
    steps = (final - start) // increment
    return lambda seen: min(final, start + increment * (seen * steps // samples))


def doubling_ramp(start: int, milestones: Sequence[int], factor: int = 2) -> Ramp:
    """start · factor^(number of milestones reached), all integers of at least 1.

    Example:
        >>> ramp = doubling_ramp(64, milestones=[1000, 3000])
        >>> ramp(0), ramp(1000), ramp(3000)
        (64, 128, 256)
    """
    start, factor = integer("start", start, at_least=1), integer("factor", factor, at_least=1)
    reached = sorted(integers("milestones", milestones, at_least=1))
    return lambda seen: start * factor ** bisect_right(reached, seen)


def check_divisible(batch_size: int, world_size: int = 1, micro_batch_size: int = 1) -> int:
    """The batch size, if world_size processes can share it in whole micro-batches; otherwise a
    ValueError.

    Example:
        >>> check_divisible(768, world_size=8, micro_batch_size=4)
        768
    """
    unit = world_size * micro_batch_size
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below}, {below + unit}" if below else f"{unit}"
        raise ValueError(f"batch size {batch_size} is not a multiple of {unit} = world size "
                         f"{world_size} x micro-batch size {micro_batch_size}; the nearest are: "
                         f"{nearest}")
    return batch_size


class RampBS(BSScheduler):
    """Follow a ramp by samples seen: call ``step(samples=n)`` with the size of the batch just
    stepped (a TypeError without it). Finished only after a size out of bounds.

    Divisibility is checked when a size comes into use, and when a state is loaded: a run resumed on
    other machines, whose world_size and micro_batch_size hold, need not divide earlier sizes.

    Args:
        ramp: a string as in :func:`parse_ramp`, or a function samples_seen -> batch size.
        tokens_per_sample: where the ramp counts tokens: the length of a sample; the batch sizes
            stay in samples.
        world_size, micro_batch_size: every size in use must be a multiple of their product, or it
            is a ValueError.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = RampBS(DataLoader(range(4000), batch_size=1), "0:64 1K:128")
        >>> [schedule.step(samples=n) or schedule.batch_size for n in (64, 936)]
        [64, 128]
    """

    unsaved = (*BSScheduler.unsaved, "world_size", "micro_batch_size")

    def __init__(self, dataloader: Loader | None, ramp: str | Ramp, tokens_per_sample: int = 1,
                 world_size: int = 1, micro_batch_size: int = 1, **bounds: Unpack[Bounds]):
        self.ramp = function("ramp", ramp) if callable(ramp) else stepwise_ramp(ramp)
        self.tokens_per_sample = integer("tokens_per_sample", tokens_per_sample, at_least=1)
        self.world_size = integer("world_size", world_size, at_least=1)
        self.micro_batch_size = integer("micro_batch_size", micro_batch_size, at_least=1)
        self.samples_seen = 0
        super().__init__(dataloader, **bounds)

    def get_new_bs(self, *, samples: int | None = None, **kwargs: object) -> int:
        if self.last_epoch > 0:
            if samples is None:
                raise TypeError("RampBS is stepped by samples: call step(samples=n) with the size "
                                "of the batch just stepped")
            self.samples_seen += integer("samples", samples, at_least=0)
        new_bs = self.ramp(self.samples_seen * self.tokens_per_sample)
        used = clipped(new_bs, self.min_batch_size, self.max_batch_size)
        check_divisible(used, self.world_size, self.micro_batch_size)
        return new_bs

    def load_state_dict(self, state_dict: State) -> None:
        size = state_dict["sizes"]["batch_size"]
        check_divisible(size, self.world_size, self.micro_batch_size)
        super().load_state_dict(state_dict)
