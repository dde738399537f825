"""From a proposed batch size to one that can be used: rounding, bounds, multiples, a ladder of sizes, dwell and hysteresis."""

from __future__ import annotations

import bisect
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class SizeRule:
    """What batch sizes are allowed, and how readily the size moves.

    Args:
        minimum, maximum: bounds in samples, both included.
        multiple_of: sizes are multiples of this.
        dwell: steps that must pass after a change before the next one; 0 for none.
        hysteresis: relative change up to which the present size is kept; 0 for none. On a ladder: how far beyond the middle between two rungs the proposal must go.
        ladder: sizes are rungs, each about so many times the one below, from the lowest size to the highest: compiled models and GPUs then see few shapes
            (23 from 16 to 2048 with 1.25). A proposal goes to the rung nearest by ratio. None for all sizes.

    Raises:
        ValueError: bounds that are no positive integers, out of order, or hold no multiple; a negative dwell or hysteresis; a ladder of 1 or less.

    Example:
        >>> rule = SizeRule(16, 2048)
        >>> rule.size_for(2.5), rule.size_for(100.5), rule.size_for(float("inf"))
        (16, 100, 2048)
        >>> SizeRule(16, 60, ladder=1.5).rungs
        (16, 24, 36, 54, 60)
    """

    minimum: int
    maximum: int
    multiple_of: int = 1
    dwell: int = 0
    hysteresis: float = 0.0
    ladder: float | None = None

    def __post_init__(self):
        for name in ("minimum", "maximum", "multiple_of"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                label = {"minimum": "min_batch_size", "maximum": "max_batch_size"}.get(name, name)
                raise ValueError(f"{label} must be a positive integer, got {value!r}")
        if self.minimum > self.maximum:
            raise ValueError(f"min_batch_size ({self.minimum}) must not exceed max_batch_size ({self.maximum})")
        if self.lowest > self.highest:
            raise ValueError(f"no multiple of {self.multiple_of} lies between min_batch_size {self.minimum} and max_batch_size {self.maximum}")
        if not isinstance(self.dwell, int) or self.dwell < 0:
            raise ValueError(f"dwell must be an integer >= 0, got {self.dwell!r}")
        if not isinstance(self.hysteresis, (int, float)) or not 0 <= self.hysteresis < math.inf:
            raise ValueError(f"hysteresis must be a number >= 0, got {self.hysteresis!r}")
        if self.ladder is not None and not (isinstance(self.ladder, (int, float)) and 1 < self.ladder < math.inf):
            raise ValueError(f"ladder must be a number > 1, the ratio of neighbouring sizes, or None, got {self.ladder!r}")

    def for_steps(self, accumulate: int, epoch_samples: int | None, drop_last: bool) -> SizeRule:
        """The rule for steps of `accumulate` equal batches drawn from epochs of so many samples (None: not known).

        A batch larger than an epoch is never delivered whole, and with drop_last never at all.

        Raises:
            ValueError: no step fits the bounds; with drop_last also: the smallest batch is larger than an epoch.
        """
        rule = replace(self, multiple_of=math.lcm(self.multiple_of, accumulate))
        if epoch_samples is None or rule.highest <= epoch_samples * accumulate:
            return rule
        if rule.lowest > epoch_samples * accumulate and not drop_last:
            warnings.warn(
                f"an epoch has {epoch_samples} samples, less than the smallest batch of {rule.lowest // accumulate}: every batch is a short one, for which "
                "short_batch='scale' lowers the lr. Lower min_batch_size",
                stacklevel=4,
            )
        if rule.lowest <= epoch_samples * accumulate:
            return replace(rule, maximum=epoch_samples * accumulate)
        if drop_last:
            raise ValueError(
                f"the smallest batch ({rule.lowest // accumulate} samples) is larger than an epoch ({epoch_samples}), and with drop_last no batch would ever "
                "be drawn: lower min_batch_size"
            )
        return replace(rule, maximum=rule.lowest)

    @property
    def lowest(self) -> int:
        """The smallest allowed size."""
        return -(-self.minimum // self.multiple_of) * self.multiple_of

    @property
    def highest(self) -> int:
        """The largest allowed size."""
        return self.maximum // self.multiple_of * self.multiple_of

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """The sizes of the ladder, ascending; empty without one."""
        if self.ladder is None:
            return ()
        sizes, unrounded = [self.lowest], float(self.lowest)
        while sizes[-1] < self.highest:
            unrounded = max(unrounded * self.ladder, sizes[-1] + self.multiple_of)
            sizes.append(min(round(unrounded / self.multiple_of) * self.multiple_of, self.highest))
        return tuple(sizes)

    def size_for(self, proposal: float) -> int:
        """Round half to even to a multiple, or to the nearest rung, then clip. An infinite proposal is clipped too; NaN is a ValueError."""
        if math.isnan(proposal):
            raise ValueError("the proposed batch size is NaN")
        if math.isinf(proposal):
            return self.highest if proposal > 0 else self.lowest
        if self.ladder is not None:
            above = bisect.bisect_left(self.rungs, proposal)
            around = self.rungs[max(0, above - 1) : above + 1]
            return around[0] if len(around) == 1 or proposal * proposal < around[0] * around[1] else around[1]
        return min(max(round(proposal / self.multiple_of) * self.multiple_of, self.lowest), self.highest)

    def next_size(self, proposal: float, present: int, steps_since_change: int) -> int:
        """The size to use after this step: size_for(proposal), unless dwell or hysteresis keeps the present one, which must itself be allowed."""
        size = self.size_for(proposal)
        if self.ladder is None:
            kept = abs(size - present) <= self.hysteresis * present
        else:
            reach = math.sqrt(self.ladder) * (1 + self.hysteresis)
            kept = present <= proposal * reach and proposal <= present * reach
        kept |= steps_since_change < self.dwell
        return present if kept and self.size_for(present) == present else size

    def is_met(self, proposal: float, size: int) -> bool:
        """Whether the size is the proposal but for rounding, or more: not where a bound, dwell or hysteresis keeps it below."""
        return proposal <= self.highest and size >= self.size_for(proposal)
