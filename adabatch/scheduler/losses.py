"""The loss of a batch from those of its micro-batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adabatch._transfers import is_remote
from adabatch.scheduler.arguments import check_scalar, scalar_loss


class LossPool:
    """Pools the losses of a batch's micro-batches: Σ m_j l_j / m for means over them, Σ l_j for sums.

    A loop that reports one loss only, on the last micro-batch, is taken to report the batch's own.

    Args:
        loader: its micro_batches are looked at, if it has any.
        summed: the losses are sums over the samples.

    Example:
        >>> LossPool(loader=None, summed=False).pool(0.5)
        0.5
    """

    def __init__(self, loader: Any, summed: bool):
        self._micro, self._summed = getattr(loader, "micro_batches", None), summed
        self._attempt, self._calls = -1, 0
        self._total: Tensor | float = 0.0

    def pool(self, loss: Tensor | float) -> Tensor | float | None:
        """Take one loss; the batch's, or None while micro-batches of it are to come. One on an accelerator is not read: the result is a tensor there.

        Raises:
            ValueError, TypeError: not a scalar.
        """
        micro = self._micro
        if micro is None or micro.count == 1:
            return _taken(loss)
        if self._attempt != micro.attempt:
            self._attempt, self._total, self._calls = micro.attempt, 0.0, 0
        self._calls += 1
        self._total = self._total + _taken(loss) * (1 if self._summed or self._is_only(micro) else micro.size)
        if not micro.is_last:
            return None
        return self._total if self._summed or self._is_only(micro) else self._total / micro.batch_size

    def _is_only(self, micro: Any) -> bool:
        return micro.is_last and self._calls == 1


def _taken(loss: Tensor | float) -> Tensor | float:
    if not is_remote(loss):
        return scalar_loss(loss)
    check_scalar(loss)
    return loss.detach().reshape(()).clone()  # it may be overwritten before it is read, by a compiled step for instance
