"""Cosine curves between the base and the maximal size: CosineAnnealingBS, CosineAnnealingBSWithWarmRestarts.

Reference: Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv 1608.03983, turned upside down: sizes grow where lrs fall.
"""

import math
from typing import Any

from torch.utils.data import DataLoader

from adabatch._checks import integer
from adabatch.schedules.base import BSScheduler, clipped, rounded


def base_below_maximum(schedule: BSScheduler, base_batch_size: int | None, at_least: int) -> int:
    """The base size, checked to be at least ``at_least``, or else the size at the start; checked to lie below a known ``max_batch_size``.

    Raises:
        TypeError: the base is no integer.
        ValueError: it is out of range, or there is no upper bound.

    Example:
        >>> from adabatch.schedules import VirtualBatchSize, StepBS
        >>> base_below_maximum(StepBS(None, 1, batch_size_manager=VirtualBatchSize(8), max_batch_size=64), None, at_least=1)
        8
    """
    base = schedule.batch_size_manager._base_batch_size if base_batch_size is None else integer("base_batch_size", base_batch_size, at_least)
    if math.isinf(schedule.max_batch_size):
        raise ValueError(f"{type(schedule).__name__} needs max_batch_size: the length of the data set is not known.")
    if not base < schedule.max_batch_size:
        raise ValueError(f"base_batch_size must be below max_batch_size ({schedule.max_batch_size}), got {base}.")
    return base


def cosine_next(epoch: int, unrounded: float, batch_size: int, base: int, top: int, total_iters: int) -> float:
    """The cosine from base (epoch 0) to top (total_iters) and back, as a recursion on the size before, for epoch >= 1.

    size(epoch) = top + (size(epoch - 1) - top) · (1 + cos(π epoch / total_iters)) / (1 + cos(π (epoch - 1) / total_iters)); just past the top, where
    that is 0/0, the first step down is taken from the size in use.

    Example:
        >>> round(cosine_next(1, 10, 10, 10, 100, 2), 9)
        55.0
    """
    if (epoch - 1 - total_iters) % (2 * total_iters) == 0:
        return batch_size + (base - top) * (1 - math.cos(math.pi / total_iters)) / 2
    ratio = (1 + math.cos(math.pi * epoch / total_iters)) / (1 + math.cos(math.pi * (epoch - 1) / total_iters))
    return ratio * (unrounded - top) + top


class CosineAnnealingBS(BSScheduler):
    """Move the batch size from base to max_batch_size along half a cosine in total_iters epochs, back in as many, and so on.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        total_iters: epochs from the base to the top, at least 2.
        base_batch_size: lower end of the curve, in samples, at least min_batch_size; None: the size at the start.

    Raises:
        TypeError: an argument is no integer.
        ValueError: total_iters is below 2, or base_batch_size not in [min_batch_size, max_batch_size), or the length of the data set unknown.

    Example:
        >>> schedule = CosineAnnealingBS(DataLoader(range(1000), batch_size=10), total_iters=2, max_batch_size=100)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        100
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        total_iters: int,
        base_batch_size: int | None = None,
        **bounds: Any,
    ):
        self.total_iters = integer("total_iters", total_iters, at_least=2)
        self.base_batch_size = base_batch_size
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        self.base_batch_size = base_below_maximum(self, self.base_batch_size, at_least=self.min_batch_size)
        self._float_batch_size = self.base_batch_size

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        self._float_batch_size = cosine_next(
            self.last_epoch, self._float_batch_size, self.batch_size, self.base_batch_size, self.max_batch_size, self.total_iters
        )
        return clipped(rounded(self._float_batch_size), self.base_batch_size, self.max_batch_size)


class CosineAnnealingBSWithWarmRestarts(BSScheduler):
    """Grow the batch size from base to max_batch_size along half a cosine in t_i epochs, restart from the base, with t_i · factor epochs.

    batch_size(t) = round(base + (max - base) · (1 - cos(π t / t_i)) / 2) for t = 0 ... t_i, both ends included.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        t_0: the first t_i, at least 1.
        base_batch_size: lower end of the curve, in samples, at least min_batch_size; None: the size at the start.
        factor: what t_i is multiplied by at each restart, at least 1.

    Raises:
        TypeError: an argument is no integer.
        ValueError: t_0 or factor is below 1, or base_batch_size not in [min_batch_size, max_batch_size), or the length of the data set unknown.

    Example:
        >>> schedule = CosineAnnealingBSWithWarmRestarts(DataLoader(range(1000), batch_size=10), t_0=2, max_batch_size=100)
        >>> sizes = []
        >>> for _ in range(4):
        ...     sizes.append(schedule.batch_size)
        ...     schedule.step()
        >>> sizes
        [10, 55, 100, 10]
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        t_0: int,
        base_batch_size: int | None = None,
        factor: int = 1,
        **bounds: Any,
    ):
        self.t_0 = self.t_i = integer("t_0", t_0, at_least=1)
        self.t_cur = 0
        self.factor = integer("factor", factor, at_least=1)
        self.base_batch_size = base_batch_size
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        self.base_batch_size = base_below_maximum(self, self.base_batch_size, at_least=self.min_batch_size)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        self.t_cur += 1
        if self.t_cur > self.t_i:
            self.t_cur = 0
            self.t_i *= self.factor
        span = self.max_batch_size - self.base_batch_size
        new_bs = self.base_batch_size + span * (1 + math.cos(math.pi + math.pi * self.t_cur / self.t_i)) / 2
        return clipped(rounded(new_bs), self.base_batch_size, self.max_batch_size)
