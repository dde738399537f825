"""torch's default_collate with less to do for the commonest samples: a tensor, or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map


def fast_collate_for(collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """quick_collate for default_collate, unless something was registered with that; any other collate_fn as it is."""
    own = all(function.__module__ == default_collate.__module__ for function in default_collate_fn_map.values())
    return quick_collate if collate_fn is default_collate and own else collate_fn


def quick_collate(samples: list[Any]) -> Any:
    """What default_collate gives.

    Example:
        >>> quick_collate([(torch.tensor(1), torch.tensor(2)), (torch.tensor(3), torch.tensor(4))])
        [tensor([1, 3]), tensor([2, 4])]
    """
    first = samples[0]
    if type(first) is tuple:
        for part in first:
            if type(part) is not Tensor or not _plain(part):
                return default_collate(samples)
        try:
            columns = list(zip(*samples, strict=True))
        except (TypeError, ValueError):
            return default_collate(samples)  # it says what is wrong
        return [_stack(column) for column in columns]
    return _stack(samples) if type(first) is Tensor and _plain(first) else default_collate(samples)


class Stacked:
    """The batch that quick_collate would make of all samples, made from some of them at a time, while they are in the processor's cache.

    Args:
        total: number of samples.

    Example:
        >>> batch = Stacked(3)
        >>> batch.add([torch.tensor([1]), torch.tensor([2])])
        >>> batch.add([torch.tensor([3])])
        >>> batch.result()
        tensor([[1],
                [2],
                [3]])
    """

    def __init__(self, total: int):
        self._total, self._at = total, 0
        self._kinds: list[tuple] = []
        self._outs: list[Tensor] = []
        # Samples, once some are found that do not fit the others.
        self._odd: list[Any] | None = None

    def add(self, samples: list[Any]) -> None:
        """The next samples."""
        if self._odd is None and not self._fits(samples):
            self._odd = [self._row(at) for at in range(self._at)]
        if self._odd is not None:
            self._odd += samples
            return
        stop = self._at + len(samples)
        for out, column in zip(self._outs, _columns(samples), strict=True):
            torch.stack(column, out=out[self._at : stop])
        self._at = stop

    def result(self) -> Any:
        """The batch."""
        if self._odd is not None:
            return default_collate(self._odd)  # it says what is wrong, or has its own way
        return self._outs if self._kinds[0][0] is tuple else self._outs[0]

    def _fits(self, samples: list[Any]) -> bool:
        if not self._kinds:
            self._kinds = [_kind(samples[0])]
            if self._kinds[0][0] is not None:
                self._outs = [_empty(self._total, part) for part in _columns(samples[:1])]
        return self._kinds[0][0] is not None and all(_kind(sample) == self._kinds[0] for sample in samples)

    def _row(self, at: int) -> Any:
        row = tuple(out[at] for out in self._outs)
        return row if self._kinds[0][0] is tuple else row[0]


def _columns(samples: list[Any]) -> list[Any]:
    return list(zip(*samples, strict=True)) if type(samples[0]) is tuple else [samples]


def _kind(sample: Any) -> tuple:
    """What samples must have in common to be stacked into one batch; begins with None where they cannot be."""
    parts = sample if type(sample) is tuple else (sample,)
    if not parts or not all(type(part) is Tensor and _plain(part) and part.device.type == "cpu" and not part.requires_grad for part in parts):
        return (None,)
    return type(sample), *((part.dtype, part.shape) for part in parts)


def _plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _stack(column: Any) -> Tensor:
    if get_worker_info() is None or column[0].device.type != "cpu":
        return torch.stack(column)
    return torch.stack(column, out=_empty(len(column), column))


def _empty(n: int, column: Any) -> Tensor:
    """Room for `n` samples like the first; in a worker, where they are handed over from, so that they need not be copied there."""
    first = column[0]
    shape = (n, *first.shape)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=first.dtype)
    return torch.empty(0, dtype=first.dtype).set_(torch.UntypedStorage._new_shared(n * first.nbytes), 0, shape)
