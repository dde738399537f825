"""Sizes that change at set epochs: StepBS, MultiStepBS, ConstantBS.

Reference: Smith, Kindermans, Ying, Le (2018), "Don't decay the learning rate, increase the batch
size", arXiv 1711.00489.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from typing_extensions import Unpack

from adabatch._checks import integer, integers, positive
from adabatch.schedules.base import Bounds, BSScheduler, clipped, rounded
from adabatch.schedules.managers import Loader


class StepBS(BSScheduler):
    """Multiply the batch size by gamma every step_size epochs.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        step_size: epochs between changes, at least 1.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = StepBS(DataLoader(range(1000), batch_size=10), step_size=2)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        20
    """

    def __init__(
        self, dataloader: Loader | None, step_size: int, gamma: float = 2.0,
        **bounds: Unpack[Bounds],
    ):
        self.step_size = integer("step_size", step_size, at_least=1)
        self.gamma = positive("gamma", gamma)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        due = self.last_epoch and self.last_epoch % self.step_size == 0
        return rounded(self.batch_size * self.gamma if due else self.batch_size)


class MultiStepBS(BSScheduler):
    """Multiply the batch size by gamma at each milestone; by gamma^n at one named n times. Finished
    after the last one.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        milestones: epochs, each at least 1, in any order.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = MultiStepBS(DataLoader(range(1000), batch_size=10), milestones=[1, 2, 2])
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        80
    """

    def __init__(
        self, dataloader: Loader | None, milestones: Sequence[int], gamma: float = 2.0,
        **bounds: Unpack[Bounds],
    ):
        self.milestones = dict(Counter(integers("milestones", milestones, at_least=1)))
        self.gamma = positive("gamma", gamma)
        super().__init__(dataloader, **bounds)

    @property
    def finished(self) -> bool:
        """Whether a size exceeded a bound, or the last milestone has passed."""
        return self._finished or self.last_epoch > max(self.milestones)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * self.gamma ** self.milestones.get(self.last_epoch, 0))


class ConstantBS(BSScheduler):
    """Multiply the batch size by factor at the start, and by 1/factor at the milestone, which
    finishes the schedule. The factor is clipped, once, so that the first size is within bounds.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        factor: greater than 0.
        milestone: the epoch at which the first size ends, at least 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = ConstantBS(DataLoader(range(1000), batch_size=10), factor=5, milestone=1)
        >>> schedule.batch_size
        50
        >>> schedule.step()
        >>> schedule.batch_size, schedule.finished
        (10, True)
    """

    def __init__(
        self, dataloader: Loader | None, factor: float, milestone: int = 5,
        **bounds: Unpack[Bounds],
    ):
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
