"""The batch size in force: what the loader is told, and how long ago it changed."""

from __future__ import annotations

import math
from typing import Any

from adabatch.scheduler.sizing import SizeRule


class CurrentBatchSize:
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
        >>> force, rule = CurrentBatchSize(loader, accumulate=2, size=16, dwell=0), SizeRule(8, 32)
        >>> force.move(24.0, rule), force.move(float("nan"), rule), force.size, loader.batch_size, force.steps_since_change
        (True, True, 24, 12, 1)
    """

    def __init__(self, loader: Any, accumulate: int, size: int, dwell: int):
        self._loader, self._accumulate = loader, accumulate
        self.steps_since_change = dwell
        self.write(size)

    def move(self, proposal: float, rule: SizeRule) -> bool:
        """Set the size that a proposal leads to, and keep it without one (NaN); whether sizes to come meet the proposal."""
        size = self.size if math.isnan(proposal) else rule.next_size(proposal, self.size, self.steps_since_change)
        self.steps_since_change = 0 if size != self.size else self.steps_since_change + 1
        self.write(size)
        return math.isnan(proposal) or rule.is_met(proposal, size)

    def write(self, size: int) -> None:
        """Set the size."""
        self.size = size
        self._loader.batch_size = size // self._accumulate
