"""What holds only while optimizer.step() runs is undone when it ends, also by an exception."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch.optim import Optimizer

Result = TypeVar("Result")


class HeldWeakly(Generic[Result]):
    """A function without arguments, called for its result. The owner of a bound method is held
    weakly, so that hooks keep no owner alive: calls return `default` when it is gone.

    Example:
        >>> HeldWeakly(float)(1.0)
        0.0
    """

    def __init__(self, function: Callable[[], Result]):
        self._owner: Callable[[], object] = lambda: function
        self._function: Callable[[Any], Result] = lambda owner: function()
        if inspect.ismethod(function):
            self._owner, self._function = weakref.ref(function.__self__), function.__func__

    @property
    def exists(self) -> bool:
        """Whether the owner is still there."""
        return self._owner() is not None

    def __call__(self, default: Result) -> Result:
        owner = self._owner()
        return default if owner is None else self._function(owner)


def undo_after_error(optimizer: Optimizer, undo: Callable[[], None]) -> Callable[[], None]:
    """Call `undo`, a bound method that is held weakly, whenever optimizer.step() raises, for which
    torch has no hook; a function that ends this.

    The optimizer's own `step` is replaced, as torch's lr schedulers do.

    Example:
        >>> import torch
        >>> class Undo:
        ...     undone = False
        ...     def now(self):
        ...         self.undone = True
        >>> undo, optimizer = Undo(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> end = undo_after_error(optimizer, undo.now)
        >>> optimizer.step(lambda: 1 / 0)
        Traceback (most recent call last):
        ZeroDivisionError: division by zero
        >>> undo.undone
        True
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
        self._own, self._optimizer = own, weakref.ref(optimizer)
        self._class_step: Callable[..., object] = type(optimizer).step
        self._undo: list[weakref.WeakMethod[Callable[[], None]]] = []
        self.__signature__ = inspect.signature(optimizer.step)  # GradScaler looks
        self.__dict__.update({} if own is None else getattr(own, "__dict__", {}))

    def __get__(self, optimizer: Optimizer, kind: type) -> _GuardedStep:
        return self  # bound already; torch's lr schedulers bind __func__ once more

    @property
    def __func__(self) -> _GuardedStep:
        return self

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            if self._own is not None:
                return self._own(*args, **kwargs)
            return self._class_step(self._optimizer(), *args, **kwargs)
        except BaseException:
            for reference in self._undo:
                undo = reference()
                if undo is not None:
                    undo()
            raise

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
            if self._own is not None:
                vars(owner)["step"] = self._own

        return end
