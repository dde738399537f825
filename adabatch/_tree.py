"""Tensors in nested containers: torch's pytrees, and the data classes and mappings they lack."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import GetAttrKey, SequenceKey, tree_map_with_path

Path = tuple[Any, ...]


def map_tensors(value: Any, function: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A copy of the value with function(path, tensor) in place of each tensor.

    Objects of other kinds, packed sequences among them, are kept.

    Example:
        >>> import torch
        >>> map_tensors({"a": (torch.zeros(2), 3)}, lambda path, tensor: tensor + len(path))
        {'a': (tensor([2., 2.]), 3)}
    """
    def at_leaf(keys: tuple[Any, ...], leaf: Any) -> Any:
        at = (*path, *map(_plain, keys))
        if isinstance(leaf, Tensor):
            return function(at, leaf)
        changed: Any = copy.copy(leaf) if is_record(leaf) or isinstance(leaf, Mapping) else leaf
        if isinstance(leaf, Mapping):
            for key, child in leaf.items():
                changed[key] = map_tensors(child, function, (*at, key))
        elif is_record(leaf):
            for key in (field.name for field in dataclasses.fields(leaf)):
                child = map_tensors(getattr(leaf, key), function, (*at, key))
                object.__setattr__(changed, key, child)
        return changed

    return tree_map_with_path(at_leaf, value, is_leaf=is_packed)


def tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """All tensors with their paths, in order.

    Example:
        >>> import torch
        >>> found = tensors([torch.zeros(2), {"b": torch.zeros(3)}])
        >>> [(path, tensor.shape[0]) for path, tensor in found]
        [((0,), 2), ((1, 'b'), 3)]
    """
    found: list[tuple[Path, Tensor]] = []

    def add(path: Path, tensor: Tensor) -> Tensor:
        found.append((path, tensor))
        return tensor

    map_tensors(value, add)
    return found


def is_packed(value: Any) -> bool:
    """Whether the value is a PackedSequence, which torch takes for an ordinary named tuple."""
    return isinstance(value, PackedSequence)


def is_record(value: Any) -> bool:
    """Whether the value is an instance of a data class."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(key: Any) -> Any:
    if isinstance(key, SequenceKey):
        return key.idx
    return key.name if isinstance(key, GetAttrKey) else key.key
