"""Tensors in nested containers: torch's pytrees, and the containers that those take for leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import (
    GetAttrKey, MappingKey, SequenceKey, tree_flatten, tree_map_with_path,
)

from adabatch._types import Argument, Path

T = TypeVar("T")
_PLAIN = (Tensor, int, float, str, bool, type(None))


def map_tensors(value: T, function: Callable[[Path, Tensor], Tensor]) -> T:
    """The value with function(path, tensor) in place of each tensor; other objects are kept.

    Example:
        >>> import torch
        >>> map_tensors({"a": (torch.zeros(2), 3)}, lambda path, tensor: tensor + len(path))
        {'a': (tensor([2., 2.]), 3)}
    """
    def at_leaf(path: Path, leaf: object) -> object:
        return function(path, leaf) if isinstance(leaf, Tensor) else leaf

    return cast(T, _map(value, at_leaf))


def tensors(value: object) -> list[tuple[Path, Tensor]]:
    """All tensors with their paths, in order.

    Example:
        >>> import torch
        >>> found = tensors([torch.zeros(2), {"b": torch.zeros(3)}])
        >>> [(path, tensor.shape[0]) for path, tensor in found]
        [((0,), 2), ((1, 'b'), 3)]
    """
    return [(path, leaf) for path, leaf in _leaves(value) if isinstance(leaf, Tensor)]


def input_tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    """All tensors among the arguments of a call."""
    leaves = tree_flatten((args, kwargs))[0]
    if any(_children(leaf) for leaf in leaves if not isinstance(leaf, _PLAIN)):
        return [tensor for _, tensor in tensors((args, kwargs))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def holds_packed_sequence(value: object) -> bool:
    """Whether a PackedSequence, which is a leaf here, is somewhere inside."""
    return any(isinstance(leaf, PackedSequence) for _, leaf in _leaves(value))


def packed_sequence(args: tuple[object, ...], kwargs: dict[str, object]) -> PackedSequence | None:
    """The first PackedSequence among the arguments of a call."""
    leaves = tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))[0]
    return next((leaf for leaf in leaves if isinstance(leaf, PackedSequence)), None)


def _leaves(value: object) -> list[tuple[Path, object]]:
    found: list[tuple[Path, object]] = []

    def add(path: Path, leaf: object) -> object:
        found.append((path, leaf))
        return leaf

    _map(value, add)
    return found


def _map(value: object, function: Callable[[Path, object], object], path: Path = ()) -> object:
    """function(path, leaf) in place of each leaf."""
    def at_leaf(keys: tuple[object, ...], leaf: object) -> object:
        at = (*path, *map(_plain, keys))
        children = _children(leaf)
        new = {key: _map(child, function, (*at, key)) for key, child in children.items()}
        if not children:
            return function(at, leaf)
        if all(new[key] is child for key, child in children.items()):
            return leaf
        if isinstance(leaf, (list, tuple)):
            make: Argument = type(leaf)
            return make(*new.values()) if hasattr(make, "_fields") else make(new.values())
        changed: Argument = copy.copy(leaf)
        for key, child in new.items():
            if isinstance(leaf, Mapping):
                changed[key] = child
            else:
                object.__setattr__(changed, str(key), child)
        return changed

    return tree_map_with_path(at_leaf, value, is_leaf=_is_special_tuple)


def _is_special_tuple(value: object) -> bool:
    """A named tuple, whose paths are indices here and names in torch, or a PackedSequence."""
    return isinstance(value, tuple) and type(value) is not tuple


def _children(leaf: object) -> dict[Argument, object]:
    """{key, index or name: child} of a container that torch takes for a leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if isinstance(leaf, (list, tuple)) and not isinstance(leaf, PackedSequence):
        return dict(enumerate(leaf))
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return {}


def _plain(key: object) -> Argument:
    if isinstance(key, SequenceKey):
        return key.idx
    if isinstance(key, GetAttrKey):
        return key.name
    return cast(MappingKey, key).key
