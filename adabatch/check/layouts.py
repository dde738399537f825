"""Inferring each layer's layout from two backward passes whose samples are weighted differently.

The weights of the second pass are w'_i = ρ_i w_i with ρ_i different powers of two. What belongs to
sample i alone is then, in the second pass, ρ_i times what it was in the first: bit for bit, since
scaling by a power of two commutes with rounding. A layout is consistent when this holds for all its
samples; rows of zeros say nothing. Where no layout is, single rows show whether the layer mixes
samples or only orders them otherwise.

A dimension as long as the batch need not be the batch's: a smaller batch is run as well, and its
losses are compared with those of the same samples in the larger one. N samples.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adabatch._tree import Path, map_tensors, tensors
from adabatch._types import Batch
from adabatch.check.passes import Call, CheckedModel, ParameterOwner, PassRecord, run_trial
from adabatch.grad_sample.layout import BatchSizeSource, Layout

MAX_SAMPLES, MAX_GUESSES = 8, 64
# Far above what unordered atomic additions leave behind, far below the factor between samples.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}
BATCHED = (Layout.BATCH_FIRST, Layout.BATCH_SECOND, Layout.FLAT_BATCH_MAJOR, Layout.FLAT_TIME_MAJOR)

PACKED = ("takes or returns a PackedSequence, whose rows are ordered by length; pad the sequences "
          "instead")
NOT_FINITE = "its output gradient is not finite on this batch"
MIXES = ("mixes samples: a row of its output gradient depends on the losses of several samples, so "
         "no per-sample gradient exists")
UNKNOWN_ORDER = ("each row of its output belongs to one sample, but in none of the known layouts "
                 f"({', '.join(map(str, Layout))}); call it once with all samples, ordered in one "
                 "of these")

# Dimensions of each output of each call that grow with the number of samples; None: not known.
BatchDims = list[list[frozenset[int]]]

Cut = dict[Path, int]  # {path of a tensor in the batch: its dimension of the samples}


@dataclass(frozen=True)
class LayoutResult:
    """A layer's layout, or None with the reason; a reason alongside a layout is a remark."""

    layout: Layout | None
    reason: str = ""
    refused: bool = False


def draw_weights(n_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights w [N], uniform in [0.5, 1.5), and ratios ρ [N], a random order of 1, 2, 4, ...: below
    1 they would let small half-precision gradients underflow."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_samples, generator=generator, dtype=torch.float64) + 0.5
    return weights, 2.0 ** torch.randperm(n_samples, generator=generator).double()


def layouts_by_shape(
    shape: torch.Size, n_samples: int, dims: frozenset[int] | None
) -> list[Layout]:
    """The layouts that a shape allows; with one position per sample a flat one is batch_first."""
    first, second, *_ = (*shape, 0, 0)
    flat = first > n_samples and first % n_samples == 0
    fits = dict(zip(BATCHED, (first == n_samples, second == n_samples, flat, flat), strict=True))
    return [layout for layout in BATCHED
            if fits[layout] and (dims is None or int(layout is Layout.BATCH_SECOND) in dims)]


def consistent_layouts(
    first: Tensor, second: Tensor, ratios: Tensor, dims: frozenset[int] | None
) -> list[Layout]:
    """The layouts in which each sample's part of `second` is its ratio times that of `first`; both
    are an output's gradient, in the two passes."""
    def residual(layout: Layout) -> float:
        """max over the samples of ‖b'_i − ρ_i b_i‖ / ‖b'_i‖, where b_i is not zero."""
        split = (layout.split(each, len(ratios)).double() for each in (first, second))
        a, b = (each.reshape(len(ratios), -1) for each in split)
        expected = ratios.to(a)[:, None] * a
        scale = torch.maximum(b.norm(dim=1), expected.norm(dim=1))
        errors = (b - expected).norm(dim=1)[scale > 0] / scale[scale > 0]
        return float(errors.max()) if len(errors) else 0.0

    possible = layouts_by_shape(first.shape, len(ratios), dims)
    return [layout for layout in possible if residual(layout) <= TOLERANCE[first.dtype]]


def rows_are_pure(first: Tensor, second: Tensor, ratios: Tensor) -> bool:
    """Whether each row (along the last dimension) is of one sample: one ratio times the first."""
    width = first.shape[-1] if first.dim() else 1
    a, b = (each.double().reshape(-1, width) for each in (first, second))
    live = (a != 0).any(1)
    a, b, ratios = a[live], b[live], ratios.to(a)
    fitted = (a * b).sum(1) / a.square().sum(1)
    nearest = (fitted[:, None].clamp(min=1e-30).log2() - ratios.log2()).abs().argmin(1)
    residual = (b - ratios[nearest, None] * a).norm(dim=1) / b.norm(dim=1).clamp(min=1e-300)
    return bool((residual <= TOLERANCE[first.dtype]).all())


def infer_layout(
    owner: ParameterOwner, first: PassRecord, second: PassRecord, ratios: Tensor,
    dims: BatchDims | None,
) -> LayoutResult:
    """One layout for all calls of a layer."""
    calls, again = first.calls[owner.name], second.calls[owner.name]
    if len(calls) != len(again):
        reason = "was called a different number of times with the same inputs and random state"
        return LayoutResult(None, reason, refused=True)
    if any(call.packed for call in calls):
        return LayoutResult(None, PACKED, refused=True)
    known = dims if dims is not None and len(dims) == len(calls) else [[]] * len(calls)
    possible: list[list[Layout]] = []
    for call, other, outputs in zip(calls, again, known, strict=True):
        found = _layouts_of_call(owner.module, call, other, ratios, outputs)
        if isinstance(found, str):
            return LayoutResult(None, found, refused=True)
        possible += [found] if found else []
    if not calls:
        return LayoutResult(None, "not called with a gradient on this batch")
    if not possible:
        return _without_gradient(calls, ratios, dims)
    common = [layout for layout in possible[0] if all(layout in others for others in possible)]
    if common:
        return LayoutResult(common[0])
    listed = f"is called in different layouts: {_listed(possible)}"
    return LayoutResult(None, f"{listed}; use a separate layer for each, or one layout", True)


def _layouts_of_call(
    layer: nn.Module, call: Call, again: Call, ratios: Tensor, dims: list[frozenset[int]]
) -> list[Layout] | str:
    """The possible layouts, the preferred one first; [] without a gradient; or what is wrong."""
    live = [index for index, grad in sorted(call.backprops.items())
            if index in again.backprops and grad.any()]
    found: list[list[Layout]] = []
    for index in live:
        known = dims[index] if len(dims) == len(call.shapes) else None
        layouts = _layouts_of_output(call.backprops[index], again.backprops[index], ratios, known)
        if isinstance(layouts, str):
            return layouts
        found.append(layouts)
    if not found:
        return []
    if isinstance(layer, nn.RNNBase) and live[0] > 0:  # hidden states: always [layers, N, H]
        return [Layout.BATCH_FIRST if layer.batch_first else Layout.BATCH_SECOND]
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):  # weights: always [N, ...]
        return found[0]
    common = [layout for layout in found[0] if all(layout in layouts for layouts in found)]
    listed = f"returns tensors of different layouts: {_listed(found)}"
    return common or f"{listed}; let it return one layout"


def _layouts_of_output(
    first: Tensor, second: Tensor, ratios: Tensor, dims: frozenset[int] | None
) -> list[Layout] | str:
    if not (first.isfinite().all() and second.isfinite().all()):
        return NOT_FINITE
    layouts = consistent_layouts(first, second, ratios, dims)
    if layouts:
        return layouts
    if rows_are_pure(first, second, ratios):
        return UNKNOWN_ORDER
    guessed = dims is None and first.dim() > 0 and first.shape[0] > 1
    has_samples = layouts_by_shape(first.shape, len(ratios), None) if guessed else dims
    return MIXES if has_samples or not first.dim() else [Layout.SHARED]


def _without_gradient(calls: list[Call], ratios: Tensor, dims: BatchDims | None) -> LayoutResult:
    shapes = [call.shapes[0] for call in calls if call.shapes]
    known = dims[0][0] if dims and dims[0] else None
    layouts = layouts_by_shape(shapes[0], len(ratios), known) if shapes else []
    layout = layouts[0] if len(layouts) == 1 else None
    return LayoutResult(layout, "no gradient reached its output on this batch")


def _listed(possible: list[list[Layout]]) -> str:
    return " and ".join(dict.fromkeys(str(layouts[0]) for layouts in possible))


def smaller_batch(
    checked: CheckedModel, batch: Batch, full: PassRecord, n_samples: int
) -> tuple[Batch, PassRecord, Cut] | None:
    """The first n_samples of a batch, a trial of them, with the losses they had in the batch, and
    along which dimensions it was cut: each tensor along one as long as the batch, or not. None
    where no way fits."""
    size, leaves = len(full.losses), tensors(batch)
    choices = [[*(dim for dim, length in enumerate(tensor.shape) if length == size), None]
               for _, tensor in leaves]
    for dims in itertools.islice(itertools.product(*choices), MAX_GUESSES):
        guess = {path: dim for (path, _), dim in zip(leaves, dims, strict=True) if dim is not None}
        part = cut_batch(batch, guess, n_samples)
        try:
            trial = run_trial(checked, part) if guess else None
        except Exception:  # a wrong guess may fail anywhere in the user's code
            continue
        if trial is not None and _same(trial.losses, full.losses[:n_samples]):
            return part, trial, guess
    return None


def _shortened(tensor: Tensor, dim: int, length: int, last: bool = False) -> Tensor:
    """The tensor, which may be sparse, cut to its first entries, or to the last."""
    start = tensor.shape[dim] - length if last else 0
    if tensor.layout is torch.strided:
        return tensor.narrow(dim, start, length)
    return tensor.to_dense().narrow(dim, start, length).to_sparse(layout=tensor.layout)


def depends_on_others(
    checked: CheckedModel, batch: Batch, full: PassRecord, dims: Cut | None
) -> bool:
    """Whether the losses of a batch's first or last samples differ where the rest is left out,
    though nothing is random; dims: as smaller_batch found them, None for the first as long as the
    batch."""
    size = len(full.losses)
    if dims is None:
        dims = {path: tensor.shape.index(size) for path, tensor in tensors(batch)
                if size in tensor.shape}
    # A threshold within the batch may hold for some of them.
    flat = any(path in dims and _may_be_offsets(tensor) for path, tensor in tensors(batch))
    ends = (False,) if flat else (False, True)
    for n_samples, last in itertools.product(range(size - 1, 1, -1), ends):
        before = _random_states()
        try:
            with torch.no_grad():
                losses = checked.loss_fn(checked.model, cut_batch(batch, dims, n_samples, last))
        except Exception:  # the user's code may take no smaller batch
            break
        same = all(map(torch.equal, before, _random_states()))
        if not same or losses.shape != (n_samples,):
            break
        if not _same(losses, full.losses[-n_samples:] if last else full.losses[:n_samples]):
            return True
    return False


def _random_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def cut_batch(batch: Batch, dims: Cut, n_samples: int, last: bool = False) -> Batch:
    """The first samples of a batch, whose tensors have them along those dimensions; flat ones, into
    which offsets among them point, up to the end of the last sample. Or its last samples."""
    leaves = tensors(batch)
    pointers = [tensor for path, tensor in leaves if path in dims and _may_be_offsets(tensor)]
    offsets = max(pointers, key=lambda tensor: int(tensor[-1]), default=None)

    def cut(path: Path, tensor: Tensor) -> Tensor:
        if path in dims:
            return _shortened(tensor, dims[path], n_samples, last)
        if offsets is not None and tensor.dim() == 1 and len(tensor) >= int(offsets[-1]):
            return _shortened(tensor, 0, int(offsets[n_samples]))
        return tensor

    return map_tensors(batch, cut)


def _may_be_offsets(tensor: Tensor) -> bool:
    """Whether it may hold where each sample begins in flat tensors, as nn.EmbeddingBag takes it."""
    integers = tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return integers and int(tensor[0]) == 0 and bool((tensor.diff() >= 0).all())


def _same(losses: Tensor, expected: Tensor) -> bool:
    rtol = 1e-3 if losses.dtype in (torch.float32, torch.float64) else 5e-2
    a, b = losses.double(), expected.double()
    return a.shape == b.shape and torch.allclose(a, b, rtol, rtol * float(b.abs().mean()))


def batch_dims(large: PassRecord, small: PassRecord | None) -> dict[str, BatchDims]:
    """{layer's name: the dimensions that grow with the samples}, of layers called alike in both."""
    found: dict[str, BatchDims] = {}
    if small is None:
        return found
    for name in large.calls:
        first, second = ([call.shapes for call in each.calls[name]] for each in (large, small))
        ranks = [[[len(shape) for shape in call] for call in each] for each in (first, second)]
        if ranks[0] == ranks[1]:
            found[name] = [
                [frozenset(dim for dim, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
                 for pair in zip(*calls, strict=True)]
                for calls in zip(first, second, strict=True)]
    return found


def find_batch_size_source(
    model: nn.Module, large: PassRecord, small: PassRecord | None
) -> BatchSizeSource | None:
    """Where the model's inputs count samples: the first dimension with N and n in the two trials;
    without a small trial the only dimension of length N of some input; else None."""
    if large.inputs is None or (small is not None and small.inputs is None):
        return None
    size = len(large.losses)
    shapes = {} if small is None else {path: tensor.shape for path, tensor in _inputs(small)}
    for path, tensor in _inputs(large):
        dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
        if small is not None:
            other = shapes.get(path, torch.Size())
            dims = dims if len(other) == tensor.dim() else []
            dims = [dim for dim in dims if other[dim] == len(small.losses)]
        if dims and (small is not None or len(dims) == 1):
            return _source(model, path, dims[0])
    return None


def _inputs(record: PassRecord) -> list[tuple[Path, Tensor]]:
    args, kwargs = record.inputs or ((), {})
    return [*tensors(args), *tensors(kwargs)]


def _source(model: nn.Module, path: Path, dim: int) -> BatchSizeSource:
    parameters = inspect.signature(model.forward).parameters
    named = [name for name, each in parameters.items()
             if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    argument, *rest = path
    if isinstance(argument, int):
        name = named[argument] if argument < len(named) else None
        return BatchSizeSource(argument, name, tuple(rest), dim)
    position = named.index(argument) if argument in named else None
    return BatchSizeSource(position, argument, tuple(rest), dim)
