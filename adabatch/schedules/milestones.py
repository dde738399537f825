"""Sizes that change at set epochs: StepBS, MultiStepBS, ConstantBS.

Reference: Smith, Kindermans, Ying, Le, "Don't Decay the Learning Rate, Increase the Batch Size", 2018, arXiv 1711.00489.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from adabatch._checks import integer, integers, real
from adabatch.schedules.base import BSScheduler, clipped, rounded


def every(epoch: int, batch_size: int, step_size: int, gamma: float) -> float:
    """batch_size · gamma at every multiple of step_size but 0, else batch_size.

    Example:
        >>> [every(epoch, 10, 2, 3.0) for epoch in range(4)]
        [10, 10, 30.0, 10]
    """
    return batch_size * gamma if epoch and epoch % step_size == 0 else batch_size


class StepBS(BSScheduler):
    """Multiply the batch size by gamma every step_size epochs.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        step_size: epochs between changes, at least 1.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: step_size is no positive integer, or gamma no positive number.

    Example:
        >>> schedule = StepBS(DataLoader(range(1000), batch_size=10), step_size=2)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        20
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        step_size: int,
        gamma: float = 2.0,
        **bounds: Any,
    ):
        self.step_size = integer("step_size", step_size, at_least=1)
        self.gamma = real("gamma", gamma, above=0)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(every(self.last_epoch, self.batch_size, self.step_size, self.gamma))


class MultiStepBS(BSScheduler):
    """Multiply the batch size by gamma at each milestone; by gamma^n at one named n times. Finished after the last one.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        milestones: epochs, each at least 1, in any order.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: milestones is no filled list or tuple of positive integers, or gamma no positive number.

    Example:
        >>> schedule = MultiStepBS(DataLoader(range(1000), batch_size=10), milestones=[1, 2, 2])
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        80
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        milestones: Sequence[int],
        gamma: float = 2.0,
        **bounds: Any,
    ):
        self.milestones = dict(Counter(integers("milestones", milestones, at_least=1)))
        self.gamma = real("gamma", gamma, above=0)
        super().__init__(dataloader, **bounds)

    @property
    def finished(self) -> bool:
        """Whether a size exceeded a bound, or the last milestone lies behind."""
        return self._finished or self.last_epoch > max(self.milestones)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * self.gamma ** self.milestones.get(self.last_epoch, 0))


class ConstantBS(BSScheduler):
    """Multiply the batch size by factor at the start, and by 1/factor at the milestone, which finishes the schedule.

    The factor is clipped, once, so that the first size is within bounds.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        factor: greater than 0.
        milestone: the epoch at which the first size ends, at least 1.

    Raises:
        TypeError, ValueError: factor is no positive number, or milestone no positive integer.

    Example:
        >>> schedule = ConstantBS(DataLoader(range(1000), batch_size=10), factor=5, milestone=1)
        >>> schedule.batch_size
        50
        >>> schedule.step()
        >>> schedule.batch_size, schedule.finished
        (10, True)
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        factor: float,
        milestone: int = 5,
        **bounds: Any,
    ):
        self.factor = real("factor", factor, above=0)
        self.milestone = integer("milestone", milestone, at_least=1)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            self.factor = clipped(self.factor, self.min_batch_size / self.batch_size, self.max_batch_size / self.batch_size)
            return rounded(self.batch_size * self.factor)
        if self.last_epoch == self.milestone:
            self._finished = True
            return rounded(self.batch_size * (1.0 / self.factor))
        return self.batch_size
