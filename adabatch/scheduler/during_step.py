"""What holds only while optimizer.step() runs is undone when it ends, also by an exception."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable

from torch.optim import Optimizer


def held_weakly(function: Callable[[], float]) -> Callable[[], Callable[[], float] | None]:
    """A reference to a function: weak for a bound method, so that hooks keep no owner alive.

    Example:
        >>> held_weakly(float)()()
        0.0
    """
    return weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function


def undo_after_step(optimizer: Optimizer, undo: Callable[[], None]) -> Callable[[], None]:
    """Call `undo`, a bound method that is held weakly, whenever optimizer.step() returns or raises;
    a function that ends this.

    torch's step post-hooks are not called when step() raises, so the optimizer's own `step` is
    replaced, as torch's lr schedulers do.

    Example:
        >>> import torch
        >>> class Undo:
        ...     def now(self):
        ...         print("undone")
        >>> undo, optimizer = Undo(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> end = undo_after_step(optimizer, undo.now)
        >>> optimizer.step()
        undone
        >>> end()
    """
    step = vars(optimizer).get("step")
    if not isinstance(step, _GuardedStep):
        step = _GuardedStep(optimizer)
        vars(optimizer)["step"] = step
    return step.add(optimizer, weakref.WeakMethod(undo))


class _GuardedStep:
    """In place of optimizer.step; holds the optimizer weakly, so that no cycle delays its end."""

    def __init__(self, optimizer: Optimizer):
        own = vars(optimizer).get("step")  # an lr scheduler's, say
        self._step: Callable[[], Callable[..., object] | None] = (
            weakref.WeakMethod(optimizer.step) if own is None else lambda: own)
        self._replaced = own
        self._undo: list[weakref.WeakMethod[Callable[[], None]]] = []
        self.__signature__ = inspect.signature(optimizer.step)  # GradScaler looks
        self.__dict__.update({} if own is None else getattr(own, "__dict__", {}))

    def __get__(self, optimizer: Optimizer, kind: type) -> _GuardedStep:
        return self  # bound already; torch's lr schedulers bind __func__ once more

    @property
    def __func__(self) -> _GuardedStep:
        return self

    def __call__(self, *args: object, **kwargs: object) -> object:
        step = self._step()
        assert step is not None
        try:
            return step(*args, **kwargs)
        finally:
            for reference in self._undo:
                undo = reference()
                if undo is not None:
                    undo()

    def add(
        self, optimizer: Optimizer, undo: weakref.WeakMethod[Callable[[], None]]
    ) -> Callable[[], None]:
        self._undo.append(undo)
        of_optimizer = weakref.ref(optimizer)

        def end() -> None:
            if undo in self._undo:
                self._undo.remove(undo)
            owner = of_optimizer()
            if owner is None or self._undo or vars(owner).get("step") is not self:
                return
            del vars(owner)["step"]
            if self._replaced is not None:
                vars(owner)["step"] = self._replaced

        return end
