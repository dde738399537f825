"""The factor on the loss under float16, which every norm carries squared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adabatch._transfers import HostCopies, scale_of


class StepScale:
    """The loss scales of a step's backward passes, numbers or tensors that are still to be read.

    Args:
        seen: of each pass.
        given: one number for all of them, instead.

    Example:
        >>> StepScale([1024.0, 1024.0]).factor()
        1024.0
    """

    def __init__(self, seen: Sequence[Tensor | float], given: float | None = None):
        self._seen, self._given = list(seen), given

    def copied(self, copies: HostCopies) -> StepScale:
        """The same on the host."""
        return StepScale([copies.add(scale) for scale in self._seen], self._given)

    def factor(self) -> float:
        """The scale.

        Raises:
            ValueError: it is not a positive number.
            RuntimeError: it changed between the passes.
        """
        seen = {float(scale) for scale in self._seen}
        if len(seen) > 1:
            raise RuntimeError(
                f"the loss scale changed between the backward passes of a step ({sorted(seen)}), "
                "so that their sum is no gradient: call scaler.update() once per optimizer step"
            )
        scale = next(iter(seen), 1.0) if self._given is None else self._given
        if (isinstance(scale, bool) or not isinstance(scale, (int, float))
                or not 0 < scale < math.inf):
            raise ValueError(f"loss_scale must be a positive number, got {scale!r}; pass a "
                             "GradScaler to wrap(grad_scaler=) or monitor(grad_scaler=)")
        return scale


class LossScale:
    """Records a GradScaler's scale at the end of each backward pass: scaler.update() may change it
    before the step is collected.

    Args:
        grad_scaler: a torch.amp.GradScaler, or None for a loss that is not scaled.

    Raises:
        TypeError: something without get_scale().

    Example:
        >>> import torch
        >>> scale = LossScale(torch.amp.GradScaler("cpu", init_scale=1024.0))
        >>> _ = scale.grad_scaler.scale(torch.zeros(()))
        >>> scale.record()  # a callback for Estimator.on_backward_end
        >>> scale.take().factor()
        1024.0
    """

    def __init__(self, grad_scaler: Any = None):
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            kind = type(grad_scaler).__name__
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {kind}; a number "
                            "goes to step(loss, loss_scale=)")
        self.grad_scaler = grad_scaler
        self._seen: list[Tensor | float] = []

    def record(self) -> None:
        """Record the scale of the backward pass that ends."""
        if self.grad_scaler is not None:
            self._seen.append(scale_of(self.grad_scaler))

    def take(self, given: float | None = None) -> StepScale | None:
        """The scales of the step's passes, which are forgotten here; None for 1.

        Raises:
            ValueError: a number is given although there is a grad_scaler.
        """
        seen, self._seen = self._seen, []
        if given is not None and self.grad_scaler is not None:
            raise ValueError("the scale is read from the grad_scaler: omit loss_scale=")
        return StepScale(seen, given) if seen or given is not None else None

    def clear(self) -> None:
        """Forget the scales of a step."""
        self._seen = []


def step_scale(loss_scale: float | StepScale | None) -> StepScale:
    """What `Estimator.observe` is given, as a StepScale: a number for all passes; None for 1."""
    return loss_scale if isinstance(loss_scale, StepScale) else StepScale([], loss_scale)
