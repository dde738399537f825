"""Factors on the lr that live while optimizer.step() runs.

Every change of ours is a factor that lives between the optimizer's step pre-hook and post-hook: torch's recursive lr schedulers, which compute the next lr from
the one they find in param_groups, never see it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class StepFactor:
    """Multiplies each group's lr by a factor while optimizer.step() runs, and only then.

    Args:
        optimizer: its step pre- and post-hooks are used; a tensor lr is changed in place.
        factor: called at each step; its value for the batch being stepped. A bound method is held weakly: an object that holds the optimizer is then in no
            reference cycle, and goes, with a loader and its workers, as soon as it is let go of. Its factor goes with it.

    Attributes:
        last_lrs: the lr of each group as used in the last step.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> halved = StepFactor(optimizer, lambda: 0.5)
        >>> optimizer.step()
        >>> halved.last_lrs, optimizer.param_groups[0]["lr"]
        ([0.5], 1.0)
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]):
        self._factor = held_weakly(factor)
        self._applied = 1.0
        self._saved: list[tuple[dict[str, Any], Any]] = []
        self.last_lrs = read_lrs(optimizer)
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @property
    def is_live(self) -> bool:
        """Whether what decides the factor is still there."""
        return self._factor() is not None

    def restore(self) -> None:
        """Undo the factor that a step which raised left behind; an lr that was set since then stays as it is."""
        for group, lr in self._saved:
            if group["lr"] == lr * self._applied:
                _put(group, lr)
        self._saved = []

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.restore()
        factor = self._factor()
        self._applied = 1.0 if factor is None else factor()
        if self._applied != 1.0:
            self._saved = _scale(optimizer.param_groups, self._applied)
        self.last_lrs = read_lrs(optimizer)

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        for group, lr in self._saved:
            _put(group, lr)
        self._saved = []


def check_unscaled(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose lr another scheduler of ours scales already.

    Raises:
        ValueError: it does.
    """
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    if any(isinstance(owner, StepFactor) and owner.is_live for owner in owners):
        raise ValueError("this optimizer has a BatchSizeScheduler already, and two would both scale its lr: call remove() of the first, or use that one")


class Pending:
    """A number that holds for batches delivered after the one it was decided at, whichever of optimizer.step() and scheduler.step() comes first.

    Attributes:
        latest: the number of the batches to come.

    Example:
        >>> spill = Pending()
        >>> spill.set(0.5, after_batch=3)
        >>> spill.for_batch(3), spill.for_batch(4)
        (1.0, 0.5)
    """

    def __init__(self, latest: float = 1.0):
        self._before, self.latest, self._after_batch = latest, latest, -1

    def set(self, number: float, after_batch: int) -> None:
        """Decide the number of all batches delivered after number `after_batch`."""
        self._before, self.latest, self._after_batch = self.for_batch(after_batch), number, after_batch

    def for_batch(self, n_batches: int) -> float:
        """The number of batch `n_batches`, counted from 1."""
        return self.latest if n_batches > self._after_batch else self._before


def held_weakly(function: Callable[[], float]) -> Callable[[], Callable[[], float] | None]:
    """A reference to a function: weak if it is a bound method, so that the optimizer's hooks keep no owner alive.

    Example:
        >>> held_weakly(float)()()
        0.0
    """
    return weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function


def read_lrs(optimizer: Optimizer) -> list[float]:
    """The lr of each param group, as numbers."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def _scale(groups: list[dict[str, Any]], factor: float) -> list[tuple[dict[str, Any], Any]]:
    """Scale the groups' lrs; return what they were."""
    saved, scaled = [], set()
    for group in groups:
        lr = group["lr"]
        if not isinstance(lr, torch.Tensor):
            saved.append((group, lr))
            group["lr"] = lr * factor
        elif id(lr) not in scaled:  # an optimizer's default tensor is shared by its groups
            scaled.add(id(lr))
            saved.append((group, lr.clone()))
            lr.mul_(factor)
    return saved


def _put(group: dict[str, Any], lr: Any) -> None:
    if isinstance(lr, torch.Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr
