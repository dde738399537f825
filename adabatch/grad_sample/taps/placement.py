"""Placing taps while the forward pass runs: behind the layers, and behind the operations in which traced parameters meet samples.

Legend: N samples in the batch, S measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch._engine import running_backward
from adabatch.distributed.sharded_layers import check_parallel
from adabatch.grad_sample.backward.finish import ForwardSizes
from adabatch.grad_sample.backward.probe import ProbeSet
from adabatch.grad_sample.backward.recorder import BackwardRecorder
from adabatch.grad_sample.backward.verify import GradientSumCheck
from adabatch.grad_sample.compat import can_measure, is_compiled, is_compiling
from adabatch.grad_sample.cost import called_shapes
from adabatch.grad_sample.functional.inputs import batch_size_of_inputs, has_batch_dim, row_dim, tensors_of
from adabatch.grad_sample.functional.traced_op import TracedOp
from adabatch.grad_sample.functional.tracer import READS_OUTPUT, ParameterTracer
from adabatch.grad_sample.layers.attention import RandomState, random_state
from adabatch.grad_sample.layers.generic import uncompiled
from adabatch.grad_sample.layers.linear_fast_path import has_vectors, listen_to_vectors
from adabatch.grad_sample.layout import BatchSizeSource, Layout
from adabatch.grad_sample.plan import bound
from adabatch.grad_sample.rows import RowSampler
from adabatch.grad_sample.taps.base import SHARED_COMPILED, CallTap, TapSite, extra_inputs, listen
from adabatch.grad_sample.taps.fused import take, takes_over
from adabatch.grad_sample.taps.recompute import call_again, rows_of_output

NO_LAYER = "a compiled graph cannot measure parameters without a layer of their own: {names}. Run the model uncompiled, or pass ignore=[...]"


class ForwardHooks:
    """The forward hooks of a model.

    The first measured forward pass of an eager model is traced even when no parameter is known to need it: that finds position tables looked up without a
    batch dimension and weights used without calling their layer. If it finds none, tracing ends and costs nothing more.

    Args:
        sites: the layers with a tap; the last one stands for the traced operations.
        parameters: all measured parameters by name.
        traced: names of those that belong to no site.
        probes, row_sampler, stash: where taps report.
        batch_size_source: where N is read from the model's inputs; None for dimension 0 of the first tensor.

    Attributes:
        enabled: whether forward passes are measured.
        input_sizes: of all dimensions of the tensors that the model was called with since this was last cleared; empty where layouts are given.
        operation_shapes: {name: shape of the last output} of the operations on traced parameters, for the cost model.
        forward_sizes: N of the taps placed since the last backward pass.
        recomputing_task: the backward pass in which activation checkpointing last ran a layer again, or -1.
    """

    def __init__(
        self,
        sites: Sequence[TapSite],
        parameters: dict[str, Tensor],
        traced: frozenset[str],
        probes: ProbeSet,
        row_sampler: RowSampler,
        stash: BackwardRecorder,
        batch_size_source: BatchSizeSource | None = None,
    ):
        self.enabled, self.recomputing_task = True, -1
        self.input_sizes: set[int] = set()
        self.forward_sizes = ForwardSizes()
        self.operation_shapes: dict[str, tuple[int, ...]] = {}
        self._sites, self._parameters, self._traced = sites, parameters, traced
        self._probes, self._row_sampler, self._stash = probes, row_sampler, stash
        stash.witness = GradientSumCheck(parameters)
        self._source = batch_size_source
        self._owners: dict[str, list[TapSite]] = {}
        for site in sites:
            for name in site.parameters.values():
                self._owners.setdefault(name, []).append(site)
        self._must_trace = bool(traced) or any(site.layout is Layout.SHARED for site in sites)
        self._tracing = True
        self._tracer: ParameterTracer | None = None
        self._suspending: list[bool] = []
        self._traced_part: weakref.ref[nn.Module] | None = None
        self._n_samples: int | None = None
        self._random: dict[int, RandomState] = {}
        self._handles: list[Any] = []
        self._tracing_handles: list[Any] = []

    def attach(self, model: nn.Module, owner: object) -> None:
        """Put the hooks on the model; they keep `owner` alive. They are plain functions, which a deep copy of the model shares."""
        for site in self._sites[:-1]:
            self._handles.append(site.layer.register_forward_hook(bound(self._after_layer, site, owner), prepend=True, with_kwargs=True))
            if isinstance(site.layer, nn.MultiheadAttention):
                self._handles.append(site.layer.register_forward_pre_hook(bound(self._keep_random_state, site, owner), prepend=True))
        compiled_parts = any(is_compiled(module) for module in model.modules())
        self._tracing = self._must_trace or not compiled_parts
        needs_size = any(not site.layout.stores_batch_size for site in self._sites)
        if not self._tracing and not needs_size:
            return
        for site in self._sites[:-1]:
            self._tracing_handles.append(site.layer.register_forward_pre_hook(bound(self._before_layer, site, owner), prepend=True, with_kwargs=True))
        for part in model.modules():
            if part is not model and any(True for _ in part.children()):
                own = weakref.ref(part)
                self._tracing_handles.append(part.register_forward_pre_hook(bound(self._before_part, own, owner), prepend=True, with_kwargs=True))
                self._tracing_handles.append(part.register_forward_hook(bound(self._after_part, own, owner), always_call=True))
        original = weakref.ref(model)
        # Last, so that it runs before the hook of a layer that is the model itself.
        self._handles.append(model.register_forward_pre_hook(bound(self._before_model, original, owner), prepend=True, with_kwargs=True))
        handles = self._handles if self._must_trace else self._tracing_handles
        handles.append(model.register_forward_hook(bound(self._after_model, original, owner), always_call=True))

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in (*self._handles, *self._tracing_handles):
            handle.remove()
        self._handles.clear()
        self._tracing_handles.clear()

    def _before_model(self, original: weakref.ref[nn.Module], model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.enabled and (is_compiling() or self._tracer is None):
            return
        if model is not original():
            return
        self._leave_tracing()
        if not (self.enabled and can_measure()):
            return
        if is_compiling():
            if not self._must_trace:
                return
            raise RuntimeError(NO_LAYER.format(names=", ".join(sorted(self._traced)) or "position tables that are looked up once for all samples"))
        tensors = tensors_of((args, kwargs))
        self._n_samples = batch_size_of_inputs(self._source, args, kwargs, tensors, self._traced)
        if self._source is None:
            self.input_sizes.update(size for tensor in tensors for size in tensor.shape)
        if self._tracing and self._n_samples is not None:
            self._enter_tracing(args, kwargs)

    def _before_part(self, original: weakref.ref[nn.Module], part: nn.Module, args: tuple, kwargs: dict) -> None:
        """Activation checkpointing runs a part of the model again inside backward, where the model itself is not called."""
        if not self.enabled or is_compiling() or self._tracer is not None or self._n_samples is None or running_backward() == -1:
            return
        if part is original() and self._must_trace and self.enabled and can_measure():
            self._enter_tracing(args, kwargs)
            self._traced_part = original

    def _after_part(self, original: weakref.ref[nn.Module], part: nn.Module, args: tuple, output: Any) -> None:
        if self._traced_part is original:
            self._leave_tracing()

    def _enter_tracing(self, args: tuple, kwargs: dict) -> None:
        self._tracer = ParameterTracer(self._parameters, self._n_samples, tree_flatten((args, kwargs))[0], self._tap_operation)
        self._tracer.__enter__()

    def _after_model(self, original: weakref.ref[nn.Module], model: nn.Module, args: tuple, output: Any) -> None:
        if model is not original():
            return
        if self._tracer is not None and not self._must_trace and output is not None:
            self._tracing = False  # a whole pass went by without a traced use
            for handle in self._tracing_handles:
                handle.remove()
        self._leave_tracing()

    def _leave_tracing(self) -> None:
        self._suspending.clear()
        self._traced_part = None
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            tracer.__exit__(None, None, None)

    def _tap_operation(self, operation: TracedOp, outputs: list[Tensor]) -> list[Tensor]:
        self._must_trace = True
        for name in operation.parameters:
            for site in self._owners.get(name, ()):
                site.deferred = True
        wrong = [tuple(output.shape) for output in outputs if not output.dim() or output.shape[0] != self._n_samples]
        if wrong:
            raise RuntimeError(
                f"{operation.name} gives an output of shape {wrong[0]} in a batch of {self._n_samples}: its samples do not lie along the first dimension. "
                "Give the module a rule with register_grad_sampler, or pass ignore=[...]"
            )
        self.operation_shapes[operation.name] = tuple(outputs[0].shape)
        reads_output = getattr(operation.function, "__name__", "").strip("_") in READS_OUTPUT
        return list(self._call_tap(operation, None, outputs, [reads_output or output._is_view() for output in outputs], self._sites[-1], self._n_samples))

    def _before_layer(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if is_compiling() or self._tracer is None or layer is not site.layer:
            return None
        tracer = self._tracer
        leaves, tree = tree_flatten((args, kwargs))
        traced = [] if tracer.suspended else [index for index, leaf in enumerate(leaves) if tracer.recipe_of(leaf) is not None]
        dims = {index: row_dim(site, leaves[index], index, tracer, self._n_samples) for index in traced}
        suspends = None not in dims.values() and (bool(traced) or has_batch_dim(site, leaves, tracer, self._n_samples))
        self._suspending.append(suspends)
        tracer.suspended += suspends
        if not suspends or not traced:
            return None
        for index, dim in dims.items():
            leaves[index] = tracer.tap_rows(leaves[index], dim)
        return tree_unflatten(leaves, tree)

    def _keep_random_state(self, site: TapSite, layer: nn.MultiheadAttention, args: tuple) -> None:
        if layer.dropout and layer.training and not is_compiling() and self.enabled and can_measure():
            self._random[site.index] = random_state(layer.out_proj.weight.device)

    def _after_layer(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if is_compiling():
            return self._tap_compiled(site, layer, args, kwargs, output)
        if self._tracer is not None:
            return self._tap_traced(site, layer, args, kwargs, output)
        # A deep copy of the model carries the hooks along.
        return self._tap_layer(site, layer, args, kwargs, output) if self.enabled and layer is site.layer_reference() and can_measure() else None

    def _tap_compiled(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.enabled or layer is not site.layer or not can_measure():
            return None
        if site.deferred:
            raise RuntimeError(SHARED_COMPILED.format(name=site.name))
        return self._tap_by_rule(site, layer, args, kwargs, output)

    def _tap_traced(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if layer is not site.layer:
            return None
        tracer, suspended = self._tracer, self._suspending.pop() if self._suspending else True
        try:
            result = self._tap_layer(site, layer, args, kwargs, output) if suspended and self.enabled and can_measure() else None
            output = output if result is None else result
            return result
        finally:
            if suspended and tracer.suspended:
                tracer.suspended -= 1
                tracer.add_samples(tree_flatten(output)[0])

    def _tap_layer(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Outside compiled graphs."""
        task = running_backward()
        if task == -1:
            site.calls += 1
        self.recomputing_task = task  # activation checkpointing runs the layer again, inside backward
        if args and has_vectors(site, layer, args[0], output):
            shape, device = output.shape, output.device
            site.shapes = args[0].shape, shape
            rows, _ = self._rows(shape[0], device)
            return listen_to_vectors(site, args[0], output, rows, self._probes.on(device).signal)
        return self._tap_by_rule(site, layer, args, kwargs, output)

    def _tap_by_rule(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        parallel = check_parallel(site.name, layer, self._stash.shares is not None)
        if site.sampler is None:
            return self._tap_call(site, layer, args, kwargs, output)
        inputs = args[0] if args else next(iter(kwargs.values()))
        n_samples = self._samples_in(site, output)
        rows, length = self._rows(n_samples, output.device)
        probe = self._probes.on(output.device)
        tap = take if not parallel and takes_over(site, layer, inputs, output, rows, n_samples, self._stash.second_moments is not None) else listen
        return tap(site, inputs, output, rows, n_samples, probe.report(site.index), extra_inputs(site, probe, length))

    @uncompiled
    def _tap_call(self, site: TapSite, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The tap of a layer that is run again: the output, whatever its structure, with its gradient-carrying leaves tapped."""
        leaves, tree = tree_flatten(output)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return None
        n_samples = rows_of_output(layer, leaves)
        if n_samples is None:
            n_samples = self._samples_in(site, next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad))
        call = call_again(site, layer, (args, kwargs, output), n_samples, self._random.pop(site.index, None))
        outputs = [leaves[index] for index in call.tapped]
        site.shapes = called_shapes(tree_flatten((args, kwargs))[0], outputs[0], n_samples)
        for index, tapped in zip(call.tapped, self._call_tap(call, site, outputs, [True] * len(outputs), site, n_samples), strict=True):
            leaves[index] = tapped
        return tree_unflatten(leaves, tree)

    def _call_tap(self, call: Any, site: TapSite | None, outputs: list[Tensor], copied: list[bool], reporting: TapSite, n_samples: int) -> Sequence[Tensor]:
        probe = self._probes.on(outputs[0].device)
        rows, length = self._rows(n_samples, outputs[0].device)
        extras = [] if site is None else extra_inputs(site, probe, length)
        return CallTap.apply(call, site, reporting, rows, probe.report(reporting.index), n_samples, copied, *outputs, *call.tensors, *extras)

    def _samples_in(self, site: TapSite, output: Tensor) -> int:
        if site.layout.stores_batch_size:
            return site.layout.size(output)
        if self._n_samples is None:
            raise RuntimeError(f"the number of samples in {site.name} ({site.layout}) is read from the model's inputs: call the model, not its parts")
        return self._n_samples

    def _rows(self, n_samples: int, device: torch.device) -> tuple[Tensor | None, int]:
        if is_compiling():
            self._probes.on(device).check_room(n_samples)
        else:
            self.forward_sizes.note(n_samples)
        rows = self._row_sampler.rows(n_samples, device)
        return rows, n_samples if rows is None else rows.shape[0]
