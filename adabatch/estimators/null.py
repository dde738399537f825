"""NullEstimator: what stands where an estimator would, for controllers that need no moments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adabatch.interfaces import Estimator, PendingMoments


class NullEstimator(Estimator):
    """Measures nothing, and puts nothing on the model.

    Args:
        accumulate: backward passes per optimizer step in a user's own gradient accumulation.
        loss_reduction: 'mean' or 'sum', of the loss that is differentiated.

    Example:
        >>> estimator = NullEstimator()
        >>> estimator.enabled = True
        >>> estimator.enabled
        False
    """

    def __init__(self, accumulate: int = 1, loss_reduction: str = "mean"):
        self.accumulate, self.loss_reduction = accumulate, loss_reduction

    @property
    def enabled(self) -> bool:
        """False, whatever it is set to."""
        return False

    @enabled.setter
    def enabled(self, value: bool) -> None:
        pass

    def observe(
        self, *, weights: Tensor | Sequence[float] | None = None, loss_scale: object = None
    ) -> PendingMoments:
        """Refused: there is nothing to observe.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("NullEstimator measures nothing: check `enabled` before observe()")
