"""The factor on the loss under float16, which every norm carries squared."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch._transfers import HostCopies, scale_of

FRAMES = 10  # above optimizer.step(), its hooks' and lr schedulers' wrappers and wrapping optimizers among them


class StepScale:
    """The scales of a step's passes, as numbers or as tensors that are still to be read.

    Args:
        seen: of each pass.
        given: by the caller, instead.

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


class SteppingScaler:
    """Notices the GradScaler that steps an optimizer, by its frame above optimizer.step(): it leaves no other mark on an optimizer or its gradients.

    Args:
        optimizer: gets a step pre-hook.

    Attributes:
        found: the scaler; None while none was seen, and for one that is not enabled.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> stepping, scaler = SteppingScaler(optimizer), torch.amp.GradScaler("cpu")
        >>> optimizer.step()
        >>> stepping.found is None
        True
        >>> scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
        >>> scaler.step(optimizer)
        >>> stepping.found is scaler
        True
    """

    def __init__(self, optimizer: Optimizer):
        self.found: Any = None
        self._handle = optimizer.register_step_pre_hook(self._before)

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self.found is not None or torch.compiler.is_compiling():
            return
        frame = sys._getframe(1)
        for _ in range(FRAMES):
            if frame is None:
                return
            code = frame.f_code
            # By its file: subclasses, as fully sharded training has one, live in files of like names.
            if code.co_name == "step" and code.co_filename.endswith("grad_scaler.py"):
                scaler = frame.f_locals["self"]
                self.found = scaler if scaler.is_enabled() else None
                return
            frame = frame.f_back


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
        self._stepping: SteppingScaler | None = None

    def watch(self, optimizer: Optimizer) -> None:
        """Have noted() refuse steps that a GradScaler takes which nobody spoke of."""
        self.remove()
        self._stepping = SteppingScaler(optimizer)

    def remove(self) -> None:
        """Watch no more."""
        if self._stepping is not None:
            self._stepping.remove()
            self._stepping = None

    def record(self) -> None:
        """Record the scale; the callback for `Estimator.on_backward_end`."""
        self.read()

    def take(self) -> StepScale:
        """The scales of the step's passes, which are forgotten here."""
        step = StepScale(self._seen)
        self._seen = []
        return step

    def read(self) -> None:
        """Note the scale of the backward pass that ends."""
        if self._grad_scaler is not None:
            self._seen.append(scale_of(self._grad_scaler))

    def clear(self) -> None:
        """Forget the scales of a step."""
        self._seen.clear()

    def noted(self, given: float | StepScale | None) -> StepScale:
        """The scale of the step's passes, `given` or noted.

        Raises:
            ValueError: given beside a grad_scaler.
            RuntimeError: neither, but a GradScaler steps the optimizer that is watched; or another one than the grad_scaler.
        """
        if isinstance(given, StepScale):
            return given
        self.check_told(given)
        if given is not None and self._grad_scaler is not None:
            raise ValueError("the scale is read from the grad_scaler the hooks were made with: leave loss_scale= away")
        return StepScale(self._seen, given)

    def check_told(self, given: float | None) -> None:
        """Refuse what noted() refuses of the optimizer's steps."""
        found = None if self._stepping is None or given is not None else self._stepping.found
        if found is None or found is self._grad_scaler:
            return
        told = "that adabatch was not told of" if self._grad_scaler is None else "other than the grad_scaler= that adabatch was given"
        raise RuntimeError(
            f"optimizer.step() was called by a GradScaler {told}. Gradients are measured while they carry its scale, {found.get_scale():.6g} by now, so that "
            "their variance would be too large by its square. Pass grad_scaler=scaler to adabatch.wrap, or to GradSampleHooks; for a scale that never changes, "
            "scheduler.step(loss, loss_scale=...) will do"
        )
