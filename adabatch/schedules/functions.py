"""Batch sizes from a function of the user's: LambdaBS and MultiplicativeBS."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from adabatch._checks import function
from adabatch.schedules.base import BSScheduler, callable_state, rounded


class LambdaBS(BSScheduler):
    """batch_size(epoch) = round(base · bs_lambda(epoch)), base being the size at the start.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        bs_lambda: epoch -> factor. If it is an object, its plain attributes are saved with the state; a function is not.

    Raises:
        TypeError: ``bs_lambda`` is not callable.
        ValueError, OverflowError: in a step whose factor is not finite.

    Example:
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = LambdaBS(loader, lambda epoch: 1 + 0.5 * epoch)
        >>> schedule.step()
        >>> schedule.batch_size
        15
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        bs_lambda: Callable[[int], float],
        **bounds: Any,
    ):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size_manager._base_batch_size * self.bs_lambda(self.last_epoch))

    def state_dict(self) -> dict:
        return super().state_dict() | {"bs_lambda": callable_state(self.bs_lambda)}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        restore_callable(self.bs_lambda, state_dict["bs_lambda"])


class MultiplicativeBS(BSScheduler):
    """batch_size(epoch) = round(batch_size(epoch - 1) · bs_lambda(epoch)); the zeroth factor applies to the size at the start.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        bs_lambda: epoch -> factor. If it is an object, its plain attributes are saved with the state; a function is not.

    Raises:
        TypeError: ``bs_lambda`` is not callable.
        ValueError, OverflowError: in a step whose factor is not finite.

    Example:
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = MultiplicativeBS(loader, lambda epoch: 2 if epoch else 1)
        >>> schedule.step()
        >>> schedule.batch_size
        20
    """

    def __init__(
        self,
        dataloader: DataLoader | None,
        bs_lambda: Callable[[int], float],
        **bounds: Any,
    ):
        self.bs_lambda = function("bs_lambda", bs_lambda)
        super().__init__(dataloader, **bounds)

    def get_new_bs(self) -> int:
        return rounded(self.batch_size * self.bs_lambda(self.last_epoch))

    def state_dict(self) -> dict:
        return super().state_dict() | {"bs_lambda": callable_state(self.bs_lambda)}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        restore_callable(self.bs_lambda, state_dict["bs_lambda"])


def restore_callable(call: Callable | None, state: dict) -> None:
    """Write saved attributes back into a callable object.

    Example:
        >>> restore_callable(abs, {})
    """
    if state:
        vars(call).update(state)
