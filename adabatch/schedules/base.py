"""What every batch-size schedule shares: bounds, the step, the state."""

import inspect
import math
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from adabatch._checks import check_version, integer, suggest_keywords
from adabatch.schedules.managers import BatchSizeManager, has_settable_batch_size, manager_for

STATE_VERSION = 1
_PLAIN = {bool, int, float, str, type(None), torch.Tensor}


def rounded(size: float) -> int:
    """The nearest integer, halves to even.

    Raises:
        ValueError: ``size`` is not a number.
        OverflowError: ``size`` is infinite.

    Example:
        >>> rounded(2.5), rounded(3.5)
        (2, 4)
    """
    if not math.isfinite(size):
        error = ValueError if math.isnan(size) else OverflowError
        raise error(f"The schedule computed a batch size of {size}; it must be finite. Check its factors and functions.")
    return round(float(size))


def clipped(size: float, low: float, high: float) -> float:
    """``size``, or the bound it exceeds.

    Example:
        >>> clipped(300, 1, 256)
        256
    """
    return min(max(size, low), high)


def is_plain(value: object) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads ``value`` back: numbers, strings, None, tensors, and lists, tuples and dicts of them.

    Example:
        >>> is_plain([1, {"a": 2.0}]), is_plain(print)
        (True, False)
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return type(value) in _PLAIN


def callable_state(call: Callable | None) -> dict:
    """The plain attributes of a callable object; empty for a function, whose closure cannot be saved.

    Example:
        >>> class Doubling:
        ...     def __init__(self):
        ...         self.calls = 3
        ...     def __call__(self, epoch):
        ...         return 2 ** epoch
        >>> callable_state(Doubling()), callable_state(abs)
        ({'calls': 3}, {})
    """
    return {name: value for name, value in getattr(call, "__dict__", {}).items() if is_plain(value)}


class BSScheduler:
    """Base of all batch-size schedules. A subclass computes the next size in :meth:`get_new_bs`.

    Building a schedule does its zeroth step. Each further step computes a size, clips it to [min_batch_size, max_batch_size] and writes it where the
    batch size lives. A size out of bounds finishes the schedule, except in the zeroth step. Epochs are whatever the caller steps by: epochs or batches.

    Args:
        dataloader: the loader whose batch size is scheduled, torch's or adabatch's; None with a ``batch_size_manager`` of your own.
        batch_size_manager: where to read and write the size; None chooses by the loader. :class:`~adabatch.schedules.VirtualBatchSize` writes nowhere.
        max_batch_size: upper bound in samples; None: the data set's length + 1, or no bound if the length is unknown.
        min_batch_size: lower bound in samples.
        verbose: print each change.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a bound is below 1, min_batch_size exceeds max_batch_size, or there is neither a loader nor a manager.
        KeyError: the loader leaves batching to its data set, which has no ``get_batch_size`` and ``change_batch_size``.

    Example:
        >>> class Odd(BSScheduler):
        ...     def get_new_bs(self):
        ...         return 2 * self.last_epoch + 1
        >>> schedule = Odd(DataLoader(range(100), batch_size=10))
        >>> schedule.step()
        >>> schedule.batch_size
        3
    """

    unsaved = ("dataloader", "batch_size_manager", "schedulers", "verbose")  # what a state leaves out, whatever its type

    @suggest_keywords
    def __init__(
        self,
        dataloader: DataLoader | None,
        *,
        batch_size_manager: BatchSizeManager | None = None,
        max_batch_size: int | None = None,
        min_batch_size: int = 1,
        verbose: bool = False,
    ):
        if dataloader is not None and not isinstance(dataloader, DataLoader) and not has_settable_batch_size(dataloader):
            raise TypeError(f"dataloader must be a torch.utils.data.DataLoader or have a batch_size that may be set, got {type(dataloader).__name__}.")
        if batch_size_manager is not None and not isinstance(batch_size_manager, BatchSizeManager):
            raise TypeError(f"batch_size_manager must be a BatchSizeManager, got {type(batch_size_manager).__name__}.")
        if dataloader is None and batch_size_manager is None:
            raise ValueError("dataloader and batch_size_manager are both None. Pass a loader, or batch_size_manager=VirtualBatchSize(n) to compute sizes only.")
        self.dataloader = dataloader
        self.verbose = verbose
        self.min_batch_size = integer("min_batch_size", min_batch_size, at_least=1)
        self.max_batch_size = _upper_bound(dataloader, max_batch_size)
        if self.min_batch_size > self.max_batch_size:
            raise ValueError(f"min_batch_size must be at most max_batch_size ({self.max_batch_size}), got {self.min_batch_size}.")
        self.batch_size_manager = manager_for(dataloader) if batch_size_manager is None else batch_size_manager
        # Schedules that share a manager share the size it had before the first of them changed it.
        if not hasattr(self.batch_size_manager, "_base_batch_size"):
            self.batch_size_manager._base_batch_size = self.batch_size
        self._last_bs = self.batch_size_manager._base_batch_size
        self.last_epoch = -1
        self._finished = False
        self._prepare()
        self.step()
        self._finished = False

    def _prepare(self) -> None:
        """Check what needs the bounds and the size in use, before anything is changed."""

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
        """Whether the schedule will change nothing any more: it is at its end, or a size exceeded a bound."""
        return self._finished

    def get_new_bs(self) -> int:
        """The size for ``self.last_epoch``, in samples, unclipped. A subclass that declares ``**kwargs`` gets those given to :meth:`step`."""
        raise NotImplementedError

    def set_batch_size(self, new_bs: int) -> None:
        """Write a batch size (samples), unchecked, to the manager and to what the loader reports."""
        loader = self.dataloader
        if isinstance(loader, DataLoader) and not has_settable_batch_size(loader) and loader.batch_size is not None:
            # DataLoader.__setattr__ refuses batch_size once built; len() over an iterable data set reads it.
            object.__setattr__(loader, "batch_size", new_bs)
        self.batch_size_manager.set_batch_size(new_bs)

    def step(self, **kwargs) -> None:
        """Go on by one epoch, or batch, and set the batch size. Does nothing once finished.

        Args:
            **kwargs: handed to :meth:`get_new_bs` if that takes any, for example ``metrics=loss``.
        """
        if self.finished:
            return
        self.last_epoch += 1
        wanted = self.get_new_bs(**kwargs) if _takes_kwargs(self.get_new_bs) else self.get_new_bs()
        new_bs = clipped(wanted, self.min_batch_size, self.max_batch_size)
        if new_bs != wanted:
            self._finished = True
        if new_bs != self.batch_size:
            self.set_batch_size(new_bs)
            if self.verbose:
                print(f"Adjusting batch size to {new_bs}.")
        self._last_bs = new_bs

    def state_dict(self) -> dict:
        """Counters, hyperparameters and sizes as plain values: every attribute of plain type not in ``unsaved``. No loader, no manager, no function."""
        kept = {name: value for name, value in vars(self).items() if name not in self.unsaved and is_plain(value)}
        sizes = {"batch_size": int(self.batch_size), "base_batch_size": int(self.batch_size_manager._base_batch_size)}
        return {"version": STATE_VERSION, "schedule": type(self).__name__, "sizes": sizes, "attributes": kept}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state, hyperparameters included, and set the batch size of THIS schedule's loader to the saved one. The argument is not changed.

        Raises:
            ValueError: the state is of another version or of another kind of schedule.
        """
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        if state_dict["schedule"] != type(self).__name__:
            raise ValueError(f"The state belongs to {state_dict['schedule']!r}, this schedule is {type(self).__name__!r}. Build the schedule that was saved.")
        vars(self).update(state_dict["attributes"])
        self.batch_size_manager._base_batch_size = state_dict["sizes"]["base_batch_size"]
        self.set_batch_size(state_dict["sizes"]["batch_size"])

    def _rewind(self) -> None:
        """Take the zeroth step back, for a SequentialBS that does it again later."""
        self._last_bs = self.batch_size_manager._base_batch_size
        self.last_epoch -= 1

    def _restart(self) -> None:
        """Count from the zeroth step, done, as when a SequentialBS reaches this schedule."""
        self.last_epoch = 0


def _takes_kwargs(method: Callable) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(method).parameters.values())


def _upper_bound(dataloader: DataLoader | None, max_batch_size: int | None) -> float:
    if max_batch_size is not None:
        return integer("max_batch_size", max_batch_size, at_least=1)
    dataset = getattr(dataloader, "dataset", None)
    return len(dataset) + 1 if hasattr(dataset, "__len__") else math.inf
