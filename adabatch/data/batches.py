"""Batches cut and joined: the axis of each tensor that counts samples, learnt from collate_fn.

Legend: N samples in a batch. A layout is a tree like the batch: an int is the axis of a tensor or
array that counts samples, a PaddedAxis one whose other sizes depend on the whole batch, PER_SAMPLE
a list or tuple with one entry for each sample, CONSTANT what does not grow with the batch, a list
the layouts of a container's parts, UnknownAxis the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from operator import setitem
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from adabatch._tree import Path
from adabatch._types import Batch, CollateFn, Sample

_ALIGNMENT = 64
_LABELS = re.compile(r"label|target|answer|(^|_)(ys?|tags?|gold|class(es)?)($|_)")
PER_SAMPLE, CONSTANT = "per sample", "constant"
Layout: TypeAlias = "int | str | list[Layout] | None"
# What must be equal in all batches: shapes beyond the samples' axis, constants, names of parts.
Fixed: TypeAlias = Any
JoinFn = Callable[..., Batch]
_FIX = (
    "Let collate_fn give every chunk the same shapes, pass join_fn= (functools.partial(pad_right, "
    "padding_value=...) of adabatch.data pads), or collate whole batches: collate_in='consumer'.")


_OF_BATCH = "its values depend on the whole batch, and would come from another number of samples"


class PaddedAxis(int):
    """The axis that counts samples where the other sizes depend on the whole batch."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PaddedAxis) and int(self) == int(other)

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        return f"PaddedAxis({int(self)})"


class UnknownAxis(str):
    """Why a part of a batch can be neither cut nor joined."""

    __slots__ = ()


def learn_layout(
    collate_fn: CollateFn, sample: Sample, others: Sequence[Sample] | None = None,
    values: bool = True,
) -> Layout:
    """The layout of batches of samples like this one, from a batch of one and a batch of two.

    What a batch with the others, cut, does not share with batches of one sample is marked
    UnknownAxis, or PaddedAxis where only other sizes differ: flat sequences that seemed to count
    samples, values derived from the whole batch or from the place in it. others None: it is known
    that there are none. values False: values may depend on the whole batch, which is to be cut.

    Example:
        >>> learn_layout(torch.utils.data.default_collate, {"image": torch.zeros(3), "name": "a"})
        [0, 'per sample']
    """
    try:
        # Copies, because a collate_fn may take samples apart.
        one, two = (collate_fn([copied(sample) for _ in range(n)]) for n in (1, 2))
    except Exception as error:
        return UnknownAxis(
            f"collate_fn raised {type(error).__name__} ({error}) on a batch of one or two samples, "
            "from which its layout is learnt")
    layout = _compare(one, two)
    if others is None:
        return layout
    samples = [sample, *(others or [sample])]
    # Backwards too: a collate_fn may sort what came in order by chance.
    for order in (samples, samples[::-1]):
        try:
            whole, again = (collate_fn([copied(each) for each in order]) for _ in range(2))
            alone = [collate_fn([copied(each)]) for each in order]
        except Exception:
            return layout  # which the batch itself will raise
        for batch, size in ((whole, len(order)), *((each, 1) for each in alone)):
            layout = held_to(layout, batch, size, None)[0]
        for at, single in enumerate(alone if values else ()):
            layout = _checked(layout, whole, again, single, at)
    return layout


def copied(sample: Sample) -> Sample:
    """A deep copy; of what has none (nested tensors, locks), new containers with tensors cloned."""
    try:
        return copy.deepcopy(sample)
    except Exception:
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, sample)


def _checked(layout: Layout, whole: Batch, again: Batch, single: Batch, at: int) -> Layout:
    """The layout, with UnknownAxis where sample `at` of a whole batch is not `single`: what
    collating it alone gives.

    again: the whole batch collated once more; what differs from it is drawn at random.
    """
    if isinstance(layout, list):
        columns = [_children(node) for node in (whole, again, single)]
        parts = [column[0] for column in columns if column is not None]
        return [_checked(inner, a, b, c, at)
                for inner, a, b, c in zip(layout, *parts, strict=True)]
    if isinstance(layout, UnknownAxis) or not _equal(whole, again):
        return layout
    part = _cut(whole, layout, at, at + 1, ())
    if getattr(part, "shape", None) != getattr(single, "shape", None):
        return PaddedAxis(layout) if isinstance(layout, int) else UnknownAxis(
            "its shape depends on the whole batch")
    return layout if _equal(part, single) else UnknownAxis(_OF_BATCH)


def held_to(layout: Layout, batch: Batch, n: int, before: Fixed) -> tuple[Layout, Fixed]:
    """(the layout, with UnknownAxis or PaddedAxis where a batch of n samples shows that it does
    not hold, what must not differ between batches); before: the latter of an earlier batch.

    Example:
        >>> layout, fixed = held_to([0, CONSTANT], (torch.ones(2, 3), 7), 2, None)
        >>> layout, held_to([0, CONSTANT], (torch.ones(1, 4), 7), 1, fixed)[0]
        ([0, 'constant'], [PaddedAxis(0), 'constant'])
    """
    if isinstance(layout, list):
        names: list[object] = []
        parts: Sequence[Batch] = ()
        if (found := _children(batch)) is not None:
            parts, names = found[0], list(found[1])
        if len(parts) != len(layout) or (before is not None and before[0] != names):
            return UnknownAxis("its parts differ from batch to batch"), None
        olds = before[1] if before is not None else [None] * len(parts)
        held = [held_to(inner, part, n, old)
                for inner, part, old in zip(layout, parts, olds, strict=True)]
        return [inner for inner, _ in held], (names, [fixed for _, fixed in held])
    if isinstance(layout, int):
        shape = tuple(getattr(batch, "shape", ()))
        if len(shape) <= layout or shape[layout] != n:
            return UnknownAxis(
                f"{n} samples give shape {shape}, so axis {layout} does not count samples"), None
        others = shape[:layout] + shape[layout + 1 :]
        padded = before is not None and before != others
        return PaddedAxis(layout) if padded else layout, others
    if layout == PER_SAMPLE and len(batch) != n:
        return UnknownAxis(f"{n} samples give {len(batch)} entries"), None
    if layout == CONSTANT:
        if before is not None and not _equal(before[0], batch):
            return UnknownAxis("what does not grow with the batch differs between chunks"), None
        return layout, (batch,)
    return layout, None


def is_known(layout: Layout) -> bool:
    """Whether batches of this layout can be cut and joined."""
    if isinstance(layout, list):
        return all(map(is_known, layout))
    return not isinstance(layout, UnknownAxis)


def merged(one: Layout, other: Layout) -> Layout:
    """A layout that refuses what either of two refuses.

    Example:
        >>> merged([0, 0, CONSTANT], [0, PaddedAxis(0), UnknownAxis("a count")])
        [0, PaddedAxis(0), 'a count']
    """
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [merged(mine, theirs) for mine, theirs in zip(one, other, strict=True)]
    if one == other or isinstance(one, UnknownAxis):
        return one
    if isinstance(one, int) and isinstance(other, int) and int(one) == int(other):
        return PaddedAxis(one)
    return other if isinstance(other, UnknownAxis) else UnknownAxis(
        "its layout differs from batch to batch")


def cut(batch: Batch, layout: Layout, start: int, stop: int, padded: bool = True) -> Batch:
    """Samples start … stop − 1 of a batch.

    Tensors are views with separate version counters, or copies where a view would be laid out
    otherwise in memory.

    Args:
        padded: whether what is padded to the whole batch may be cut, and stay so.

    Raises:
        ValueError: a part grows with the batch in a way that is not understood, or is padded.

    Example:
        >>> cut((torch.arange(4), ["a", "b", "c", "d"]), [0, PER_SAMPLE], 1, 3)
        (tensor([1, 2]), ['b', 'c'])
    """
    return _cut(batch, layout, start, stop, (), padded)


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
        padding_value: a number, or {last entry of the path: number}, 0 for those not named; bind it
            with functools.partial. Needed where anything is padded. What may hold labels (parts of
            a tuple after the first, names like labels, targets, tags, y) must be named.

    Raises:
        ValueError: a part must be padded, and padding_value does not say with what.

    Example:
        >>> pad_right([torch.ones(1, 2), torch.ones(1, 3)], padding_value=0)
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    value, name = padding_value, path[-1] if path else None
    labels = name != 0 if isinstance(name, int) else bool(_LABELS.search(str(name).lower()))
    if isinstance(value, Mapping):
        value = value.get(name, None if labels else 0)
    elif labels:
        value = None  # a number is that of the inputs
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    shape[axis] = sum(part.shape[axis] for part in parts)
    if value is None:
        if any(part.shape[:axis] + part.shape[axis + 1 :] != (*shape[:axis], *shape[axis + 1 :])
               for part in parts):
            part_name = "the batch" if name is None else repr(name)
            raise ValueError(
                f"pad_right must pad {part_name}, and 0 could be a label: say with what, by "
                "join_fn=functools.partial(pad_right, padding_value={'labels': -100, 'input_ids': "
                "pad_id}), names (or positions in a tuple) as in the batch.")
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
    if isinstance(one, Tensor) and (one.is_nested or one.layout in _COMPRESSED):
        return UnknownAxis("torch does not cut nested or compressed sparse tensors")
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


def _cut(
    batch: Batch, layout: Layout, start: int, stop: int, path: Path, padded: bool = True
) -> Batch:
    if layout == CONSTANT:
        return batch
    if layout == PER_SAMPLE:
        return batch[start:stop]
    if not isinstance(layout, int):
        parts, rebuild = _parts(batch, layout, path)
        return rebuild([_cut(part, inner, start, stop, at, padded) for part, inner, at in parts])
    if isinstance(layout, PaddedAxis) and not padded:
        raise _refusal(path, "its shape depends on the samples it is collated with", "cut")
    if not isinstance(batch, Tensor):
        return batch[(slice(None),) * layout + (slice(start, stop),)]
    if batch.layout is torch.sparse_coo:
        return batch.narrow_copy(layout, start, stop - start)
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
    columns = list(zip(*(_parts(batch, layout, path)[0] for batch in batches), strict=True))
    if any(part[2] != column[0][2] for column in columns for part in column[1:]):
        raise _refusal(path, "chunks have parts of other names, or in another order")
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
            raise _refusal(path, f"shapes {shapes} differ beyond axis {int(axis)}")
        return join_fn(parts, int(axis), path)
    if len({part.dtype for part in parts}) > 1:
        raise _refusal(path, f"dtypes {[part.dtype for part in parts]} differ between chunks")
    if not isinstance(first, Tensor):
        return np.concatenate(parts, axis)
    pinned = None
    if pin and first.is_pinned():
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        pinned = torch.empty(shape, dtype=first.dtype, pin_memory=True)
    return torch.cat(list(parts), axis, out=pinned)


def _equal(one: Batch, other: Batch) -> bool:
    """Whether two leaves are equal, NaN to NaN."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.dtype != other.dtype:
            return False
        if _is_strided(one) and _is_strided(other):
            return torch.equal(one, other) or _all_equal(one, other)
        mine, theirs = _strided_parts(one), _strided_parts(other)
        return len(mine) == len(theirs) and all(map(_equal, mine, theirs))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other)) or (
            one.dtype.kind in "fc" and bool(np.array_equal(one, other, equal_nan=True)))
    try:
        if type(one) is type(other) and bool(one == other or (one != one and other != other)):
            return True
    except Exception:  # of what holds tensors
        inner, others = _children(one), _children(other)
        return inner is not None and others is not None and (
            list(inner[1]) == list(others[1])) and all(map(_equal, inner[0], others[0]))
    return False


_COMPRESSED = torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """What a nested or sparse tensor, which torch.equal does not compare, consists of."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is torch.strided:
        return [tensor]
    entries = tensor.detach().to_sparse_coo().coalesce()
    return [torch.tensor(tensor.shape), entries.indices(), entries.values()]


def _all_equal(one: Tensor, other: Tensor) -> bool:
    return one.is_floating_point() and one.shape == other.shape and bool(
        ((one == other) | (one.isnan() & other.isnan())).all())
