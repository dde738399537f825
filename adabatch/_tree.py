"""Tensors in nested containers: torch's pytrees, and the containers that those take for leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import GetAttrKey, SequenceKey, tree_map_with_path

Path = tuple[Any, ...]


def map_tensors(value: Any, function: Callable[[Path, Tensor], Tensor]) -> Any:
    """The value with function(path, tensor) in place of each tensor; other objects are kept.

    Example:
        >>> import torch
        >>> map_tensors({"a": (torch.zeros(2), 3)}, lambda path, tensor: tensor + len(path))
        {'a': (tensor([2., 2.]), 3)}
    """
    def at_leaf(path: Path, leaf: Any) -> Any:
        return function(path, leaf) if isinstance(leaf, Tensor) else leaf

    return _map(value, at_leaf)


def tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """All tensors with their paths, in order.

    Example:
        >>> import torch
        >>> found = tensors([torch.zeros(2), {"b": torch.zeros(3)}])
        >>> [(path, tensor.shape[0]) for path, tensor in found]
        [((0,), 2), ((1, 'b'), 3)]
    """
    return [(path, leaf) for path, leaf in _leaves(value) if isinstance(leaf, Tensor)]


def holds_packed_sequence(value: Any) -> bool:
    """Whether a PackedSequence, which is a leaf here, is somewhere inside."""
    return any(isinstance(leaf, PackedSequence) for _, leaf in _leaves(value))


def _leaves(value: Any) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []

    def add(path: Path, leaf: Any) -> Any:
        found.append((path, leaf))
        return leaf

    _map(value, add)
    return found


def _map(value: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """function(path, leaf) in place of each leaf."""
    def at_leaf(keys: tuple[Any, ...], leaf: Any) -> Any:
        at = (*path, *map(_plain, keys))
        children = _children(leaf)
        new = {key: _map(child, function, (*at, key)) for key, child in children.items()}
        if not children:
            return function(at, leaf)
        if all(new[key] is child for key, child in children.items()):
            return leaf
        if isinstance(leaf, (list, tuple)):
            named = hasattr(leaf, "_fields")
            return type(leaf)(*new.values()) if named else type(leaf)(new.values())
        changed: Any = copy.copy(leaf)
        for key, child in new.items():
            if isinstance(leaf, Mapping):
                changed[key] = child
            else:
                object.__setattr__(changed, key, child)
        return changed

    return tree_map_with_path(at_leaf, value, is_leaf=_is_special_tuple)


def _is_special_tuple(value: Any) -> bool:
    """A named tuple, whose paths are indices here and names in torch, or a PackedSequence."""
    return isinstance(value, tuple) and type(value) is not tuple


def _children(leaf: Any) -> dict[Any, Any]:
    """{key, index or name: child} of a container that torch takes for a leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if isinstance(leaf, (list, tuple)) and not isinstance(leaf, PackedSequence):
        return dict(enumerate(leaf))
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return {}


def _plain(key: Any) -> Any:
    if isinstance(key, SequenceKey):
        return key.idx
    return key.name if isinstance(key, GetAttrKey) else key.key
