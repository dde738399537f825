"""What every batch-size schedule shares: bounds, the step, the state."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sized
from types import FunctionType
from typing import TypedDict, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from adabatch._checks import check_version, integer, storable, suggest_keywords
from adabatch.interfaces import State
from adabatch.schedules.managers import (
    BatchSizeManager, Loader, has_settable_batch_size, manager_for,
)

STATE_VERSION = 1
UNBOUNDED = sys.maxsize  # the upper bound over a data set of unknown length
N = TypeVar("N", int, float)
_NOT_SHOWN = {"dataloader", "batch_size_manager", "max_batch_size", "min_batch_size", "verbose"}


class Bounds(TypedDict, total=False):
    """The keyword arguments that every schedule hands to :class:`BSScheduler`, documented there."""

    batch_size_manager: BatchSizeManager | None
    max_batch_size: int | None
    min_batch_size: int
    verbose: bool


def rounded(size: float) -> int:
    """The nearest integer, halves to even; ValueError for NaN, OverflowError for infinity."""
    if not math.isfinite(size):
        error = ValueError if math.isnan(size) else OverflowError
        raise error(f"the schedule computed a batch size of {size}, which must be finite: "
                    "check its factors and functions")
    return round(float(size))


def clipped(size: N, low: N, high: N) -> N:
    """``size``, or the bound it exceeds."""
    return min(max(size, low), high)


def is_plain(value: object) -> bool:
    """Whether :func:`~adabatch._checks.storable` takes ``value``."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and is_plain([*value, *value.values()])
    return (type(value) in (bool, int, float, str, type(None), torch.Tensor)
            or isinstance(value, np.generic))


def callable_state(call: Callable | None) -> State:
    """The plain attributes of a callable object; none for a function (closures cannot be saved)."""
    return {key: storable(key, x) for key, x in getattr(call, "__dict__", {}).items()
            if is_plain(x)}


def described(call: object) -> str:
    """A callable for a person: the name of a function or class, the repr of another object.

    Example:
        >>> described(rounded), described(lambda epoch: 2)
        ('rounded', '<lambda>')
    """
    return call.__name__ if isinstance(call, (type, FunctionType)) else repr(call)


class BSScheduler:
    """Base of all batch-size schedules. A subclass computes the next size in :meth:`get_new_bs`;
    every schedule takes the arguments and raises the errors below.

    The constructor takes the zeroth step. Each further step computes a size, clips it to
    [min_batch_size, max_batch_size] and writes it to the loader. A size out of bounds finishes the
    schedule, except in the zeroth step. "Epoch" stands for whatever the caller steps by.

    Args:
        dataloader: torch's loader or adabatch's; None with a ``batch_size_manager`` of yours.
        batch_size_manager: where to read and write the size; None chooses by the loader.
            :class:`~adabatch.schedules.VirtualBatchSize` writes nowhere.
        max_batch_size: upper bound in samples; None: the data set's length + 1, or no bound if the
            length is unknown.
        min_batch_size: lower bound in samples.
        verbose: print each change.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: one is out of range; min_batch_size exceeds max_batch_size; there is neither a
            loader nor a manager.
        KeyError: the loader leaves batching to its data set, which has no ``get_batch_size`` and
            ``change_batch_size``.

    Example:
        >>> class Odd(BSScheduler):
        ...     def get_new_bs(self):
        ...         return 2 * self.last_epoch + 1
        >>> schedule = Odd(DataLoader(range(100), batch_size=10))
        >>> schedule.step()
        >>> schedule.batch_size
        3
    """

    # Attributes that a state omits, whatever their type; callable ones whose attributes it holds.
    unsaved: tuple[str, ...] = ("dataloader", "batch_size_manager", "schedulers", "verbose")
    callables: tuple[str, ...] = ()
    schedulers: tuple[BSScheduler, ...] = ()  # the members of a composition

    @suggest_keywords
    def __init__(
        self, dataloader: Loader | None, *, batch_size_manager: BatchSizeManager | None = None,
        max_batch_size: int | None = None, min_batch_size: int = 1, verbose: bool = False,
    ):
        known = dataloader is None or isinstance(dataloader, DataLoader)
        if not known and not has_settable_batch_size(dataloader):
            raise TypeError("dataloader must be a torch.utils.data.DataLoader or have a batch_size "
                            f"that can be set, got {type(dataloader).__name__}")
        if not isinstance(batch_size_manager, (BatchSizeManager, type(None))):
            raise TypeError("batch_size_manager must be a BatchSizeManager, "
                            f"got {type(batch_size_manager).__name__}")
        self.dataloader, self.verbose = dataloader, verbose
        self.min_batch_size = integer("min_batch_size", min_batch_size, at_least=1)
        self.max_batch_size = _upper_bound(dataloader, max_batch_size)
        if self.min_batch_size > self.max_batch_size:
            raise ValueError("min_batch_size must be at most max_batch_size "
                             f"({self.max_batch_size}), got {self.min_batch_size}")
        if batch_size_manager is None:
            if dataloader is None:
                raise ValueError("dataloader and batch_size_manager are both None: pass a loader, "
                                 "or batch_size_manager=VirtualBatchSize(n) to compute sizes only")
            batch_size_manager = manager_for(dataloader)
        self.batch_size_manager = batch_size_manager
        self._last_bs = self.batch_size_manager.base_batch_size
        self.last_epoch = -1
        self._finished = False
        self._prepare()
        self.step()
        self._finished = False

    def _prepare(self) -> None:
        """Check what depends on the bounds and the size in use, before anything is changed."""

    @property
    def batch_size(self) -> int:
        """The batch size in use, in samples, whoever set it."""
        return self.batch_size_manager.get_current_batch_size()

    @property
    def last_bs(self) -> int:
        """The batch size this schedule computed last, in samples."""
        return self._last_bs

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more: at the end, or after a size out of bounds."""
        return self._finished

    def get_new_bs(self) -> int:
        """The size for ``self.last_epoch``, in samples, unclipped. A subclass that declares
        ``**kwargs`` gets those given to :meth:`step`."""
        raise NotImplementedError

    def set_batch_size(self, new_bs: int) -> None:
        """Write a batch size (samples), unchecked, where the manager and the loader keep it."""
        loader = self.dataloader
        plain = not has_settable_batch_size(loader)
        if plain and isinstance(loader, DataLoader) and loader.batch_size is not None:
            # DataLoader.__setattr__ refuses it; len() over an iterable data set reads it.
            object.__setattr__(loader, "batch_size", new_bs)
        self.batch_size_manager.set_batch_size(new_bs)

    def step(self, **kwargs: object) -> None:
        """Advance by one epoch, or batch, and set the batch size; nothing happens once finished.
        Keywords such as ``metrics=loss`` are passed to :meth:`get_new_bs` if it takes any."""
        if self.finished:
            return
        self.last_epoch += 1
        parameters = inspect.signature(self.get_new_bs).parameters.values()
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        wanted = self.get_new_bs(**kwargs) if takes_any else self.get_new_bs()
        new_bs = clipped(wanted, self.min_batch_size, self.max_batch_size)
        if new_bs != wanted:
            self._finished = True
        if new_bs != self.batch_size:
            self.set_batch_size(new_bs)
            if self.verbose:
                print(f"Adjusting batch size to {new_bs}.")
        self._last_bs = new_bs

    def __repr__(self) -> str:
        kind, has = type(self), vars(self)
        names = [name for name in inspect.signature(kind).parameters
                 if name in has and name not in _NOT_SHOWN]
        given = [f"{name}={self._shown(name)}" for name in names]
        size = f"batch {self.batch_size}"
        if self.max_batch_size != UNBOUNDED:
            size += f" in [{self.min_batch_size}, {self.max_batch_size}]"
        state = [size, f"step {self.last_epoch}", *(["finished"] if self.finished else [])]
        return f"{kind.__name__}({', '.join(given + state)})"

    def _shown(self, name: str) -> str:
        """An argument of the constructor, for the repr."""
        return described(vars(self)[name])

    def state_dict(self) -> State:
        """Counters, hyperparameters and sizes: every attribute not in ``unsaved``, and the plain
        attributes of callable objects. No loader, no manager, no function.

        Raises:
            TypeError: an attribute that is no plain value and cannot be called: name it in
                ``unsaved``, or keep what it holds in lists and dicts.
        """
        attributes = vars(self)
        kept = {name: storable(f"{type(self).__name__}.{name}", x)
                for name, x in attributes.items()
                if name not in self.unsaved and not callable(x)}
        base = self.batch_size_manager.base_batch_size
        state = {"version": STATE_VERSION, "schedule": type(self).__name__, "attributes": kept,
                 "sizes": {"batch_size": int(self.batch_size), "base_batch_size": int(base)}}
        state |= {name: callable_state(attributes[name]) for name in self.callables}
        if self.schedulers:
            state["schedulers"] = [schedule.state_dict() for schedule in self.schedulers]
        return state

    def load_state_dict(self, state_dict: State) -> None:
        """Continue from a state, hyperparameters included, and set the batch size of THIS
        schedule's loader to the saved one. A state of another version or kind is a ValueError."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        members = state_dict.get("schedulers", [])
        if len(members) != len(self.schedulers):
            raise ValueError(f"the state holds {len(members)} schedules, this one "
                             f"{len(self.schedulers)}: build the schedule that was saved")
        if state_dict["schedule"] != type(self).__name__:
            raise ValueError(f"the state belongs to {state_dict['schedule']!r}, this schedule is "
                             f"{type(self).__name__!r}: build the schedule that was saved")
        for schedule, state in zip(self.schedulers, members, strict=True):
            schedule.load_state_dict(state)
        vars(self).update(state_dict["attributes"])
        for name in self.callables:
            if state_dict[name]:
                vars(vars(self)[name]).update(state_dict[name])
        self.batch_size_manager.base_batch_size = state_dict["sizes"]["base_batch_size"]
        self.set_batch_size(state_dict["sizes"]["batch_size"])

    def _rewind(self) -> None:
        """Undo the zeroth step, which a SequentialBS repeats later."""
        self._last_bs = self.batch_size_manager.base_batch_size
        self.last_epoch -= 1

    def _restart(self) -> None:
        """Count from the zeroth step, done, as when a SequentialBS reaches this schedule."""
        self.last_epoch = 0


def _upper_bound(dataloader: Loader | None, max_batch_size: int | None) -> int:
    if max_batch_size is not None:
        return integer("max_batch_size", max_batch_size, at_least=1)
    dataset = getattr(dataloader, "dataset", None)
    return len(dataset) + 1 if isinstance(dataset, Sized) else UNBOUNDED
