"""Placing taps while the forward pass runs: behind the layers, and behind the operations in which
traced parameters meet samples.

Legend: N samples in the batch, S measured.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.estimators.gradients import is_sharded, is_transformed, running_backward
from adabatch._hooks import FinallyCall, UncopiedHook
from adabatch._tree import input_tensors, packed_sequence
from adabatch._types import Args, Kwargs
from adabatch.grad_sample.backward.finish import PACKED
from adabatch.grad_sample.backward.recorder import BackwardRecorder, ProbeSet, Report
from adabatch.grad_sample.backward.verify import is_distributed, is_power_of_two
from adabatch.grad_sample.compat import (
    compiles_frames, is_compiled, uncompiled, while_tracing,
)
from adabatch.grad_sample.cost import called_shapes
from adabatch.grad_sample.functional import ParameterTracer, TracedOp
from adabatch.grad_sample.functional.flow import Key, Roles, SampleFlow, has_equal_rows
from adabatch.grad_sample.layers.generic import RecomputedCall, call_type
from adabatch.grad_sample.layers.state import LayerState, draws_taken_back
from adabatch.grad_sample.layout import BatchSizeSource, Layout
from adabatch.grad_sample.rows import RowSampler
from adabatch.grad_sample.taps.base import (
    DEFERRED_COMPILED, RecomputeTap, TapSite, fuse, pass_through,
)
from adabatch.grad_sample.taps.layer_traces import LayerTraces
from adabatch.grad_sample.taps.linear_vectors import has_vectors, pass_vectors
from adabatch.grad_sample.taps.products import fuse_product, may_fuse
from adabatch.grad_sample.taps.sharded_layers import check_parallel

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

NO_LAYER = (
    "a compiled graph cannot measure parameters that no layer with a tap uses: {names}. Run the "
    "model uncompiled, or pass ignore=[...]"
)
COUNTED = (
    " The number of samples, {n_samples}, was read from dimension 0 of the first tensor that the "
    "model was called with. If that tensor carries no samples: call the model with the samples "
    "first, or pass layout=adabatch.check(model, batch, loss_fn), which finds them"
)
SINGLE_NUMBER = (
    "{name} returns a single number for the whole batch, so that its parameters can only be "
    "measured in the operations where they meet the samples: {error}. Let it return a value for "
    "each sample, and average outside of it, or pass ignore=[{name!r}]"
)
NO_BATCH = (
    "{name} is called with a tensor of shape {shape} and gives {given}: it has no batch dimension, "
    "so that the samples cannot be told apart. Add one, tensor.unsqueeze(0), or pass "
    "ignore=[{name!r}].{remark}"
)
OUTSIDE = (
    ". Called outside of the model's forward: {listed}. What has no row for each sample, such as a "
    "table of classes, can only be measured inside of it: make that call in the model's forward"
)
NOT_TRACED = (
    "these are only seen in eager mode and inside of the model's own forward, so call it there")
# A layer that was called first in a pass without tracing is awaited in so many traced ones.
PATIENCE = 64
# Of passes with other uses: more are not told apart, and all passes traced to their end.
MOST_SEQUENCES = 16
SHARED_TABLES = "position tables that are looked up once for all samples"

# Names of this module: each look-up along torch's large modules reads memory that the step has
# just evicted from the caches.
is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_tracing = torch.jit.is_tracing


def can_measure() -> bool:
    """Whether gradients are taken of what runs now: not under no_grad, nor while a model is
    exported, traced, transformed by torch.func or differentiated in forward mode."""
    # The flag: torch.compiler.is_exporting() is True in every graph compiled by torch before 2.13.
    if not _is_grad_enabled() or torch.compiler._is_exporting_flag:
        return False
    return is_compiling() or not (_is_tracing() or is_transformed())


class _First(TypedDict):
    prepend: bool
    with_kwargs: bool


FIRST = _First(prepend=True, with_kwargs=True)


@dataclass(slots=True)
class OutsideCalls:
    """Calls of layers outside of the model's forward, or beside compiled graphs, since the last
    backward pass.

    Attributes:
        batch: the tensor that gave N when the model itself was called.
        n_calls: calls so far.
        task: the last backward pass that ran through one; `inputs` and `names` are of this pass.
        inputs: what the layers were called with, with roles and sizes; what was computed is known
            by what it was computed from.
        names: of the layers called outside.
    """

    batch: Tensor | None = None
    n_calls: int = 0
    task: int = -1
    inputs: list[tuple[Key, Tensor, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class ForwardHooks:
    """The forward hooks of a model.

    The first measured forward pass of an eager model is always traced: that finds position tables
    looked up without a batch dimension and weights used without calling their layer. If it finds
    none, tracing pauses until the next pass whose sums are compared with the gradient.

    Args:
        sites: the layers with a tap; the last one stands for the traced operations.
        parameters: all measured parameters by name.
        traced: names of those that belong to no site.
        batch_size_source: where N is read from the model's inputs; None for dimension 0 of the
            first tensor.
        settled: names of the layers whose layout is known.
        roles: what is known of inputs whose samples the data flow does not show.

    Attributes:
        open_roles: {what may or may not carry samples: its size, N} of the forward passes since
            this was last cleared, which then are not measured.
        not_followed: names of layers called in this pass, which is not traced, and in no traced one
            before: whether their inputs carry samples is not known.
        input_sizes: of all dimensions of the model's input tensors since this was last cleared;
            empty where layouts are given.
        operation_shapes: {name: arguments of operation_cost} of the operations on traced
            parameters, for the cost model.
        forward_sizes: N of the taps placed since the last backward pass.
        recomputing_task: the backward pass in which activation checkpointing last ran a layer
            again, or -1.
        check_all: raises where parameters of the model were replaced, listing all.
        packed_size: N of the PackedSequence with which the model was last called; None for another
            input.
        called, traced: whether the model itself was called since the last backward pass, and
            whether the whole call was traced.
        outside: calls outside of the model's forward since the last backward pass.
        stays: the hooks are not taken off any more while nothing is measured.

    A pass whose sums are not compared is traced up to the last use of a traced parameter or of a
    layer without samples, if its uses so far are those of passes that were traced to their end.
    """

    def __init__(
        self, sites: Sequence[TapSite], parameters: dict[str, Tensor], traced: frozenset[str],
        probes: ProbeSet, row_sampler: RowSampler, recorder: BackwardRecorder,
        batch_size_source: BatchSizeSource | None = None, settled: Collection[str] = (),
        roles: Roles | None = None,
    ):
        self.enabled, self.stays, self.recomputing_task = True, False, -1
        self.input_sizes: set[int] = set()
        self.forward_sizes: set[int] = set()
        self.packed_size: int | None = None
        self.operation_shapes: dict[str, tuple[tuple[int, ...], int, bool]] = {}
        self._sites, self._parameters, self._traced = sites, parameters, traced
        self._probes, self._row_sampler, self._recorder = probes, row_sampler, recorder
        self._check = recorder.sum_check
        self.called = self.traced = False
        self.check_all: Callable[[], None] = lambda: None
        self._source = batch_size_source
        self._layers_settled, self.roles = settled, Roles() if roles is None else roles
        self.roles.trusts_sizes = any(is_sharded(each) for each in parameters.values())
        self.open_roles: dict[Key, int] = {}
        self.not_followed: set[str] = set()
        self._awaited, self._patience = set[str](), 0
        self._must_trace = bool(traced) or any(site.layout is Layout.SHARED for site in sites)
        self._needs_size = any(not site.layout.stores_batch_size for site in sites)
        self._buffers: list[tuple[dict[str, Tensor | None], str]] = []
        self._tracing = True
        self._tracer: ParameterTracer | None = None
        self._call: FinallyCall | None = None
        self._uses = KnownUses()
        self._traces = LayerTraces(parameters)
        self._n_samples: int | None = None
        self._before: dict[int, object] = {}
        self._handles: list[RemovableHandle] = []
        self._tracing_handles: list[RemovableHandle] = []
        self._copies: list[RemovableHandle] = []  # of what copies of the model have in their place
        self._model_handle: RemovableHandle | None = None
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._owner: Callable[[], object] = lambda: None
        self._may_trace = self._has_grad_input = self._paused_before = False
        self._unsettled = self._unclear = False
        self._inside = True  # or it cannot be known
        self.outside = OutsideCalls()

    def attach(self, model: nn.Module, owner: object) -> None:
        """Put the hooks on the model; they keep `owner` alive, and copies of the model are without
        them."""
        self._model, self._owner = weakref.ref(model), weakref.ref(owner)
        self._may_trace = not any(is_compiled(module) for module in model.modules())
        self._tracing = self._must_trace or self._may_trace
        self._attach_to_layers(owner)
        if self._tracing or self._needs_size:
            self._attach_tracing(model, owner)

    def _attach_to_layers(self, owner: object) -> None:
        """Put the hooks on the layers that place the taps."""
        for site in self._sites[:-1]:
            layer = site.layer_reference()
            if layer is None:  # it may have been removed from the model
                continue
            hook = self._bound(self._after_layer, site, owner)
            self._handles.append(hook.held(layer.register_forward_hook(hook, **FIRST)))
            if site.sampler is None:
                hook = self._bound(self._before_call, site, owner)
                self._handles.append(hook.held(
                    layer.register_forward_pre_hook(hook, with_kwargs=True)))
            if site.in_operations:
                hook = self._bound(self._end_trace, site, owner)
                self._handles.append(hook.held(
                    layer.register_forward_hook(hook, prepend=True, always_call=True)))

    def _bound(
        self, method: Callable[..., object], first: object, owner: object
    ) -> UncopiedHook:
        """The hook that calls the method with `first`, and keeps `owner` alive."""
        return UncopiedHook(partial(method, first), self._copies, owner)

    def _attach_tracing(self, model: nn.Module, owner: object) -> None:
        """Put the hooks on the model that tracing needs."""
        handles = self._tracing_handles

        for site in self._sites[:-1]:
            hook = self._bound(self._before_layer, site, owner)
            layer = site.layer_reference()
            if layer is not None:  # it may have been removed from the model
                handles.append(hook.held(layer.register_forward_pre_hook(hook, **FIRST)))
        self._buffers = [(module._buffers, name) for module in model.modules()
                         for name in module._buffers]
        self._attach_to_model(model, owner)
        hook = self._bound(self._after_model, weakref.ref(model), owner)
        handles.append(hook.held(model.register_forward_hook(hook, always_call=True)))
        if self._call is None:
            self._call = FinallyCall(model, self._leave_model)
            self._inside = not self._call.placed

    def _attach_to_model(self, model: nn.Module, owner: object) -> None:
        """Put the hook on the model that begins a pass: last, so that it runs before the hook of a
        layer that is the model itself."""
        if self._model_handle is not None:
            self._model_handle.remove()
        hook = self._bound(self._before_model, weakref.ref(model), owner)
        self._model_handle = hook.held(model.register_forward_pre_hook(hook, **FIRST))

    def _take_off(self) -> None:
        """Take the hooks off an uncompiled model until it is measured again: that they are there
        costs small layers more than their forward."""
        if not self._paused_before:  # one pass, as in steps of SAM, saves less than it costs
            self._paused_before = True
            return
        compiler = sys.modules.get("torch._dynamo")
        if (self.stays or compiler is None or compiles_frames()
                or self._call is None or not self._call.placed):
            return
        # Hooks that are missing while a graph is traced would be missing in it for good.
        callbacks = compiler.callback_handler
        if _before_compiling not in callbacks.start_callbacks:
            callbacks.register_start_callback(_before_compiling)
        _off.add(self)
        # Not by handle.remove(): torch may be calling hooks of the model, and still needs the flags
        # by which it knows with what arguments.
        for handle in self._all_handles():
            hooks = handle.hooks_dict_ref()
            if hooks is not None:
                hooks.pop(handle.id, None)
        self._call.remove()

    def put_back(self) -> None:
        """Put the hooks back on the model that were taken off while nothing was measured."""
        if self not in _off:
            return
        self._remove_hooks()
        model, owner = self._model(), self._owner()
        if model is None or owner is None:
            return
        self._attach_to_layers(owner)
        if self._tracing:
            self._attach_tracing(model, owner)
        else:
            self._attach_to_model(model, owner)
        if self._call is not None:
            self._call.place()

    def trace_always(self) -> bool:
        """Trace all passes from now on; whether that may find what the last one missed: it was not
        traced, and can be."""
        if self.traced or not (self.called and self._may_trace):
            return False
        self._must_trace = True
        self._uses.forget()
        return True

    def end_pass(self, owner: object) -> None:
        """After a backward pass: trace the next forward pass where its sums will be compared."""
        self.called = self.traced = False
        self._check.choose_graph()
        uses = self._sites[-1].uses
        assert uses is not None
        uses.end_pass()
        self.outside = OutsideCalls()
        self._patience = PATIENCE if self.not_followed else self._patience - 1
        self._awaited = self._awaited | self.not_followed if self._patience > 0 else set()
        self._uses.whole = (self._check.is_due or bool(self._awaited or self.roles.pending)
                            or self._unsettled or self._unclear)
        self.not_followed.clear()
        due = self._must_trace or self._uses.whole
        if not self._tracing and self._may_trace and due:
            model = self._model()
            if model is not None:
                self._tracing = True
                if self not in _off:
                    self._attach_tracing(model, owner)

    def remove(self) -> None:
        """Take all hooks off the model."""
        self._remove_hooks()
        while self._copies:
            self._copies.pop().remove()
        self._may_trace = False
        self._stop_tracing()

    def _all_handles(self) -> list[RemovableHandle]:
        model_handle = [] if self._model_handle is None else [self._model_handle]
        return [*self._handles, *self._tracing_handles, *model_handle]

    def _remove_hooks(self) -> None:
        _off.discard(self)
        for handle in self._all_handles():
            handle.remove()
        self._handles.clear()
        self._tracing_handles.clear()
        self._model_handle = None
        if self._call is not None:
            self._call.remove()

    def _before_model(
        self, original: weakref.ref[nn.Module], model: nn.Module, args: Args, kwargs: Kwargs
    ) -> None:
        if not self.enabled and (is_compiling() or self._tracer is None):
            if not is_compiling() and model is original():
                self._take_off()
            return
        if model is not original():
            return
        self._stop_tracing()
        if not (self.enabled and can_measure()):
            return
        if self._must_trace and (is_compiling() or compiles_frames()):
            raise RuntimeError(NO_LAYER.format(names=self._names_to_trace()))
        if is_compiling():
            if any(isinstance(each, Tensor) and each.requires_grad
                   for each in (*args, *kwargs.values())):
                self._note_grad_input()
            return
        while self._copies:
            self._copies.pop().remove()
        self.called, self.traced, self._inside = True, False, True
        self._paused_before = False
        common = not kwargs and len(args) == 1 and type(args[0]) is Tensor
        tensors = [*args] if common else input_tensors(args, kwargs)
        packed = None if common else packed_sequence(args, kwargs)
        self.packed_size = None if packed is None else int(packed.batch_sizes[0])
        self.outside.batch = next((tensor for tensor in tensors if tensor.dim()), None)
        if self._source is None:
            for tensor in tensors:
                self.input_sizes.update(tensor.shape)
            if self.packed_size is not None:
                self.input_sizes.add(self.packed_size)
        if self._tracing or self._needs_size:
            counted = self._counted_input(args, kwargs, tensors)
            self._n_samples = None if counted is None else counted[0].shape[counted[1]]
            traces = self._tracing and counted is not None and not compiles_frames()
            self._uses.whole |= bool(self.roles.pending)
            if traces and not self._uses.begin():
                assert counted is not None
                self._start_tracing(counted, tensors)

    def _names_to_trace(self) -> str:
        """What only tracing can measure, for errors."""
        tables = [site.name for site in self._sites if site.untapped and not site.traces]
        return ", ".join([*sorted(self._traced), *tables]) or SHARED_TABLES

    def _counted_input(
        self, args: Args, kwargs: Kwargs, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, int] | None:
        """The tensor and its dimension that give N: those of the source, or else dimension 0 of the
        first tensor; None if there is none, a RuntimeError if parameters are to be traced."""
        if self._source is not None:
            return self._source.tensor(args, kwargs), self._source.dim
        first = next((tensor for tensor in tensors if tensor.dim()), None)
        if first is None and self._traced:
            raise RuntimeError(
                f"the number of samples, which measuring {', '.join(sorted(self._traced))} needs, "
                "cannot be read from the model's inputs: none of them is a tensor. Call the model "
                "with tensors, or with tuples, lists and dicts of them, or pass ignore=[...]"
            )
        return None if first is None else (first, 0)

    def size_remark(self) -> str:
        """From where N was read in the last pass, for errors."""
        if self._n_samples is None or self._source is not None:
            return ""
        if self.packed_size is not None:
            return f" {PACKED}"
        return COUNTED.format(n_samples=self._n_samples)

    @uncompiled
    def _start_tracing(self, counted: tuple[Tensor, int], inputs: Sequence[Tensor]) -> None:
        """Watch the operations on these inputs of the model."""
        assert self._n_samples is not None
        self.roles.begin(self._n_samples)
        self._unsettled = False  # inputs of this pass
        reports_to = set(map(id, self._probes.leaves))
        flow = SampleFlow(self._n_samples, self.roles, reports_to, self.size_remark())
        flow.add_inputs(inputs, *counted)
        for buffers, name in self._buffers:
            buffer = buffers.get(name)
            if buffer is not None:
                flow.add_constant(buffer)
        self._tracer = ParameterTracer(
            self._parameters, flow, self._tap_operation, self._layers_settled)
        self._tracer.__enter__()

    def _after_model(
        self, original: weakref.ref[nn.Module], model: nn.Module, args: Args, output: object
    ) -> None:
        if model is not original():
            return
        if self._tracer is not None and output is not None:
            self.open_roles.update(self.roles.open)
            self._recorder.discards |= bool(self.open_roles)
        if self._tracer is not None and not (
            self._must_trace or self.roles.pending or self._unsettled or output is None
        ):
            self._tracing = False  # a whole pass went by without a traced use
            for handle in self._tracing_handles:
                handle.remove()
            self._tracing_handles.clear()
        if self._tracer is not None and output is not None:
            self.traced = True
            if not self.roles.open:
                self._uses.end()
        self._stop_tracing()

    def _leave_model(self) -> None:
        self._inside = False
        self._stop_tracing()

    def _stop_tracing(self) -> None:
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            tracer.leave()

    def _tap_operation(
        self, operation: TracedOp, outputs: list[Tensor], copied: list[bool]
    ) -> Sequence[Tensor]:
        self._must_trace = True
        if running_backward() == -1:
            self._uses.add(operation.name)
            self._count_operation(operation)
            self._count_call(self._sites[-1], outputs[0], False)
        uses = self._sites[-1].uses
        assert uses is not None
        for name in operation.parameters:
            for site in uses.owners.get(name, ()):
                site.shared = True
        return self._tap_in_layer(operation, outputs, copied)

    def _before_layer(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if is_compiling() or self._tracer is None or layer is not site.layer_reference():
            return None
        if self._uses.were_last and not self.roles.open and not self._tracer.inside_layer:
            self._stop_tracing()
        if self._tracer is None or site.traced:
            return None
        has_rule = site.sampler is not None
        new = self._tracer.enter_layer(site.name, layer, site.layout, has_rule, args, kwargs)
        for index, carries in self._tracer.carries.items():
            self._unclear |= site.carries.get(index, carries) is not carries
            site.carries[index] = carries
        site.unsettled = self._tracer.unsettled
        self._unsettled |= bool(site.unsettled)
        self._unclear |= self._tracer.unclear
        self._must_trace |= self._unclear
        return new

    def _before_call(self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Trace the operations of a layer without a rule, and keep what is needed to run it again
        where they cannot be."""
        if is_compiling() or not self.enabled or layer is not site.layer_reference():
            return
        if not can_measure():
            return
        first = not site.traces
        if running_backward() != -1 or first or not site.in_operations:
            self._before[site.index] = call_type(layer).state_before(layer)
        if running_backward() == -1 and (self._inside or not self._may_trace):
            self._traces.begin(site, args, kwargs, self._tracer, self._tap_in_layer)

    def _end_trace(self, site: TapSite, *_: object) -> None:
        if not is_compiling():
            self._traces.end(site)

    def _tap_in_layer(
        self, operation: TracedOp, outputs: list[Tensor], copied: list[bool]
    ) -> Sequence[Tensor]:
        site, output, inputs = self._sites[-1], outputs[0], operation.source
        self.operation_shapes[operation.name] = operation.cost_of(output)
        rows, _ = self._rows(operation.n_samples, output.device)
        if rows is None and may_fuse(operation, inputs, output, self._recorder):
            assert inputs is not None
            report = self._probes.on(output.device).report(site.index)
            return [fuse_product(operation, inputs, output, report, site)]
        return self._call_tap(operation, None, outputs, copied, site, operation.n_samples)

    def _count_operation(self, operation: TracedOp) -> None:
        uses = self._sites[-1].uses
        assert uses is not None
        uses.add(operation.parameters)

    def _after_layer(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object
    ) -> object:
        # A shallow copy of the model shares the hooks.
        if layer is not site.layer_reference():
            return None
        if site.traced and not is_compiling():
            self._check_traced(site, output)
            return None
        if site.in_operations and not is_compiling():
            operations = self._traces.take(site, layer, output)
            if operations is not None:
                self._measured_in_operations(site, layer, output, operations)
                return None
        if self._tracer is not None and not is_compiling():
            return self._tap_traced(self._tracer, site, layer, args, kwargs, output)
        if not self.enabled or not can_measure():
            return None
        if not is_compiling():
            if site.untapped and running_backward() != -1:
                return None
            new = not site.followed or site.untapped
            if (new or not self._inside) and running_backward() == -1:
                cannot_trace = not self._may_trace or compiles_frames()
                outside = not (cannot_trace or self._inside)
                if outside or (new and cannot_trace):
                    return self._tap_unfollowed(site, layer, args, kwargs, output, outside)
                # Or a table's layer, called once more after tracing has ended.
                if new and self.called:
                    self.not_followed.add(site.name)
            return self._tap_layer(site, layer, args, kwargs, output)
        if site.deferred or site.shared:
            raise RuntimeError(DEFERRED_COMPILED.format(name=site.name))
        self._count_trace()
        if site.sampler is None:
            return self._tap_beside_graph(site, layer, args, kwargs, output)
        inputs = args[0] if args else next(iter(kwargs.values()))
        if not (site.followed or inputs.requires_grad):
            site.note_source()
        return self._tap_by_rule(site, layer, args, kwargs, output)

    def _follow(self, site: TapSite) -> None:
        """A traced pass has called the layer."""
        site.followed = True
        self._awaited.discard(site.name)

    def _measured_in_operations(
        self, site: TapSite, layer: nn.Module, output: object, operations: Sequence[TracedOp]
    ) -> None:
        """After a layer whose operations have their own taps."""
        for operation in operations:
            self._count_operation(operation)
        site.check_unchanged(layer, self.check_all)
        self._before.pop(site.index, None)
        self._count_call(site, output, layer.training)
        if self._tracer is not None:
            self._tracer.leave_layer()
            self._tracer.resume(output)
            self._follow(site)
        elif not site.followed and self.called and self._may_trace:
            self.not_followed.add(site.name)
        site.untapped = True

    @uncompiled
    def _tap_beside_graph(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object
    ) -> object:
        """Of a layer without a rule, which is run again outside of the graph."""
        if site.followed:
            return self._tap_layer(site, layer, args, kwargs, output)
        return self._tap_unfollowed(site, layer, args, kwargs, output, False)

    def _tap_unfollowed(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object,
        outside: bool,
    ) -> object:
        """Of a layer that is called `outside` of the model's forward, or beside compiled graphs;
        what it is called with is kept until it is known how many samples the backward pass has."""
        found: list[tuple[Key, Tensor, int]] = []
        call, remark = call_type(layer), " (outside of the model's forward)" if outside else ""
        name = f"{site.name}{remark}"
        if site.layout is Layout.BATCH_FIRST and site.name not in self._layers_settled:
            tensors = input_tensors(args, kwargs)[: 1 if site.sampler is not None else None]
            for index, tensor in enumerate(tensors):
                dim = 0 if call is RecomputedCall else call.samples_dim(layer, index)
                if tensor.grad_fn is None and tensor.dim() > dim:
                    key = f"input {index + 1} of {name}" if index else name, self.outside.n_calls
                    if index and self.roles.settled.get(key) is False:
                        site.carries[index] = False
                    else:
                        found.append((key, tensor, tensor.shape[dim]))
        self.outside.n_calls += 1
        site.unsettled = {key: size for key, tensor, size in found if tensor is not tensors[0]}
        result = self._tap_layer(site, layer, args, kwargs, output)
        carrying = [leaf for leaf in tree_flatten(output if result is None else result)[0]
                    if isinstance(leaf, Tensor) and leaf.requires_grad]
        for leaf in carrying[:1]:
            leaf.register_hook(partial(self._used_unfollowed, site.name if outside else "", found))
        return result

    def _used_unfollowed(
        self, name: str, found: Sequence[tuple[Key, Tensor, int]], grad: Tensor
    ) -> None:
        """A layer's call takes part in the backward pass that runs."""
        task, outside = running_backward(), self.outside
        if task != outside.task:  # of autograd.grad, which ends no pass
            outside.task, outside.inputs, outside.names = task, [], []
        outside.inputs[:0] = found
        if name:
            outside.names.append(name)

    def outside_remark(self) -> str:
        """Which layers were called outside of the model's forward in the last pass, for errors."""
        now = self.outside.task == running_backward()
        names = dict.fromkeys(self.outside.names if now else ())
        return OUTSIDE.format(listed=", ".join(names)) if names else ""

    def settle_unfollowed(self, reports: Sequence[Report], n_samples: int) -> None:
        """Settle which of the inputs `outside`, and of those of the sources of compiled graphs,
        carry samples. The batch is what the model was called with, or else the first of them: N
        rows of another tensor leave its role open. A source that is alone carries samples."""
        found = self.outside.inputs if self.outside.task == running_backward() else []
        sources = []
        if self._check.traces:  # there are compiled graphs
            sources = [site.name for site, (calls, _) in zip(self._sites, reports, strict=False)
                       if calls and site.is_source and site.name not in self._layers_settled]
        counted = self.outside.batch
        if found and not sources:
            first, *others = [tensor for _, tensor, _ in found]
            if counted is None or (counted.grad_fn is not None and all(
                    _same_memory(first, other) for other in others)):
                counted = first
        for key, tensor, size in found:
            if counted is not None and _same_memory(tensor, counted):
                continue
            known = self.roles.judge(key, size, n_samples)
            if size == n_samples and not known and not has_equal_rows(tensor):
                self.open_roles[key] = size
        if len(sources) + len(found) + self._has_grad_input > 1:
            for name in sources:
                if not self.roles.judge((name, 0), n_samples, n_samples):
                    self.open_roles[name, 0] = n_samples
        self.outside.inputs = []

    def _tap_traced(
        self, tracer: ParameterTracer, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs,
        output: object,
    ) -> object:
        measured = tracer.leave_layer()
        site.untapped = not measured
        self._follow(site)
        if not measured:
            self._uses.add(site.name)
        result = None
        try:
            if measured and self.enabled and can_measure():
                if site.sampler is None and call_type(layer) is RecomputedCall and (
                        _single_number(output)):
                    tracer.resume(())
                    measured = False
                    return self._trace_again(site, layer, args, kwargs)
                # What the tap does is not traced, and each look at a shape would ask the tracer.
                plain = site.sampler is not None and type(output) is Tensor
                with torch._C.DisableTorchFunction() if plain else nullcontext():
                    result = self._tap_layer(site, layer, args, kwargs, output)
            return result
        finally:
            if measured:
                tracer.resume(output if result is None else result)

    def _trace_again(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs
    ) -> object:
        """The output of a layer that gives no row per sample, such as a loss with parameters: run
        again, traced, as it is from the next pass on."""
        site.traced = True
        state = self._before.pop(site.index)
        assert isinstance(state, LayerState)
        device = next(iter(layer.parameters())).device
        try:
            with state.restored(), draws_taken_back(device):
                return layer.forward(*args, **kwargs)
        except RuntimeError as error:
            site.traced = False
            reason = f"{error}".partition(". Give")[0]  # without its own fix
            raise RuntimeError(SINGLE_NUMBER.format(name=site.name, error=reason)) from error

    def _check_traced(self, site: TapSite, output: object) -> None:
        """Raise where a layer that must be traced ran without: its parameters would be left out."""
        if self._tracer is None and self.enabled and can_measure() and _single_number(output):
            raise RuntimeError(SINGLE_NUMBER.format(name=site.name, error=NOT_TRACED))

    def _count_call(self, site: TapSite, output: object, training: bool) -> None:
        if not self._check.running:
            self._check.start(output)
        self._check.count_call(site.index, training)

    @while_tracing
    def _count_trace(self) -> None:
        self._check.traces += 1

    @while_tracing
    def _note_grad_input(self) -> None:
        """The model is called with a tensor that requires a gradient, so that more than its sources
        may carry samples."""
        self._has_grad_input = True

    def _tap_layer(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object
    ) -> object:
        """Outside compiled graphs."""
        site.check_unchanged(layer, self.check_all)
        task = running_backward()
        if task == -1:
            site.calls += 1
            self._count_call(site, output, layer.training)
            site.untapped = False
        self.recomputing_task = task  # activation checkpointing runs the layer again in backward
        if (isinstance(output, Tensor) and output.dim() == 2 and args
                and has_vectors(site, layer, args[0], output)):
            shape, device = output.shape, output.device
            site.shapes = args[0].shape, shape
            rows, _ = self._rows(shape[0], device)
            inputs = args[0] if args[0].layout is torch.strided else args[0].to_dense()
            return pass_vectors(site, inputs, output, rows, self._probes.on(device).signal)
        return self._tap_by_rule(site, layer, args, kwargs, output)

    def _tap_by_rule(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object
    ) -> object:
        parallel = False
        own = layer._parameters.values()
        if not all(each is None or type(each) is nn.Parameter for each in own):
            measured = self._recorder.norm_weights is not None
            parallel = check_parallel(site.name, layer, measured)
        if site.sampler is None:
            return self._tap_call(site, layer, args, kwargs, output)
        assert isinstance(output, Tensor)  # of a layer with a rule
        inputs = args[0] if args else next(iter(kwargs.values()))
        if inputs.layout is not torch.strided:  # sparse
            inputs = inputs.to_dense()
        n_samples = self._samples_in(site, output)
        if inputs.shape[:1] != output.shape[:1] and not is_compiling():
            raise RuntimeError(NO_BATCH.format(
                name=site.name, shape=tuple(inputs.shape), given=tuple(output.shape),
                remark=self.size_remark()))
        rows, length = self._rows(n_samples, output.device)
        probe = self._probes.on(output.device)
        fused = not parallel and site.uses_fused(layer, inputs, output, rows, n_samples)
        report, extras = probe.report(site.index), site.extra_inputs(probe, length)
        tap = fuse if fused else pass_through
        return tap(site, inputs, output, rows, n_samples, report, extras)

    @uncompiled
    def _tap_call(
        self, site: TapSite, layer: nn.Module, args: Args, kwargs: Kwargs, output: object
    ) -> object:
        """The output, of any structure, of a layer that is run again, with its leaves tapped that
        carry gradients."""
        leaves, tree = tree_flatten(output)
        carrying = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not carrying:
            return None
        kind = call_type(layer)
        if kind is RecomputedCall and _single_number(output):
            raise RuntimeError(SINGLE_NUMBER.format(name=site.name, error=NOT_TRACED))
        if kind is RecomputedCall:
            n_samples = self._samples_in(site, carrying[0])
        else:
            n_samples = leaves[0].shape[kind.samples_dim(layer, 0)]
            if kind.defines_samples and self._source is None:
                self.input_sizes.add(n_samples)
        tables = [index for index, carries in site.carries.items() if not carries]
        call = kind(site.name, layer, site.parameters, args, kwargs, output, n_samples,
                    site.layout, self._before.pop(site.index, None), *([tables] if tables else []))
        outputs = [leaves[index] for index in call.tapped]
        site.runs += 1
        if site.unsettled:
            call.unlike = partial(self._open, site.unsettled)
        compares = is_power_of_two(site.runs) or bool(site.unsettled)
        if compares and not torch.is_autocast_enabled(outputs[0].device.type):
            call.expected = [output.detach() for output in outputs]
        site.shapes = called_shapes(tree_flatten((args, kwargs))[0], outputs[0], n_samples)
        copied = [True] * len(outputs)
        tapped = self._call_tap(call, site, outputs, copied, site, n_samples)
        for index, leaf in zip(call.tapped, tapped, strict=True):
            leaves[index] = leaf
        return tree_unflatten(leaves, tree)

    def _open(self, roles: dict[Key, int]) -> None:
        """These do not carry the samples of the pass that runs."""
        self.open_roles.update(roles)
        self._recorder.discards = True

    def _call_tap(
        self, call: RecomputedCall | TracedOp, site: TapSite | None, outputs: list[Tensor],
        copied: list[bool], reporting: TapSite, n_samples: int,
    ) -> Sequence[Tensor]:
        probe = self._probes.on(outputs[0].device)
        rows, length = self._rows(n_samples, outputs[0].device)
        extras = [] if site is None else site.extra_inputs(probe, length)
        report = probe.report(reporting.index)
        return RecomputeTap.apply(call, site, reporting, rows, report, n_samples, copied, *outputs,
                                  *call.tensors, *extras)

    def _samples_in(self, site: TapSite, output: Tensor) -> int:
        if site.layout is Layout.BATCH_FIRST:
            return output.shape[0]
        if site.layout.stores_batch_size:
            return site.layout.size(output)
        if self._n_samples is None:
            raise RuntimeError(
                f"the number of samples in {site.name} ({site.layout}) is read from the model's "
                "inputs: call the model, not its parts"
            )
        return self._n_samples

    def _rows(self, n_samples: int, device: torch.device) -> tuple[Tensor | None, int]:
        if is_compiling():
            self._probes.on(device).check_room(n_samples)
        else:
            self.forward_sizes.add(n_samples)
        sampler = self._row_sampler
        rows = None if sampler.samples is None else sampler.rows(n_samples, device)
        return rows, n_samples if rows is None else rows.shape[0]


class KnownUses:
    """The uses that tracing has found, of one forward pass after the other: it may end after the
    last one.

    Attributes:
        whole: the next pass is traced to its end.
        were_last: no pass with the uses of this one so far had more.

    Example:
        >>> uses = KnownUses()
        >>> for name in (None, "token", "scale"):
        ...     at_once = uses.begin() if name is None else uses.add(name)
        >>> uses.end()
        >>> uses.whole = False
        >>> uses.begin(), uses.were_last
        (False, False)
        >>> uses.add("token"), uses.add("scale")
        (False, True)
    """

    def __init__(self) -> None:
        self.whole, self.were_last = True, False
        self._known: set[tuple[str, ...]] = set()
        self._may_follow: list[tuple[str, ...]] = []
        self._now: list[str] = []

    def begin(self) -> bool:
        """A forward pass begins; whether it has no uses."""
        self._now = []
        stops = not self.whole and len(self._known) <= MOST_SEQUENCES
        self._may_follow = [*self._known] if stops and not is_distributed() else []
        return self._look()

    def add(self, name: str) -> bool:
        """A use; whether it is the last one."""
        index = len(self._now)
        self._now.append(name)
        self._may_follow = [each for each in self._may_follow if each[index : index + 1] == (name,)]
        return self._look()

    def _look(self) -> bool:
        length = len(self._now)
        self.were_last = bool(self._may_follow) and all(
            len(each) == length for each in self._may_follow)
        return self.were_last

    def end(self) -> None:
        """The pass was traced to its end."""
        if len(self._known) <= MOST_SEQUENCES:
            self._known.add(tuple(self._now))

    def forget(self) -> None:
        """A use was missed: trace to the end until they are known again."""
        self._known.clear()


# Those whose hooks are off their model while nothing is measured.
_off: weakref.WeakSet[ForwardHooks] = weakref.WeakSet()


def put_all_back() -> None:
    """Put back all hooks that are off their models while nothing is measured."""
    for placer in list(_off):
        placer.put_back()


def _before_compiling(*_: object) -> None:
    """Put all hooks back before torch.compile traces a graph, which may be of their models."""
    for placer in list(_off):
        placer.stays = True
    put_all_back()


def _same_memory(first: Tensor, second: Tensor) -> bool:
    if first.layout is not torch.strided or second.layout is not torch.strided:
        return first is second
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _single_number(output: object) -> bool:
    """Whether a tensor among the output has a gradient and no dimensions."""
    return any(isinstance(leaf, Tensor) and not leaf.dim() and leaf.requires_grad
               for leaf in tree_flatten(output)[0])
