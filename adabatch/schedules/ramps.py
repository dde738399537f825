"""Smooth growth by small factors: LinearBS, ExponentialBS, PolynomialBS.

LinearBS and PolynomialBS multiply the size in use, already rounded, by the ratio of two points of a curve: sizes set by others are kept, rounding adds up.
"""

from typing import Any

from torch.utils.data import DataLoader

from adabatch._checks import integer, real
from adabatch.schedules.base import BSScheduler, rounded


def linear_ratio(epoch: int, start_factor: float, end_factor: float, milestone: int) -> float:
    """What takes the line from start_factor (epoch 0) to end_factor (milestone) from one epoch to the next; start_factor itself at epoch 0.

    Example:
        >>> linear_ratio(0, 6.0, 1.0, 5), linear_ratio(1, 6.0, 1.0, 5) * 6
        (6.0, 5.0)
    """
    if epoch == 0:
        return start_factor
    rise = end_factor - start_factor
    return 1.0 + rise / (milestone * start_factor + (epoch - 1) * rise)


class LinearBS(BSScheduler):
    """Multiply the batch size by a factor that goes in a straight line from start_factor to end_factor, reached at the milestone.

    f(epoch) = start_factor + (end_factor - start_factor) · epoch / milestone;
    batch_size(epoch) = round(batch_size(epoch - 1) · f(epoch) / f(epoch - 1)). Finished one epoch after the milestone.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        start_factor, end_factor: greater than 0.
        milestone: the epoch at which end_factor is reached, at least 1.

    Raises:
        TypeError, ValueError: a factor is no positive number, or milestone no positive integer.

    Example:
        >>> schedule = LinearBS(DataLoader(range(1000), batch_size=10), start_factor=6.0)
        >>> schedule.batch_size
        60
        >>> schedule.step()
        >>> schedule.batch_size
        50
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        start_factor: float = 3.0,
        end_factor: float = 1.0,
        milestone: int = 5,
        **bounds: Any,
    ):
        self.start_factor = real("start_factor", start_factor, above=0)
        self.end_factor = real("end_factor", end_factor, above=0)
        self.milestone = integer("milestone", milestone, at_least=1)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch > self.milestone:
            self._finished = True
            return self.batch_size
        return rounded(self.batch_size * linear_ratio(self.last_epoch, self.start_factor, self.end_factor, self.milestone))


class ExponentialBS(BSScheduler):
    """Multiply the batch size by gamma every epoch: batch_size(epoch) = round(base · gamma^epoch).

    The unrounded size is carried along, so that rounding does not add up; a size set by others replaces it.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: gamma is no positive number.

    Example:
        >>> schedule = ExponentialBS(DataLoader(range(1000), batch_size=10), gamma=1.1)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        12
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        gamma: float,
        **bounds: Any,
    ):
        self.gamma = real("gamma", gamma, above=0)
        self.float_bs = None
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        unrounded = self.float_bs
        if unrounded is None or rounded(unrounded) != self.batch_size:
            unrounded = self.batch_size
        self.float_bs = unrounded * self.gamma
        return rounded(self.float_bs)


def polynomial_ratio(epoch: int, total_iters: int, power: float) -> float:
    """2 - (epoch / (epoch + 1))^power, for epochs from 1 to total_iters - 1, worked out as fractions of total_iters.

    Example:
        >>> round(polynomial_ratio(1, 5, 1.0), 12)
        1.5
    """
    remaining = total_iters - epoch
    return 2.0 - ((1.0 - remaining / total_iters) / (1.0 - (remaining - 1) / total_iters)) ** power


class PolynomialBS(BSScheduler):
    """Multiply the batch size by 2 - (epoch / (epoch + 1))^power at each epoch from 1 to total_iters - 1; then finished.

    The factor falls from 2 - 0.5^power towards 1. (The comment in bs-scheduler's example gives other sizes than its code; this is the code's.)

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        total_iters: the epoch at which the schedule ends, at least 2.
        power: any number; negative powers shrink the batch.

    Raises:
        TypeError, ValueError: total_iters is no integer of at least 2, or power no number.

    Example:
        >>> schedule = PolynomialBS(DataLoader(range(1000), batch_size=10), total_iters=5)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        20
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        total_iters: int,
        power: float = 1.0,
        **bounds: Any,
    ):
        self.total_iters = integer("total_iters", total_iters, at_least=2)
        self.power = real("power", power)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        if self.last_epoch >= self.total_iters:
            self._finished = True
            return self.batch_size
        return rounded(self.batch_size * polynomial_ratio(self.last_epoch, self.total_iters, self.power))
