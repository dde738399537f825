"""Cosine curves from the base to the largest size: CosineAnnealingBS, with and without restarts.

Reference: Loshchilov, Hutter (2017), "SGDR: Stochastic gradient descent with warm restarts",
arXiv 1608.03983, upside down: sizes grow where lrs fall.
"""

from __future__ import annotations

import math

from typing_extensions import Unpack

from adabatch._checks import integer
from adabatch.schedules.base import UNBOUNDED, Bounds, BSScheduler, clipped, rounded
from adabatch.schedules.managers import Loader


def base_below_maximum(schedule: BSScheduler, base_batch_size: int | None, at_least: int) -> int:
    """The base size, at least ``at_least``, or else the first size; below a known maximum."""
    base = schedule.batch_size_manager.base_batch_size
    if base_batch_size is not None:
        base = integer("base_batch_size", base_batch_size, at_least)
    if schedule.max_batch_size == UNBOUNDED:
        raise ValueError(f"{type(schedule).__name__} needs max_batch_size, as the length of the "
                         "data set is unknown")
    if not base < schedule.max_batch_size:
        raise ValueError("base_batch_size must be below max_batch_size "
                         f"({schedule.max_batch_size}), got {base}")
    return base


def cosine_next(
    epoch: int, unrounded: float, batch_size: int, base: int, top: int, total_iters: int
) -> float:
    """The cosine from base (epoch 0) to top (total_iters) and back, for epoch >= 1:
    size(epoch) = top + (size(epoch - 1) - top) · (1 + cos(π epoch / total_iters))
    / (1 + cos(π (epoch - 1) / total_iters)). Just past the top, where that is 0/0, the first step
    down starts from the size in use.

    Example:
        >>> round(cosine_next(1, 10, 10, 10, 100, 2), 9)
        55.0
    """
    angle = math.pi / total_iters
    if (epoch - 1 - total_iters) % (2 * total_iters) == 0:
        return batch_size + (base - top) * (1 - math.cos(angle)) / 2
    ratio = (1 + math.cos(math.pi * epoch / total_iters)) / (
        1 + math.cos(math.pi * (epoch - 1) / total_iters)
    )
    return ratio * (unrounded - top) + top


class CosineAnnealingBS(BSScheduler):
    """Move the batch size from base to max_batch_size along half a cosine in total_iters epochs,
    back in as many, and so on.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        total_iters: epochs from the base to the top, at least 2.
        base_batch_size: lower end of the curve, in samples, at least min_batch_size; None: the
            first size.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: total_iters is below 2, base_batch_size is not in
            [min_batch_size, max_batch_size), or there is no upper bound.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = CosineAnnealingBS(loader, total_iters=2, max_batch_size=100)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        100
    """

    def __init__(
        self, dataloader: Loader | None, total_iters: int, base_batch_size: int | None = None,
        **bounds: Unpack[Bounds],
    ):
        self.total_iters = integer("total_iters", total_iters, at_least=2)
        self._given_base = base_batch_size
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        self.base_batch_size = base_below_maximum(self, self._given_base, self.min_batch_size)
        self._unrounded: float = self.base_batch_size

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        base, top = self.base_batch_size, self.max_batch_size
        self._unrounded = cosine_next(
            self.last_epoch, self._unrounded, self.batch_size, base, top, self.total_iters
        )
        return clipped(rounded(self._unrounded), base, top)


class CosineAnnealingBSWithWarmRestarts(BSScheduler):
    """Grow the batch size from base to max_batch_size along half a cosine in t_i epochs, then
    restart from the base with t_i · factor epochs.

    batch_size(t) = round(base + (max - base) · (1 - cos(π t / t_i)) / 2), t = 0 ... t_i, both ends
    included.

    Args:
        dataloader, base_batch_size, **bounds: see :class:`CosineAnnealingBS`.
        t_0: the first t_i, at least 1.
        factor: multiplies t_i at each restart, at least 1.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: t_0 or factor is below 1; otherwise as in :class:`CosineAnnealingBS`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = CosineAnnealingBSWithWarmRestarts(loader, t_0=2, max_batch_size=100)
        >>> sizes = []
        >>> for _ in range(4):
        ...     sizes.append(schedule.batch_size)
        ...     schedule.step()
        >>> sizes
        [10, 55, 100, 10]
    """

    def __init__(
        self, dataloader: Loader | None, t_0: int, base_batch_size: int | None = None,
        factor: int = 1, **bounds: Unpack[Bounds],
    ):
        self.t_0 = self.t_i = integer("t_0", t_0, at_least=1)
        self.t_cur = 0
        self.factor = integer("factor", factor, at_least=1)
        self._given_base = base_batch_size
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        self.base_batch_size = base_below_maximum(self, self._given_base, self.min_batch_size)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        self.t_cur += 1
        if self.t_cur > self.t_i:
            self.t_cur = 0
            self.t_i *= self.factor
        base, top = self.base_batch_size, self.max_batch_size
        rise = (1 + math.cos(math.pi + math.pi * self.t_cur / self.t_i)) / 2
        return clipped(rounded(base + (top - base) * rise), base, top)
