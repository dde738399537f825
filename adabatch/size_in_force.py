"""The batch size in force: what the loader is told, and how long ago it changed."""

from __future__ import annotations

import math
from typing import Any

from adabatch.sizing import SizeRule


class SizeInForce:
    """The size of a step's batch from the next one drawn.

    Args:
        loader: its batch_size is written.
        accumulate: batches per step.
        size: to start with, in samples.
        dwell: steps between changes; the first change need not wait.

    Attributes:
        size: in samples, all accumulated passes together.
        steps_since_change: for the dwell.

    Example:
        >>> from types import SimpleNamespace
        >>> loader = SimpleNamespace(batch_size=0)
        >>> force, rule = SizeInForce(loader, accumulate=2, size=16, dwell=0), SizeRule(8, 32)
        >>> force.move(24.0, rule), force.move(float("nan"), rule), force.size, loader.batch_size, force.steps_since_change
        (True, True, 24, 12, 1)
    """

    def __init__(self, loader: Any, accumulate: int, size: int, dwell: int):
        self._loader, self._accumulate = loader, accumulate
        self.steps_since_change = dwell
        self.write(size)

    def move(self, wish: float, rule: SizeRule, interval: tuple[float, float] = (math.nan, math.nan)) -> bool:
        """Set the size that a wish leads to, and keep it without one (NaN) or while the wish's interval holds it; whether sizes to come meet the wish, as far
        as the interval tells."""
        size = self.size if math.isnan(wish) else rule.next_size(wish, self.size, self.steps_since_change, interval)
        self.steps_since_change = 0 if size != self.size else self.steps_since_change + 1
        self.write(size)
        return math.isnan(wish) or rule.is_met(wish, size) or interval[0] <= size <= interval[1]

    def write(self, size: int) -> None:
        """Set the size."""
        self.size = size
        self._loader.batch_size = size // self._accumulate
