"""Smooth growth by small factors: LinearBS, ExponentialBS, PolynomialBS.

LinearBS and PolynomialBS multiply the size in use, already rounded, by the ratio of two points of a
curve: sizes set by others are kept, rounding adds up.
"""

from __future__ import annotations

from typing_extensions import Unpack

from adabatch._checks import integer, positive, real
from adabatch.schedules.base import Bounds, BSScheduler, rounded
from adabatch.schedules.managers import Loader


class LinearBS(BSScheduler):
    """Multiply the batch size by a factor on a straight line from start_factor to end_factor,
    reached at the milestone.

    f(epoch) = start_factor + (end_factor - start_factor) · epoch / milestone;
    batch_size(epoch) = round(batch_size(epoch - 1) · f(epoch) / f(epoch - 1)). Finished one epoch
    after the milestone.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        start_factor, end_factor: greater than 0.
        milestone: the epoch at which end_factor is reached, at least 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = LinearBS(DataLoader(range(1000), batch_size=10), start_factor=6.0)
        >>> schedule.batch_size
        60
        >>> schedule.step()
        >>> schedule.batch_size
        50
    """

    def __init__(
        self, dataloader: Loader | None, start_factor: float = 3.0, end_factor: float = 1.0,
        milestone: int = 5, **bounds: Unpack[Bounds],
    ):
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
    """Multiply the batch size by gamma every epoch: batch_size(epoch) = round(base · gamma^epoch).

    The unrounded size is carried along, so that rounding does not add up; a size set by others
    replaces it.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        gamma: factor, greater than 0; below 1 the batch shrinks.

    Raises:
        TypeError, ValueError: gamma is not a positive number.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = ExponentialBS(DataLoader(range(1000), batch_size=10), gamma=1.1)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        12
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
    total_iters - 1; then finished.

    The factor falls from 2 - 0.5^power towards 1. (The comment in bs-scheduler's example gives
    other sizes than its code; these are the code's.)

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        total_iters: the epoch at which the schedule ends, at least 2.
        power: any number; negative powers shrink the batch.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = PolynomialBS(DataLoader(range(1000), batch_size=10), total_iters=5)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        20
    """

    def __init__(
        self, dataloader: Loader | None, total_iters: int, power: float = 1.0,
        **bounds: Unpack[Bounds],
    ):
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
