"""NullEstimator: what stands where the hooks would, for controllers that need no moments."""

from __future__ import annotations

from typing import Any


class NullEstimator:
    """Measures nothing, and puts nothing on the model.

    Args:
        accumulate: backward passes per optimizer step in the caller's own gradient accumulation.
        loss_reduction: 'mean' or 'sum', of the loss that is differentiated.

    Example:
        >>> hooks = NullEstimator()
        >>> hooks.enabled = True
        >>> hooks.enabled
        False
    """

    def __init__(self, accumulate: int = 1, loss_reduction: str = "mean"):
        self.accumulate, self.loss_reduction = accumulate, loss_reduction
        self.parameters: dict[str, Any] = {}

    @property
    def enabled(self) -> bool:
        """False, whatever it is set to."""
        return False

    @enabled.setter
    def enabled(self, value: bool) -> None:
        pass

    def remove(self) -> None:
        """Nothing was put anywhere."""

    def reset(self) -> None:
        """Nothing was measured."""

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {"version": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of hooks that measured is left aside."""
