"""Growth when a metric stalls: IncreaseBSOnPlateau."""

from __future__ import annotations

import math
from typing import SupportsFloat

from typing_extensions import Unpack

from adabatch._checks import choice, integer, positive, real
from adabatch.schedules.base import Bounds, BSScheduler, rounded
from adabatch.schedules.managers import Loader


def is_better(value: float, best: float, mode: str, threshold: float, threshold_mode: str) -> bool:
    """Whether a metric beats the best by a fraction of it ("rel") or an amount ("abs").

    Example:
        >>> is_better(0.89, 1.0, "min", 0.1, "rel"), is_better(0.95, 1.0, "min", 0.1, "abs")
        (True, False)
    """
    sign = -1.0 if mode == "min" else 1.0
    relative = threshold_mode == "rel"
    bar = best * (1.0 + sign * threshold) if relative else best + sign * threshold
    return value < bar if mode == "min" else value > bar


class IncreaseBSOnPlateau(BSScheduler):
    """Multiply the batch size by factor when a metric has not improved in over patience steps.

    Call ``step(metrics=value)``. After a change, bad steps are not counted for cooldown steps.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        mode: "min" (the metric should fall) or "max".
        factor: at least 0 and not 1; below 1 the batch shrinks.
        patience: bad steps that are tolerated, at least 0.
        threshold: greater than 0: what counts as an improvement.
        threshold_mode: "rel": best · (1 ∓ threshold); "abs": best ∓ threshold.
        cooldown: at least 0.

    Raises:
        TypeError: an argument is of the wrong type; in a step without ``metrics``.
        ValueError: an argument is out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = IncreaseBSOnPlateau(DataLoader(range(1000), batch_size=10), patience=1)
        >>> for loss in (1.0, 1.0, 1.0):
        ...     schedule.step(metrics=loss)
        >>> schedule.batch_size
        20
    """

    def __init__(
        self, dataloader: Loader | None, mode: str = "min", factor: float = 2.0,
        patience: int = 10, threshold: float = 1e-4, threshold_mode: str = "rel",
        cooldown: int = 0, **bounds: Unpack[Bounds],
    ):
        self.mode = choice("mode", mode, ("min", "max"))
        self.factor = float(real("factor", factor))
        if self.factor < 0 or self.factor == 1:
            raise ValueError(f"factor must be at least 0 and not 1, got {factor}")
        self.patience = integer("patience", patience, at_least=0)
        self.threshold = float(positive("threshold", threshold))
        self.threshold_mode = choice("threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = integer("cooldown", cooldown, at_least=0)
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = 0
        super().__init__(dataloader, **bounds)

    @property
    def in_cooldown(self) -> bool:
        """Whether bad steps are not counted for now."""
        return self.cooldown_counter > 0

    def get_new_bs(self, *, metrics: SupportsFloat | None = None, **kwargs: object) -> int:
        """The size for this step; TypeError where ``metrics`` is missing."""
        if self.last_epoch == 0:
            return self.batch_size
        if metrics is None:
            raise TypeError("IncreaseBSOnPlateau needs the metric: call step(metrics=value)")
        value = float(metrics)
        if is_better(value, self.best, self.mode, self.threshold, self.threshold_mode):
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs <= self.patience:
            return self.batch_size
        self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
        return rounded(self.batch_size * self.factor)
