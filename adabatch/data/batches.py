"""Batches cut and joined: the axis of each tensor that counts samples, learnt from collate_fn.

Legend: N samples in a batch. A layout is a tree like the batch: an int is the axis of a tensor or
array that counts samples, PER_SAMPLE a list or tuple with one entry for each sample, CONSTANT what
does not grow with the batch, a list the layouts of a container's parts, UnknownAxis the rest.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from operator import setitem
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch._tree import Path
from adabatch._types import Batch, CollateFn, Sample

_ALIGNMENT = 64
PER_SAMPLE, CONSTANT = "per sample", "constant"
Layout: TypeAlias = "int | str | list[Layout] | None"
JoinFn = Callable[..., Batch]
_FIX = (
    "Let collate_fn give every chunk the same shapes, pass join_fn= (functools.partial(pad_right, "
    "padding_value=...) of adabatch.data pads), or collate whole batches: collate_in='consumer'.")


class UnknownAxis(str):
    """Why a part of a batch can be neither cut nor joined."""

    __slots__ = ()


def learn_layout(collate_fn: CollateFn, sample: Sample, others: Sequence[Sample] = ()) -> Layout:
    """The layout of batches of samples like this one, from a batch of one and a batch of two.

    What a batch with the others, cut, does not share with batches of fewer samples is marked
    UnknownAxis: flat sequences that seemed to count samples, values derived from the whole batch.

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
            "from which its layout is learnt")
    layout = _compare(one, two)
    samples = [sample, *others]
    if not others:
        return layout
    try:
        whole, again, fewer = (
            collate_fn([copy.deepcopy(each) for each in samples[:n]])
            for n in (len(samples), len(samples), len(samples) - 1))
    except Exception:
        return layout  # which the batch itself will raise
    return _checked(layout, whole, again, fewer, len(samples))


def _checked(layout: Layout, whole: Batch, again: Batch, fewer: Batch, n: int) -> Layout:
    """The layout, with UnknownAxis where a whole batch, cut, is not the batch of all but the last.

    again: the whole batch collated once more; what differs from it is drawn at random.
    """
    if isinstance(layout, list):
        columns = [_children(node) for node in (whole, again, fewer)]
        parts = [list(column[0]) for column in columns if column is not None]
        if len(parts) < 3 or any(len(part) != len(layout) for part in parts):
            return UnknownAxis("its parts differ from batch to batch")
        triples = zip(layout, parts[0], parts[1], parts[2], strict=True)
        return [_checked(inner, a, b, c, n) for inner, a, b, c in triples]
    if misfit := misfits(whole, layout, n) or misfits(fewer, layout, n - 1):
        return UnknownAxis(misfit)
    known = layout == CONSTANT or isinstance(layout, int)
    if not known or not _equal(whole, again):
        return layout
    part = _cut(whole, layout, 0, n - 1, ())
    if getattr(part, "shape", None) != getattr(fewer, "shape", None):
        return layout if isinstance(layout, int) else UnknownAxis(
            "its shape depends on the whole batch")
    return layout if _equal(part, fewer) else UnknownAxis(
        "its values depend on the whole batch, and would come from another number of samples")


def misfits(batch: Batch, layout: Layout, n: int) -> str:
    """Why a batch of n samples does not have this layout; '' where it does."""
    if isinstance(layout, list):
        found = _children(batch)
        parts = () if found is None else found[0]
        if len(parts) != len(layout):
            return f"it has {len(parts)} parts instead of {len(layout)}"
        whys = (misfits(part, inner, n) for part, inner in zip(parts, layout, strict=True))
        return next(filter(None, whys), "")
    if isinstance(layout, int):
        shape = tuple(getattr(batch, "shape", ()))
        if len(shape) <= layout or shape[layout] != n:
            return f"{n} samples give shape {shape}, so axis {layout} does not count samples"
    return f"{n} samples give {len(batch)} entries" if (
        layout == PER_SAMPLE and len(batch) != n) else ""


def cut(batch: Batch, layout: Layout, start: int, stop: int) -> Batch:
    """Samples start … stop − 1 of a batch.

    Tensors are views with separate version counters, or copies where a view would be laid out
    otherwise in memory.

    Raises:
        ValueError: a part grows with the batch in a way that is not understood.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), [0, PER_SAMPLE], 1, 3)
        (tensor([1, 2]), ['b', 'c'])
    """
    return _cut(batch, layout, start, stop, ())


def join(
    parts: Sequence[Batch], layout: Layout, join_fn: JoinFn | None = None, pin: bool = False
) -> Batch:
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
    padding_value: float | Mapping[object, float] | None = None,
) -> Tensor:
    """A join_fn: pads every other axis on the right to the longest part, then joins along `axis`.

    Args:
        parts: tensors of one dtype and as many dimensions.
        axis: the one that counts samples.
        path: where in the batch they stand: keys, positions, names of fields.
        padding_value: a number, or {last entry of the path: number}, 0 for those not named except
            labels and targets; bind it with functools.partial. Needed where anything is padded.

    Raises:
        ValueError: a part must be padded, and padding_value does not say with what.

    Example:
        >>> pad_right([torch.ones(1, 2), torch.ones(1, 3)], padding_value=0)
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    value = padding_value
    if isinstance(value, Mapping):
        name = path[-1] if path else None
        meaningful = any(word in str(name).lower() for word in ("label", "target"))
        value = value.get(name, None if meaningful else 0)
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    shape[axis] = sum(part.shape[axis] for part in parts)
    if value is None:
        if any(part.shape[:axis] + part.shape[axis + 1 :] != (*shape[:axis], *shape[axis + 1 :])
               for part in parts):
            name = repr(path[-1]) if path else "the batch"
            raise ValueError(
                f"pad_right must pad {name}, and 0 could be a label: say with what, by join_fn="
                "functools.partial(pad_right, padding_value={'labels': -100, 'input_ids': pad_id})"
                " (names or positions as in the batch; a number pads all).")
        value = 0
    joined = parts[0].new_full(shape, value)
    offset = 0
    for part in parts:
        where = [slice(size) for size in part.shape]
        where[axis] = slice(offset, offset + part.shape[axis])
        joined[tuple(where)] = part
        offset += part.shape[axis]
    return joined


Children = tuple[Sequence[Batch], Sequence[object], Callable[[list[Batch]], Batch]]


def _children(node: Batch) -> Children | None:
    """(parts, their names, how to rebuild) of a container, or None for a leaf."""
    kind = type(node)
    if kind is list or kind is tuple:
        return node, range(len(node)), kind
    if kind is dict:
        return list(node.values()), list(node), lambda parts: dict(zip(node, parts, strict=True))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        parts = [getattr(node, name) for name in names]
        return parts, names, lambda parts: _changed(node, names, parts, object.__setattr__)
    parts, spec = tree_flatten(node, is_leaf=lambda inner: inner is not node)
    if not (len(parts) == 1 and parts[0] is node):
        keys = list(node) if isinstance(node, Mapping) else range(len(parts))
        return parts, keys, lambda parts: tree_unflatten(parts, spec)
    if isinstance(node, MutableMapping):
        return list(node.values()), list(node), lambda parts: _changed(node, node, parts, setitem)
    return None


def _changed(
    node: Batch, names: Iterable[object], parts: list[Batch], change: Callable[..., None]
) -> Batch:
    other = copy.copy(node)
    for name, part in zip(names, parts, strict=True):
        change(other, name, part)
    return other


def _compare(one: Batch, two: Batch) -> Layout:
    def unknown(first: object, second: object) -> UnknownAxis:
        return UnknownAxis(f"a batch of one {first}, a batch of two {second}")

    if type(one) is not type(two):
        return unknown(f"is of type {type(one).__name__}", f"of type {type(two).__name__}")
    if isinstance(one, (Tensor, np.ndarray)):
        sizes = list(zip(one.shape, two.shape, strict=False))
        growing = [axis for axis, (first, second) in enumerate(sizes) if first != second]
        if one.ndim == two.ndim and not growing:
            return CONSTANT
        if one.ndim == two.ndim and len(growing) == 1 and sizes[growing[0]] == (1, 2):
            return growing[0]
        return unknown(f"has shape {tuple(one.shape)}", tuple(two.shape))
    plain = isinstance(one, (list, tuple)) and not hasattr(one, "_fields")
    if plain and (len(one), len(two)) == (1, 2):
        return PER_SAMPLE
    inner, others = _children(one), _children(two)
    if inner is None or others is None:
        return CONSTANT
    if len(inner[0]) != len(others[0]):
        return unknown(f"has {len(inner[0])} parts", len(others[0]))
    return [_compare(mine, theirs) for mine, theirs in zip(inner[0], others[0], strict=True)]


def _refusal(path: Path, why: str, verb: str = "joined") -> ValueError:
    at = " at " + "".join(f"[{part!r}]" for part in path) if path else ""
    return ValueError(f"Batches cannot be {verb}{at}: {why}. {_FIX}")


def _parts(
    batch: Batch, layout: Layout, path: Path
) -> tuple[list[tuple[Batch, Layout, Path]], Callable[[list[Batch]], Batch]]:
    """([(part, its layout, its path)], how to rebuild) of a container."""
    found = _children(batch)
    if found is None or not isinstance(layout, list):
        unknown = isinstance(layout, UnknownAxis)
        why = str(layout) if unknown else f"{type(batch).__name__} has no parts"
        raise _refusal(path, why, "cut or joined")
    parts, names, rebuild = found
    triples = zip(parts, layout, names, strict=True)
    return [(part, inner, (*path, name)) for part, inner, name in triples], rebuild


def _cut(batch: Batch, layout: Layout, start: int, stop: int, path: Path) -> Batch:
    if layout == CONSTANT:
        return batch
    if layout == PER_SAMPLE:
        return batch[start:stop]
    if not isinstance(layout, int):
        parts, rebuild = _parts(batch, layout, path)
        return rebuild([_cut(part, inner, start, stop, at) for part, inner, at in parts])
    if not isinstance(batch, Tensor):
        return batch[(slice(None),) * layout + (slice(start, stop),)]
    # .data, because views of one tensor share a version counter: changing one batch in place
    # would spoil the graph of another.
    view = batch.data.narrow(layout, start, stop - start)
    if view.device.type != "cpu" or view.is_pinned():
        return view  # goes to a device, where it is laid out again
    # A copy begins at a multiple of 64 bytes, as any new tensor does. Otherwise a matrix product
    # does not give the same bits (tried with MKL).
    return view.clone() if layout or view.data_ptr() % _ALIGNMENT else view


def _join(
    batches: Sequence[Batch], layout: Layout, join_fn: JoinFn | None, pin: bool, path: Path
) -> Batch:
    first = batches[0]
    if layout == CONSTANT:
        if not all(_equal(first, batch) for batch in batches[1:]):
            raise _refusal(path, "what does not grow with the batch differs between chunks")
        return first
    if layout == PER_SAMPLE:
        return type(first)(entry for batch in batches for entry in batch)
    if isinstance(layout, int):
        return _join_arrays(batches, layout, join_fn, pin, path)
    _, rebuild = _parts(first, layout, path)
    columns = zip(*(_parts(batch, layout, path)[0] for batch in batches), strict=True)
    return rebuild([
        _join([part for part, _, _ in column], column[0][1], join_fn, pin, column[0][2])
        for column in columns])


def _join_arrays(
    parts: Sequence[Batch], axis: int, join_fn: JoinFn | None, pin: bool, path: Path
) -> Batch:
    first = parts[0]
    if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) > 1:
        if join_fn is None:
            shapes = [tuple(part.shape) for part in parts]
            raise _refusal(path, f"shapes {shapes} differ beyond axis {axis}")
        return join_fn(parts, axis, path)
    if not isinstance(first, Tensor):
        return np.concatenate(parts, axis)
    pinned = None
    if pin and first.is_pinned() and len({part.dtype for part in parts}) == 1:
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        pinned = torch.empty(shape, dtype=first.dtype, pin_memory=True)
    return torch.cat(list(parts), axis, out=pinned)


def _equal(one: Batch, other: Batch) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    try:
        return bool(one == other)
    except Exception:
        return one is other
