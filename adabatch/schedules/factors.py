"""Sizes multiplied by factors: a function's, at set epochs, along a curve, or when a metric stalls.

LinearBS and PolynomialBS multiply the size in use, already rounded, by the ratio of two points of a
curve: sizes set by others are kept, rounding adds up.

Reference: Smith, Kindermans, Ying, Le (2018), "Don't decay the learning rate, increase the batch
size", arXiv 1711.00489.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import SupportsFloat

from typing_extensions import Unpack

from adabatch._checks import choice, function, integer, integers, positive, real, returned
from adabatch.schedules.base import Bounds, BSScheduler, clipped, rounded
from adabatch.schedules.managers import Loader


class LambdaBS(BSScheduler):
    """batch_size(epoch) = round(base · bs_lambda(epoch)), base being the first size. A state holds
    the plain attributes of a callable object, but no function.

    Raises:
        ValueError, OverflowError: in a step whose factor is not finite.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = LambdaBS(DataLoader(range(1000), batch_size=10), lambda epoch: 1 + epoch / 2)
        >>> [schedule.step() or schedule.batch_size for _ in range(3)]
        [15, 20, 25]
    """

    callables = ("bs_lambda",)

    def __init__(self, dataloader: Loader | None, bs_lambda: Callable[[int], float],
                 **bounds: Unpack[Bounds]):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        factor = returned("bs_lambda", self.bs_lambda(self.last_epoch))
        return rounded(self.batch_size_manager.base_batch_size * factor)


class MultiplicativeBS(BSScheduler):
    """batch_size(epoch) = round(batch_size(epoch - 1) · bs_lambda(epoch)); the zeroth factor
    applies to the first size. Arguments and errors as in :class:`LambdaBS`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = MultiplicativeBS(DataLoader(range(1000), batch_size=10), lambda epoch: 2)
        >>> [schedule.step() or schedule.batch_size for _ in range(2)]
        [40, 80]
    """

    callables = ("bs_lambda",)

    def __init__(self, dataloader: Loader | None, bs_lambda: Callable[[int], float],
                 **bounds: Unpack[Bounds]):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * returned("bs_lambda", self.bs_lambda(self.last_epoch)))


class StepBS(BSScheduler):
    """Multiply the batch size by gamma > 0 every step_size epochs; below 1 the batch shrinks.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = StepBS(DataLoader(range(1000), batch_size=10), step_size=2)
        >>> [schedule.step() or schedule.batch_size for _ in range(4)]
        [10, 20, 20, 40]
    """

    def __init__(self, dataloader: Loader | None, step_size: int, gamma: float = 2.0,
                 **bounds: Unpack[Bounds]):
        self.step_size = integer("step_size", step_size, at_least=1)
        self.gamma = positive("gamma", gamma)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        due = self.last_epoch and self.last_epoch % self.step_size == 0
        return rounded(self.batch_size * self.gamma if due else self.batch_size)


class MultiStepBS(BSScheduler):
    """Multiply the batch size by gamma > 0 at each milestone (an epoch from 1 on, in any order); by
    gamma^n at one named n times. Finished after the last one.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = MultiStepBS(DataLoader(range(1000), batch_size=10), milestones=[1, 2, 2])
        >>> [schedule.step() or schedule.batch_size for _ in range(3)]
        [20, 80, 80]
    """

    def __init__(self, dataloader: Loader | None, milestones: Sequence[int], gamma: float = 2.0,
                 **bounds: Unpack[Bounds]):
        self.milestones = dict(Counter(integers("milestones", milestones, at_least=1)))
        self.gamma = positive("gamma", gamma)
        super().__init__(dataloader, **bounds)

    def _shown(self, name: str) -> str:
        counts = Counter(self.milestones)
        return repr(sorted(counts.elements())) if name == "milestones" else super()._shown(name)

    @property
    def finished(self) -> bool:
        """Whether a size exceeded a bound, or the last milestone has passed."""
        return self._finished or self.last_epoch > max(self.milestones)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * self.gamma ** self.milestones.get(self.last_epoch, 0))


class ConstantBS(BSScheduler):
    """Multiply the batch size by factor > 0 at the start, and by 1/factor at the epoch milestone,
    which finishes the schedule. The factor is clipped, once, so that the first size is in bounds.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = ConstantBS(DataLoader(range(1000), batch_size=10), factor=5, milestone=1)
        >>> schedule.batch_size, schedule.step(), schedule.batch_size, schedule.finished
        (50, None, 10, True)
    """

    def __init__(self, dataloader: Loader | None, factor: float, milestone: int = 5,
                 **bounds: Unpack[Bounds]):
        self.factor = positive("factor", factor)
        self.milestone = integer("milestone", milestone, at_least=1)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        size = self.batch_size
        if self.last_epoch == 0:
            low, high = self.min_batch_size / size, self.max_batch_size / size
            self.factor = clipped(self.factor, low, high)
            return rounded(size * self.factor)
        if self.last_epoch == self.milestone:
            self._finished = True
            return rounded(size * (1.0 / self.factor))
        return size


class LinearBS(BSScheduler):
    """Multiply the batch size by a factor on a straight line from start_factor to end_factor,
    reached at the epoch milestone; finished one epoch after it.

    f(epoch) = start_factor + (end_factor - start_factor) · epoch / milestone;
    batch_size(epoch) = round(batch_size(epoch - 1) · f(epoch) / f(epoch - 1)).

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = LinearBS(DataLoader(range(1000), batch_size=10), start_factor=6.0)
        >>> schedule.batch_size, schedule.step(), schedule.batch_size
        (60, None, 50)
    """

    def __init__(self, dataloader: Loader | None, start_factor: float = 3.0,
                 end_factor: float = 1.0, milestone: int = 5, **bounds: Unpack[Bounds]):
        self.start_factor = positive("start_factor", start_factor)
        self.end_factor = positive("end_factor", end_factor)
        self.milestone = integer("milestone", milestone, at_least=1)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        epoch, start = self.last_epoch, self.start_factor
        if epoch > self.milestone:
            self._finished = True
            return self.batch_size
        if epoch == 0:
            return rounded(self.batch_size * start)
        rise = self.end_factor - start
        ratio = 1.0 + rise / (self.milestone * start + (epoch - 1) * rise)
        return rounded(self.batch_size * ratio)


class ExponentialBS(BSScheduler):
    """Multiply the batch size by gamma > 0 every epoch: round(base · gamma^epoch). The unrounded
    size is kept, so that rounding does not add up; a size set by others replaces it.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = ExponentialBS(DataLoader(range(1000), batch_size=10), gamma=1.1)
        >>> [schedule.step() or schedule.batch_size for _ in range(3)]
        [11, 12, 13]
    """

    def __init__(self, dataloader: Loader | None, gamma: float, **bounds: Unpack[Bounds]):
        self.gamma = positive("gamma", gamma)
        self.float_bs: float | None = None
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        unrounded = self.float_bs
        if unrounded is None or rounded(unrounded) != self.batch_size:
            unrounded = self.batch_size
        self.float_bs = unrounded * self.gamma
        return rounded(self.float_bs)


class PolynomialBS(BSScheduler):
    """Multiply the batch size by 2 - (epoch / (epoch + 1))^power at each epoch from 1 to
    total_iters - 1; then finished. Negative powers shrink the batch. (The comment in bs-scheduler's
    example gives other sizes than its code; these are the code's.)

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = PolynomialBS(DataLoader(range(1000), batch_size=10), total_iters=5)
        >>> [schedule.step() or schedule.batch_size for _ in range(3)]
        [15, 20, 25]
    """

    def __init__(self, dataloader: Loader | None, total_iters: int, power: float = 1.0,
                 **bounds: Unpack[Bounds]):
        self.total_iters = integer("total_iters", total_iters, at_least=2)
        self.power = real("power", power)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        epoch, total = self.last_epoch, self.total_iters
        if epoch == 0:
            return self.batch_size
        if epoch >= total:
            self._finished = True
            return self.batch_size
        # epoch / (epoch + 1), in bs-scheduler's rounding
        fraction = (1.0 - (total - epoch) / total) / (1.0 - (total - epoch - 1) / total)
        return rounded(self.batch_size * (2.0 - fraction**self.power))


class IncreaseBSOnPlateau(BSScheduler):
    """Multiply the batch size by factor when a metric has not improved in over patience steps.

    Call ``step(metrics=value)``; without ``metrics`` it is a TypeError. After a change, bad steps
    are not counted for cooldown steps.

    Args:
        mode: "min" (the metric should fall) or "max".
        factor: at least 0 and not 1; below 1 the batch shrinks.
        patience: bad steps that are tolerated.
        threshold, threshold_mode: an improvement is beyond best · (1 ∓ threshold) for "rel", best ∓
            threshold for "abs".

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = IncreaseBSOnPlateau(DataLoader(range(1000), batch_size=10), patience=1)
        >>> [schedule.step(metrics=loss) or schedule.batch_size for loss in (1.0, 1.0, 1.0)]
        [10, 10, 20]
    """

    def __init__(self, dataloader: Loader | None, mode: str = "min", factor: float = 2.0,
                 patience: int = 10, threshold: float = 1e-4, threshold_mode: str = "rel",
                 cooldown: int = 0, **bounds: Unpack[Bounds]):
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
        if self.last_epoch == 0:
            return self.batch_size
        if metrics is None:
            raise TypeError("IncreaseBSOnPlateau needs the metric: call step(metrics=value)")
        value = float(metrics)
        if self._is_better(value):
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

    def _is_better(self, value: float) -> bool:
        change = -self.threshold if self.mode == "min" else self.threshold
        bar = self.best * (1.0 + change) if self.threshold_mode == "rel" else self.best + change
        return value < bar if self.mode == "min" else value > bar
