"""Settling one layout per layer from all its calls, or saying why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adabatch.check.inference import consistent_layouts, is_live, layouts_by_shape, rows_are_pure
from adabatch.check.listening import Call, PassRecord
from adabatch.check.owners import ParameterOwner
from adabatch.grad_sample.layout import Layout

# Dimensions of each output of each call that grow with the number of samples; None: not known.
BatchDims = list[list[frozenset[int]]] | None

PACKED = "takes or returns a PackedSequence, whose rows are ordered by length; pad the sequences instead"
NOT_FINITE = "its output gradient is not finite on this batch"
MIXES = "mixes samples: a row of its output gradient depends on the losses of several samples, so no per-sample gradient exists"
UNKNOWN_ORDER = (
    f"each row of its output belongs to one sample, but in none of the known layouts ({', '.join(layout.value for layout in Layout)}); "
    "call it once with all samples, ordered in one of these"
)


@dataclass(frozen=True)
class LayoutResult:
    """A layer's layout, or None with the reason; a reason beside a layout is a remark."""

    layout: Layout | None
    reason: str = ""
    refused: bool = False


def settle(owner: ParameterOwner, first: PassRecord, second: PassRecord, ratios: Tensor, batch_dims: BatchDims) -> LayoutResult:
    """One layout for all calls of a layer."""
    calls = list(zip(first.calls[owner.name], second.calls[owner.name], strict=False))
    if len(first.calls[owner.name]) != len(second.calls[owner.name]):
        return LayoutResult(None, "was called a different number of times with the same inputs and random state", refused=True)
    if any(call.packed for call, _ in calls):
        return LayoutResult(None, PACKED, refused=True)
    possible: list[list[Layout]] = []
    for index, (call, again) in enumerate(calls):
        dims = batch_dims[index] if batch_dims is not None and len(batch_dims) == len(calls) and len(batch_dims[index]) == len(call.shapes) else None
        settled = _settle_call(owner.module, call, again, ratios, dims)
        if isinstance(settled, str):
            return LayoutResult(None, settled, refused=True)
        if settled:
            possible.append(settled)
    if not possible:
        return _without_gradient([call for call, _ in calls], ratios, batch_dims)
    common = [layout for layout in possible[0] if all(layout in others for others in possible)]
    if not common:
        listed = " and ".join(dict.fromkeys(str(layouts[0]) for layouts in possible))
        return LayoutResult(None, f"is called in different layouts: {listed}; use a layer of its own for each, or one layout", refused=True)
    return LayoutResult(common[0])


def _settle_call(layer: nn.Module, call: Call, again: Call, ratios: Tensor, dims: list[frozenset[int]] | None) -> list[Layout] | str:
    """The possible layouts of one call, the preferred one first; [] if no gradient came; or the reason why there is none."""
    live = [index for index in range(len(call.shapes)) if is_live(call.backprops.get(index), again.backprops.get(index))]
    if not live:
        return []
    found: list[tuple[int, list[Layout]]] = []
    for index in live:
        layouts = _settle_output(call.backprops[index], again.backprops[index], ratios, dims[index] if dims else None)
        if isinstance(layouts, str):
            return layouts
        found.append((index, layouts))
    if isinstance(layer, nn.RNNBase):  # hidden states are [layers, N, H] whatever batch_first says
        return [Layout.BATCH_FIRST if layer.batch_first else Layout.BATCH_SECOND] if live[0] else found[0][1]
    if isinstance(layer, nn.MultiheadAttention):  # attention weights are [N, ...] whatever batch_first says
        return found[0][1]
    common = [layout for layout in found[0][1] if all(layout in layouts for _, layouts in found)]
    return common or f"returns tensors of different layouts: {' and '.join(dict.fromkeys(str(layouts[0]) for _, layouts in found))}; let it return one layout"


def _settle_output(first: Tensor, second: Tensor, ratios: Tensor, dims: frozenset[int] | None) -> list[Layout] | str:
    if not (first.isfinite().all() and second.isfinite().all()):
        return NOT_FINITE
    layouts = consistent_layouts(first, second, ratios, dims)
    if layouts:
        return layouts
    if rows_are_pure(first, second, ratios):
        return UNKNOWN_ORDER
    shape_says_shared = first.dim() == 0 or first.shape[0] == 1 or not layouts_by_shape(first.shape, len(ratios), None)
    carries_no_sample = shape_says_shared if dims is None else not dims
    return [Layout.SHARED] if carries_no_sample and first.dim() else MIXES


def _without_gradient(calls: list[Call], ratios: Tensor, batch_dims: BatchDims) -> LayoutResult:
    if not calls:
        return LayoutResult(None, "not called with a gradient on this batch")
    shapes = [call.shapes[0] for call in calls if call.shapes]
    known = batch_dims[0][0] if batch_dims and batch_dims[0] else None
    layouts = layouts_by_shape(shapes[0], len(ratios), known) if shapes else []
    return LayoutResult(layouts[0] if len(layouts) == 1 else None, "no gradient reached its output on this batch")
