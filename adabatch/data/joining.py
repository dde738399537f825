"""Batches cut and joined: which axis of each tensor counts samples is learnt from the collate_fn, not guessed from shapes.

Legend: N samples in a batch. A layout is a tree like the batch: an int is the axis of a tensor or array that counts samples, COLUMN a list or tuple with one
entry for each sample, SHARED what does not grow with the batch, a list the layouts of a container's parts, UnknownAxis what grows otherwise.
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
COLUMN, SHARED = "column", "shared"
Layout = Any
JoinFn = Callable[..., Any]
_CURE = "Let collate_fn give every chunk the same shapes, pass join_fn= (adabatch.data.pad_right pads), or collate whole batches: collate_in='consumer'."


class UnknownAxis(str):
    """Why a part of a batch can be neither cut nor joined."""

    __slots__ = ()


def learn_layout(collate_fn: Callable[[list[Any]], Any], sample: Any) -> Layout:
    """The layout of what `collate_fn` makes of samples like this one, from its batch of one and its batch of the same sample twice.

    Example:
        >>> learn_layout(torch.utils.data.default_collate, {"image": torch.zeros(3, 3), "name": "a"})
        [0, 'column']
    """
    try:
        # Copies, because a collate_fn may take samples apart.
        one, two = (collate_fn([copy.deepcopy(sample) for _ in range(count)]) for count in (1, 2))
    except Exception as error:
        return UnknownAxis(f"collate_fn raised {type(error).__name__} ({error}) on a batch of one or two samples, by which its layout is learnt")
    return _compare(one, two)


def cut(batch: Any, layout: Layout, start: int, stop: int) -> Any:
    """Samples start … stop − 1 of a batch. Tensors are views with version counters of their own, or copies where a view would be laid out otherwise in memory.

    Raises:
        ValueError: a part grows with the batch in a way that is not understood.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), [0, COLUMN], 1, 3)
        (tensor([1, 2]), ['b', 'c'])
    """
    return _cut(batch, layout, start, stop, ())


def join(parts: Sequence[Any], layout: Layout, join_fn: JoinFn | None = None, pin: bool = False) -> Any:
    """One batch from several, in their order; into pinned memory if asked to.

    Raises:
        ValueError: shapes that differ beyond the sample axis without a join_fn, or parts that should be equal and are not.

    Example:
        >>> join([(torch.tensor([1, 2]), ("a", "b")), (torch.tensor([3]), ("c",))], [0, COLUMN])
        (tensor([1, 2, 3]), ('a', 'b', 'c'))
    """
    return parts[0] if len(parts) == 1 else _join(parts, layout, join_fn, pin, ())


def pad_right(parts: Sequence[Tensor], axis: int = 0, path: tuple = (), *, padding_value: float | Mapping[Any, float] = 0) -> Tensor:
    """A join_fn: pads every other axis on the right to the longest part, then joins along `axis`.

    Args:
        parts: tensors of one dtype and as many dimensions.
        axis: the one that counts samples.
        path: where in the batch they stand: keys, positions, names of fields.
        padding_value: a number, or {last entry of the path: number}, 0 for those not named; give it with functools.partial.

    Example:
        >>> pad_right([torch.ones(1, 2), torch.ones(1, 3)])
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    value = padding_value.get(path[-1] if path else None, 0) if isinstance(padding_value, Mapping) else padding_value
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


def _children(node: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]] | None:
    """(parts, their names, how to rebuild) of a container, or None for a leaf."""
    kind = type(node)
    if kind is list or kind is tuple:
        return list(node), list(range(len(node))), kind
    if kind is dict:
        return list(node.values()), list(node), lambda parts: dict(zip(node, parts, strict=True))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return [getattr(node, name) for name in names], names, lambda parts: _replaced(node, names, parts)
    parts, spec = tree_flatten(node, is_leaf=lambda inner: inner is not node)
    if not (len(parts) == 1 and parts[0] is node):
        return parts, list(node) if isinstance(node, Mapping) else list(range(len(parts))), lambda parts: tree_unflatten(parts, spec)
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
    if type(one) is not type(two):
        return UnknownAxis(f"a batch of one is of type {type(one).__name__}, a batch of two of type {type(two).__name__}")
    if isinstance(one, (Tensor, np.ndarray)):
        growing = [axis for axis, sizes in enumerate(zip(one.shape, two.shape, strict=False)) if sizes[0] != sizes[1]]
        if one.ndim == two.ndim and not growing:
            return SHARED
        if one.ndim == two.ndim and len(growing) == 1 and (one.shape[growing[0]], two.shape[growing[0]]) == (1, 2):
            return growing[0]
        return UnknownAxis(f"a batch of one has shape {tuple(one.shape)}, a batch of two {tuple(two.shape)}")
    if isinstance(one, (list, tuple)) and not hasattr(one, "_fields") and (len(one), len(two)) == (1, 2):
        return COLUMN
    inner = _children(one)
    if inner is None:
        return SHARED
    others = _children(two)
    if len(inner[0]) != len(others[0]):
        return UnknownAxis(f"a batch of one has {len(inner[0])} parts, a batch of two {len(others[0])}")
    return [_compare(mine, theirs) for mine, theirs in zip(inner[0], others[0], strict=True)]


def _refuse(layout: UnknownAxis, path: tuple) -> ValueError:
    return ValueError(f"Batches cannot be cut or joined{_at(path)}: {layout}. {_CURE}")


def _at(path: tuple) -> str:
    return " at " + "".join(f"[{part!r}]" for part in path) if path else ""


def _cut(batch: Any, layout: Layout, start: int, stop: int, path: tuple) -> Any:
    if isinstance(layout, UnknownAxis):
        raise _refuse(layout, path)
    if layout == SHARED:
        return batch
    if layout == COLUMN:
        return batch[start:stop]
    if isinstance(layout, int):
        if isinstance(batch, Tensor):
            # .data, because views of one tensor share a version counter: changing one batch in place would spoil the graph of another.
            return _laid_out(batch.data.narrow(layout, start, stop - start), layout)
        return batch[(slice(None),) * layout + (slice(start, stop),)]
    parts, names, rebuild = _children(batch)
    return rebuild([_cut(part, inner, start, stop, (*path, name)) for part, inner, name in zip(parts, layout, names, strict=True)])


def _laid_out(view: Tensor, axis: int) -> Tensor:
    """The same bits come out of a matrix product only if the tensor begins at a multiple of 64 bytes, as one that was made on its own does (tried with MKL)."""
    if view.device.type != "cpu" or view.is_pinned():
        return view  # goes to a device, which lays it out anew
    return view.clone() if axis or view.data_ptr() % _ALIGNMENT else view


def _join(parts: Sequence[Any], layout: Layout, join_fn: JoinFn | None, pin: bool, path: tuple) -> Any:
    first = parts[0]
    if isinstance(layout, UnknownAxis):
        raise _refuse(layout, path)
    if layout == SHARED:
        if not all(_equal(first, part) for part in parts[1:]):
            raise ValueError(f"Batches cannot be joined{_at(path)}: what does not grow with the batch differs between chunks. {_CURE}")
        return first
    if layout == COLUMN:
        return type(first)(entry for part in parts for entry in part)
    if isinstance(layout, int):
        return _join_arrays(parts, layout, join_fn, pin, path)
    _, names, rebuild = _children(first)
    columns = zip(*(_children(part)[0] for part in parts), strict=True)
    return rebuild([_join(column, inner, join_fn, pin, (*path, name)) for column, inner, name in zip(columns, layout, names, strict=True)])


def _join_arrays(parts: Sequence[Any], axis: int, join_fn: JoinFn | None, pin: bool, path: tuple) -> Any:
    first = parts[0]
    shapes = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
    if len(shapes) > 1:
        if join_fn is None:
            raise ValueError(f"Batches cannot be joined{_at(path)}: shapes {[tuple(part.shape) for part in parts]} differ beyond axis {axis}. {_CURE}")
        return join_fn(parts, axis, path)
    if not isinstance(first, Tensor):
        return np.concatenate(parts, axis)
    if pin and first.is_pinned() and len({part.dtype for part in parts}) == 1:
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return torch.cat(parts, axis, out=torch.empty(shape, dtype=first.dtype, pin_memory=True))
    return torch.cat(parts, axis)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other
