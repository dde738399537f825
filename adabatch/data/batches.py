"""Batches cut and joined: the axis of each tensor that counts samples, learnt from collate_fn.

Legend: N samples in a batch. A layout is a tree like the batch: an int is the axis of a tensor or
array that counts samples, PER_SAMPLE a list or tuple with one entry for each sample, CONSTANT what
does not grow with the batch, a list the layouts of a container's parts, UnknownAxis the rest.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_ALIGNMENT = 64
PER_SAMPLE, CONSTANT = "per sample", "constant"
Layout = Any
JoinFn = Callable[..., Any]
Path = tuple[Any, ...]
_FIX = (
    "Let collate_fn give every chunk the same shapes, pass join_fn= (adabatch.data.pad_right "
    "pads), or collate whole batches: collate_in='consumer'."
)


class UnknownAxis(str):
    """Why a part of a batch can be neither cut nor joined."""

    __slots__ = ()


def learn_layout(collate_fn: Callable[[list[Any]], Any], sample: Any) -> Layout:
    """The layout of batches of samples like this one, from a batch of one and a batch of two.

    Example:
        >>> learn_layout(torch.utils.data.default_collate, {"image": torch.zeros(3), "name": "a"})
        [0, 'per sample']
    """
    try:
        # Copies, because a collate_fn may take samples apart.
        one, two = (collate_fn([copy.deepcopy(sample) for _ in range(n)]) for n in (1, 2))
    except Exception as error:
        return UnknownAxis(
            f"collate_fn raised {type(error).__name__} ({error}) on a batch of one or two samples, "
            "from which its layout is learnt"
        )
    return _compare(one, two)


def cut(batch: Any, layout: Layout, start: int, stop: int) -> Any:
    """Samples start … stop − 1 of a batch.

    Tensors are views with version counters of their own, or copies where a view would be laid out
    otherwise in memory.

    Raises:
        ValueError: a part grows with the batch in a way that is not understood.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), [0, PER_SAMPLE], 1, 3)
        (tensor([1, 2]), ['b', 'c'])
    """
    return _cut(batch, layout, start, stop, ())


def join(
    parts: Sequence[Any], layout: Layout, join_fn: JoinFn | None = None, pin: bool = False
) -> Any:
    """One batch from several, in their order; into pinned memory with `pin`.

    Raises:
        ValueError: shapes that differ beyond the sample axis without a join_fn, or constant parts
            that differ.

    Example:
        >>> join([(torch.tensor([1, 2]), ("a", "b")), (torch.tensor([3]), ("c",))], [0, PER_SAMPLE])
        (tensor([1, 2, 3]), ('a', 'b', 'c'))
    """
    return parts[0] if len(parts) == 1 else _join(parts, layout, join_fn, pin, ())


def pad_right(
    parts: Sequence[Tensor], axis: int = 0, path: Path = (), *,
    padding_value: float | Mapping[Any, float] = 0,
) -> Tensor:
    """A join_fn: pads every other axis on the right to the longest part, then joins along `axis`.

    Args:
        parts: tensors of one dtype and as many dimensions.
        axis: the one that counts samples.
        path: where in the batch they stand: keys, positions, names of fields.
        padding_value: a number, or {last entry of the path: number}, 0 for those not named; bind
            it with functools.partial.

    Example:
        >>> pad_right([torch.ones(1, 2), torch.ones(1, 3)])
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    value = padding_value
    if isinstance(value, Mapping):
        value = value.get(path[-1] if path else None, 0)
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    shape[axis] = sum(part.shape[axis] for part in parts)
    joined = parts[0].new_full(shape, value)
    offset = 0
    for part in parts:
        where = [slice(size) for size in part.shape]
        where[axis] = slice(offset, offset + part.shape[axis])
        joined[tuple(where)] = part
        offset += part.shape[axis]
    return joined


Children = tuple[list[Any], list[Any], Callable[[list[Any]], Any]]


def _children(node: Any) -> Children | None:
    """(parts, their names, how to rebuild) of a container, or None for a leaf."""
    kind = type(node)
    if kind is list or kind is tuple:
        return list(node), list(range(len(node))), kind
    if kind is dict:
        return list(node.values()), list(node), lambda parts: dict(zip(node, parts, strict=True))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = [field.name for field in dataclasses.fields(node)]
        parts = [getattr(node, name) for name in fields]
        return parts, fields, lambda parts: _replaced(node, fields, parts)
    parts, spec = tree_flatten(node, is_leaf=lambda inner: inner is not node)
    if not (len(parts) == 1 and parts[0] is node):
        names: list[Any] = list(node if isinstance(node, Mapping) else range(len(parts)))
        return parts, names, lambda parts: tree_unflatten(parts, spec)
    if isinstance(node, Mapping) and hasattr(node, "__setitem__"):
        return list(node.values()), list(node), lambda parts: _updated(node, parts)
    return None


def _replaced(node: Any, names: list[str], parts: list[Any]) -> Any:
    other = copy.copy(node)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(other, name, part)
    return other


def _updated(node: Any, parts: list[Any]) -> Any:
    other = copy.copy(node)
    for key, part in zip(node, parts, strict=True):
        other[key] = part
    return other


def _compare(one: Any, two: Any) -> Layout:
    def unknown(what: str, first: Any, second: Any) -> UnknownAxis:
        return UnknownAxis(f"a batch of one {what.format(first)}, a batch of two {second}")

    if type(one) is not type(two):
        return unknown("is of type {}", type(one).__name__, f"of type {type(two).__name__}")
    if isinstance(one, (Tensor, np.ndarray)):
        sizes = list(zip(one.shape, two.shape, strict=False))
        growing = [axis for axis, (first, second) in enumerate(sizes) if first != second]
        if one.ndim == two.ndim and not growing:
            return CONSTANT
        if one.ndim == two.ndim and len(growing) == 1 and sizes[growing[0]] == (1, 2):
            return growing[0]
        return unknown("has shape {}", tuple(one.shape), tuple(two.shape))
    plain = isinstance(one, (list, tuple)) and not hasattr(one, "_fields")
    if plain and (len(one), len(two)) == (1, 2):
        return PER_SAMPLE
    inner, others = _children(one), _children(two)
    if inner is None or others is None:
        return CONSTANT
    if len(inner[0]) != len(others[0]):
        return unknown("has {} parts", len(inner[0]), len(others[0]))
    return [_compare(mine, theirs) for mine, theirs in zip(inner[0], others[0], strict=True)]


def _at(path: Path) -> str:
    return " at " + "".join(f"[{part!r}]" for part in path) if path else ""


def _node(batch: Any, layout: Layout, path: Path) -> Children:
    """_children of a container that layout describes."""
    if isinstance(layout, UnknownAxis):
        raise ValueError(f"Batches cannot be cut or joined{_at(path)}: {layout}. {_FIX}")
    found = _children(batch)
    if found is None:
        kind = type(batch).__name__
        raise ValueError(f"Batches cannot be cut or joined{_at(path)}: {kind} has no parts. {_FIX}")
    return found


def _cut(batch: Any, layout: Layout, start: int, stop: int, path: Path) -> Any:
    if layout == CONSTANT:
        return batch
    if layout == PER_SAMPLE:
        return batch[start:stop]
    if isinstance(layout, int):
        if not isinstance(batch, Tensor):
            return batch[(slice(None),) * layout + (slice(start, stop),)]
        # .data, because views of one tensor share a version counter: changing one batch in place
        # would spoil the graph of another.
        return _laid_out(batch.data.narrow(layout, start, stop - start), layout)
    parts, names, rebuild = _node(batch, layout, path)
    return rebuild([
        _cut(part, inner, start, stop, (*path, name))
        for part, inner, name in zip(parts, layout, names, strict=True)
    ])


def _laid_out(view: Tensor, axis: int) -> Tensor:
    """The view, or a copy that begins at a multiple of 64 bytes, as any new tensor does.

    Otherwise a matrix product does not give the same bits (tried with MKL).
    """
    if view.device.type != "cpu" or view.is_pinned():
        return view  # goes to a device, where it is laid out again
    return view.clone() if axis or view.data_ptr() % _ALIGNMENT else view


def _join(
    parts: Sequence[Any], layout: Layout, join_fn: JoinFn | None, pin: bool, path: Path
) -> Any:
    first = parts[0]
    if layout == CONSTANT:
        if not all(_equal(first, part) for part in parts[1:]):
            raise ValueError(
                f"Batches cannot be joined{_at(path)}: what does not grow with the batch differs "
                f"between chunks. {_FIX}"
            )
        return first
    if layout == PER_SAMPLE:
        return type(first)(entry for part in parts for entry in part)
    if isinstance(layout, int):
        return _join_arrays(parts, layout, join_fn, pin, path)
    _, names, rebuild = _node(first, layout, path)
    columns = zip(*(_node(part, layout, path)[0] for part in parts), strict=True)
    return rebuild([
        _join(column, inner, join_fn, pin, (*path, name))
        for column, inner, name in zip(columns, layout, names, strict=True)
    ])


def _join_arrays(
    parts: Sequence[Any], axis: int, join_fn: JoinFn | None, pin: bool, path: Path
) -> Any:
    first = parts[0]
    if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) > 1:
        if join_fn is None:
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(
                f"Batches cannot be joined{_at(path)}: shapes {shapes} differ beyond axis {axis}. "
                f"{_FIX}"
            )
        return join_fn(parts, axis, path)
    if not isinstance(first, Tensor):
        return np.concatenate(parts, axis)
    if pin and first.is_pinned() and len({part.dtype for part in parts}) == 1:
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        pinned = torch.empty(shape, dtype=first.dtype, pin_memory=True)
        return torch.cat(list(parts), axis, out=pinned)
    return torch.cat(list(parts), axis)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other
