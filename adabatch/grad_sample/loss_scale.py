"""The factor on the loss under float16, which every norm carries squared."""

from __future__ import annotations

import math
from typing import Any


class LossScale:
    """Remembers a GradScaler's scale at the end of each backward pass: scaler.update() may change it before the step is collected.

    Args:
        grad_scaler: a torch.amp.GradScaler, or None.

    Raises:
        TypeError: something without get_scale().

    Example:
        >>> scale = LossScale(None)
        >>> scale.read()
        >>> scale.factor(None), scale.factor(1024.0)
        (1.0, 1024.0)
    """

    def __init__(self, grad_scaler: Any = None):
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}; a number goes to collect(loss_scale=)")
        self._grad_scaler = grad_scaler
        self._seen: set[float] = set()

    def read(self) -> None:
        """Note the scale of the backward pass that ends."""
        if self._grad_scaler is not None:
            self._seen.add(float(self._grad_scaler.get_scale()))

    def clear(self) -> None:
        """Forget the scales of a step."""
        self._seen.clear()

    def factor(self, given: float | None) -> float:
        """The scale of the step's passes, `given` or noted.

        Raises:
            ValueError: no positive number, or given beside a grad_scaler.
            RuntimeError: it changed between the passes.
        """
        if given is not None and self._grad_scaler is not None:
            raise ValueError("the scale is read from the grad_scaler the hooks were made with: leave loss_scale= away")
        if len(self._seen) > 1:
            raise RuntimeError(
                f"the loss scale changed between the backward passes of a step ({sorted(self._seen)}), so that their sum is no gradient: call scaler.update() "
                "once per optimizer step"
            )
        scale = next(iter(self._seen), 1.0) if given is None else given
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"loss_scale must be a positive number, got {scale!r}; a GradScaler goes to GradSampleHooks(grad_scaler=) or wrap(grad_scaler=)")
        return scale
