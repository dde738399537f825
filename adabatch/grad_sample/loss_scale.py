"""The factor on the loss under float16, which every norm carries squared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adabatch.host_copies import HostCopies, scale_of


class NotedScale:
    """The scales of a step's passes, as numbers or as tensors that are still to be read.

    Args:
        seen: of each pass.
        given: by the caller, instead.

    Example:
        >>> NotedScale([1024.0, 1024.0]).factor()
        1024.0
    """

    def __init__(self, seen: Sequence[Tensor | float], given: float | None = None):
        self._seen, self._given = list(seen), given

    def copied(self, copies: HostCopies) -> NotedScale:
        """The same on the host."""
        return NotedScale([copies.add(scale) for scale in self._seen], self._given)

    def factor(self) -> float:
        """The scale.

        Raises:
            ValueError: no positive number.
            RuntimeError: it changed between the passes.
        """
        seen = {float(scale) for scale in self._seen}
        if len(seen) > 1:
            raise RuntimeError(
                f"the loss scale changed between the backward passes of a step ({sorted(seen)}), so that their sum is no gradient: call scaler.update() "
                "once per optimizer step"
            )
        scale = next(iter(seen), 1.0) if self._given is None else self._given
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"loss_scale must be a positive number, got {scale!r}; a GradScaler goes to GradSampleHooks(grad_scaler=) or wrap(grad_scaler=)")
        return scale


class LossScale:
    """Remembers a GradScaler's scale at the end of each backward pass: scaler.update() may change it before the step is collected.

    Args:
        grad_scaler: a torch.amp.GradScaler, or None.

    Raises:
        TypeError: something without get_scale().

    Example:
        >>> scale = LossScale(None)
        >>> scale.read()
        >>> scale.noted(None).factor(), scale.noted(1024.0).factor()
        (1.0, 1024.0)
    """

    def __init__(self, grad_scaler: Any = None):
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}; a number goes to collect(loss_scale=)")
        self._grad_scaler = grad_scaler
        self._seen: list[Tensor | float] = []

    def read(self) -> None:
        """Note the scale of the backward pass that ends."""
        if self._grad_scaler is not None:
            self._seen.append(scale_of(self._grad_scaler))

    def clear(self) -> None:
        """Forget the scales of a step."""
        self._seen.clear()

    def noted(self, given: float | None) -> NotedScale:
        """The scale of the step's passes, `given` or noted.

        Raises:
            ValueError: given beside a grad_scaler.
        """
        if given is not None and self._grad_scaler is not None:
            raise ValueError("the scale is read from the grad_scaler the hooks were made with: leave loss_scale= away")
        return NotedScale(self._seen, given)
