"""Batch sizes from a function of the user's: LambdaBS and MultiplicativeBS."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import Unpack

from adabatch._checks import function
from adabatch.schedules.base import Bounds, BSScheduler, rounded
from adabatch.schedules.managers import Loader


class LambdaBS(BSScheduler):
    """batch_size(epoch) = round(base · bs_lambda(epoch)), base being the first size.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        bs_lambda: epoch -> factor. The state holds the plain attributes of an object, but no
            function.

    Raises:
        TypeError: ``bs_lambda`` is not callable.
        ValueError, OverflowError: in a step whose factor is not finite.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> schedule = LambdaBS(DataLoader(range(1000), batch_size=10), lambda epoch: 1 + epoch / 2)
        >>> schedule.step()
        >>> schedule.batch_size
        15
    """

    callables = ("bs_lambda",)

    def __init__(
        self, dataloader: Loader | None, bs_lambda: Callable[[int], float],
        **bounds: Unpack[Bounds],
    ):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size_manager.base_batch_size * self.bs_lambda(self.last_epoch))


class MultiplicativeBS(BSScheduler):
    """batch_size(epoch) = round(batch_size(epoch - 1) · bs_lambda(epoch)); the zeroth factor
    applies to the first size. Arguments and errors as in :class:`LambdaBS`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = MultiplicativeBS(loader, lambda epoch: 2 if epoch else 1)
        >>> schedule.step()
        >>> schedule.batch_size
        20
    """

    callables = ("bs_lambda",)

    def __init__(
        self, dataloader: Loader | None, bs_lambda: Callable[[int], float],
        **bounds: Unpack[Bounds],
    ):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * self.bs_lambda(self.last_epoch))
