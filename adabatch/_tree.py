"""Walking through what models take and give: tensors in tuples, lists, mappings and data classes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Path = tuple[Any, ...]


def map_tensors(value: Any, function: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """The value with the function (of a tensor's path and the tensor) applied to each tensor; containers whose tensors stay the same are kept, others copied.

    Objects of other kinds are left alone, packed sequences too.

    Example:
        >>> import torch
        >>> map_tensors({"a": (torch.zeros(2), 3)}, lambda path, tensor: tensor + len(path))
        {'a': (tensor([2., 2.]), 3)}
    """
    if isinstance(value, Tensor):
        return function(path, value)
    new = {key: map_tensors(child, function, (*path, key)) for key, child in children(value)}
    if all(new[key] is child for key, child in children(value)):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
    changed = copy.copy(value)
    for key, child in new.items():
        if isinstance(value, Mapping):
            changed[key] = child
        else:
            object.__setattr__(changed, key, child)
    return changed


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors with their paths, in order.

    Example:
        >>> import torch
        >>> [(path, tensor.shape[0]) for path, tensor in tensors([torch.zeros(2), {"b": torch.zeros(3)}])]
        [((0,), 2), ((1, 'b'), 3)]
    """
    if isinstance(value, Tensor):
        yield path, value
    for key, child in children(value):
        yield from tensors(child, (*path, key))


def holds_packed_sequence(value: Any) -> bool:
    """Whether a PackedSequence is somewhere inside."""
    return isinstance(value, PackedSequence) or any(holds_packed_sequence(child) for _, child in children(value))


def children(value: Any) -> list[tuple[Any, Any]]:
    """(key or index or field name, child) of a container; nothing for any other object."""
    if isinstance(value, PackedSequence):
        return []
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []
