"""Taps: identity autograd nodes that report per-sample statistics while the backward pass runs.

A tap saves the measured rows of its layer's input; in backward it gets the gradient of the output
and computes the layer's statistics. In eager mode values go to the BackwardRecorder; in a compiled
graph they are the gradients of the tap's extra inputs, the leaves of a Probe.

Legend: N samples in the batch, S rows measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adabatch.estimators.gradients import is_sharded, running_backward
from adabatch.grad_sample.backward.recorder import (
    BackwardRecorder, ParameterUse, Probe, signal_gradient,
)
from adabatch.grad_sample.backward.verify import Node, sketch, squares
from adabatch.grad_sample.compat import while_tracing
from adabatch.grad_sample.cost import layer_cost
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.functional.expression import versions_of
from adabatch.grad_sample.functional.flow import Key
from adabatch.grad_sample.layers.generic import RecomputedCall, call_type
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.plan import Plan
from adabatch.grad_sample.registry import FusedResult, GradSampler
from adabatch.grad_sample.taps.sharded_layers import (
    is_parallel, own_activations, own_backprops,
)

DOUBLE_BACKWARD = (
    "a backward pass with create_graph=True ran through a measured layer: its higher-order "
    "gradient reaches the parameters but not the taps, so the per-sample norms would be wrong. "
    "Measure on steps without it (`with scheduler.paused(): ...` around the forward pass), or use "
    "the micro-batch estimator."
)
DEFERRED_COMPILED = (
    "{name} shares a parameter with another use, or a statistic such as inner_products needs the "
    "finished gradient, which a compiled graph cannot do: do not compile the model, or do not "
    "measure that statistic"
)
CHANGED = (
    "{name} cannot be measured: a tensor that it was computed from was changed in place since. "
    "Change a copy of it: write `x = x + y` for `x += y`, or clone it first"
)
OTHER_PARAMETERS = (
    "{name}.{own} is not the parameter it was when the hooks were attached: the layer was "
    "pruned or parametrized (weight_norm, spectral_norm), or the model called with other weights "
    "(torch.func.functional_call). After such a change attach again: hooks.remove() and "
    "GradSampleHooks(model), or adabatch.wrap(...); call with other weights inside "
    "scheduler.paused()"
)
TRACED = "operations on traced parameters"
# Decisions kept for each layer; what activation checkpointing runs again must get the tap it had.
MOST_SHAPES = 256
Report = Tensor | None
is_compiling = torch.compiler.is_compiling
_NOTHING = nullcontext()


def autocast_disabled(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast changes no types; torch.autocast costs as much as three small
    operations, so it is only entered where one is active."""
    if is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


class OperationUses:
    """Which parameters a single operation of a pass uses, so that its values are reported at once.

    Args:
        reporter: where values go, by the parameters' names in the model.
        sites: of all layers.

    Attributes:
        owners: {parameter: the layers that hold it}.
    """

    def __init__(self, reporter: TapSite, sites: Sequence[TapSite]):
        self._reporter = reporter
        self.owners: dict[str, list[TapSite]] = {}
        for site in sites:
            for name in site.parameters.values():
                self.owners.setdefault(name, []).append(site)
        self._used: set[str] = set()
        self._several: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """An operation of the forward pass that runs."""
        for name in names:
            (self._several if name in self._used else self._used).add(name)

    def end_pass(self) -> None:
        """A backward pass has ended."""
        self._used.clear()

    def is_single(self, name: str) -> bool:
        """Whether the parameter has no other use in the pass, and nothing waits for its factor."""
        tapped = any(site.calls for site in self.owners.get(name, ()))
        return not (self._reporter.recorder.defers or tapped or name in self._several)

    def report_fused(self, result: FusedResult, measured: int, dtype: torch.dtype) -> None:
        """Report norms of parameters with a single use, of which nothing else is measured."""
        self._reporter.report_fused(result, None, measured, dtype)
        self._reporter.recorder.note(result.sq_norms)

    def report(self, factors: Mapping[str, Factor], measured: int, dtype: torch.dtype) -> None:
        """Report values of parameters with a single use; keep the factors of others until the pass
        has ended."""
        recorder, single = self._reporter.recorder, {}
        for name, factor in factors.items():
            if self.is_single(name):
                single[name] = factor
            else:
                recorder.defer([ParameterUse(name, factor.compact())])
        self._reporter.report(single, measured, dtype)
        recorder.note(single)


@dataclass(eq=False)
class TapSite:
    """A measured layer: where its tap sits, by which rule it is measured and where values go.

    Attributes:
        index: the layer's row in the reports.
        layer_reference: the module, weakly: its forward hook holds this site, and a cycle would
            keep the model alive until the garbage collector runs.
        sampler: what is registered for it; None where it is run again sample by sample.
        parameters: {own parameter name: name in the model}, measured ones only.
        own: those that the layer itself holds, as they were when it was attached.
        rows: {own parameter name: the probe row of its per-sample values}.
        deferred: a parameter of this layer has several uses, or a statistic needs the finished
            gradient: factors are kept until the pass has ended.
        shared: an operation outside of the layer was found to use a parameter of it. The tap that
            the layer gets stays what it is until the pass has ended, as activation checkpointing
            must place it again.
        calls: forward passes through the layer since the last backward pass (eager mode).
        untapped: the tracer left its last call without a tap, as of a table that is looked up
            once for all samples; what activation checkpointing runs again gets none either.
        followed: a traced pass has called it: its inputs' roles are known.
        is_source: a compiled graph calls it with what depends on no trainable parameter: with
            samples, or with a table that is the same for all.
        runs: forward passes through a layer that is run again.
        carries: of a layer without a rule: {number of a tensor that it is called with: whether it
            carries samples}, as far as traced passes have shown it.
        unsettled: {role: size} of the other tensors of its last call.
        traced: a layer without a rule that gives no row per sample: its operations are traced.
        in_operations: a layer without a rule may be measured in its operations (LayerTraces), and
            traces counts its calls that were.
        uses: of the site that stands for all traced operations.
        fused: whether its last tap was a fused one.
        shapes: of its last input and output, samples first (eager mode), for the cost model.
        vectors: weight, bias, and whether the layer with them may get a LinearVectorTap.
    """

    name: str
    index: int
    layer_reference: Callable[[], nn.Module | None]
    sampler: GradSampler | None
    parameters: dict[str, str]
    rows: dict[str, int]
    recorder: BackwardRecorder
    own: tuple[tuple[str, Tensor], ...] = ()
    layout: Layout = Layout.BATCH_FIRST
    deferred: bool = False
    shared: bool = False
    calls: int = 0
    untapped: bool = False
    followed: bool = False
    is_source: bool = False
    runs: int = 0
    carries: dict[int, bool] = field(default_factory=dict)
    unsettled: dict[Key, int] = field(default_factory=dict)
    traced: bool = False
    in_operations: bool = False
    traces: int = 0
    uses: OperationUses | None = None
    fused: bool = False
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    vectors: tuple[Tensor | None, Tensor | None, bool] | None = None
    _cheaper: dict[tuple[object, ...], bool] = field(default_factory=dict)
    _placed: dict[tuple[object, ...], bool] = field(default_factory=dict)

    @classmethod
    def all_of(
        cls, plan: Plan, row_of: Mapping[str, int], recorder: BackwardRecorder,
        layouts: Mapping[str, Layout],
    ) -> list[TapSite]:
        """The sites of a plan's layers, and last the one that stands for all traced operations."""
        sites = []
        for index, measured in enumerate(plan.layers):
            name = measured.name or type(measured.layer).__name__
            rows = {own: row_of[full] for own, full in measured.parameters.items()}
            layout = layouts.get(measured.name, Layout.BATCH_FIRST)
            own = tuple((own, plan.parameters[full]) for own, full in measured.parameters.items()
                        if own in measured.layer._parameters
                        and type(plan.parameters[full]) is nn.Parameter)
            shared = not plan.shared.isdisjoint(measured.parameters.values())
            site = cls(name, index, weakref.ref(measured.layer), measured.sampler,
                       measured.parameters, rows, recorder, own, layout,
                       shared or recorder.defers)
            site.in_operations = (
                measured.sampler is None and layout is Layout.BATCH_FIRST
                and len(own) == len(measured.parameters)
                and call_type(measured.layer) is RecomputedCall)
            sites.append(site)
        every = cls(TRACED, len(sites), lambda: None, None,
                    {name: name for name in plan.parameters}, dict(row_of), recorder)
        return [*sites, cls(TRACED, len(sites), lambda: None, None, {}, {}, recorder,
                            deferred=True, uses=OperationUses(every, sites))]

    @property
    def layer(self) -> nn.Module:
        layer = self.layer_reference()
        assert layer is not None  # only read while the layer runs
        return layer

    def check_unchanged(self, layer: nn.Module, check_all: Callable[[], None]) -> None:
        """Raise a RuntimeError where the layer has other parameters than when it was attached;
        check_all: lists all parameters that were replaced."""
        present = layer._parameters
        for name, parameter in self.own:
            if present.get(name) is not parameter:
                if isinstance(present.get(name), nn.Parameter):
                    check_all()
                raise RuntimeError(OTHER_PARAMETERS.format(name=self.name, own=name))

    @while_tracing
    def note_source(self) -> None:
        """A graph calls the layer with what depends on no trainable parameter."""
        self.is_source = True

    @property
    def mixes_samples(self) -> bool:
        """Whether the layer, as it is now, mixes samples, so that its rule needs all rows."""
        return (self.sampler is not None and self.sampler.may_mix
                and self.sampler.full_batch(self.layer))

    def check_mode(self, mixed: bool) -> None:
        """Raise where the layer mixed samples in its forward pass, or not, and is not as it was."""
        if self.mixes_samples != mixed:
            raise RuntimeError(
                f"{self.name} changed between train and eval mode after its forward pass: call "
                "model.train() or eval() after loss.backward()"
            )

    @property
    def must_defer(self) -> bool:
        """Whether factors of the pass that runs have to be kept until it has ended."""
        return self.deferred or self.shared or self.calls > 1 or self.traces > 0

    def extra_inputs(self, probe: Probe, length: int) -> list[Tensor]:
        """What a tap of S = `length` rows gets besides its report: in a compiled graph its probe
        rows, then a leaf for each parameter of each statistic, its line of the sums and the vectors
        of these."""
        if not is_compiling():
            return []
        extras = [probe.row(row, length) for row in dict.fromkeys(self.rows.values())]
        for each in self.recorder.statistics:
            for name in self.parameters.values():
                shape = None if each.per_sample else each.leaf_shape(name)
                if shape is None:
                    raise RuntimeError(f"{each.name} cannot be measured in a compiled graph: do "
                                       "not measure it, or do not compile the model")
                extras.append(probe.value(each.name, name, shape))
        if self.recorder.sum_check.sketches:
            extras.append(probe.sums[self.index, : 1 + 2 * len(self.parameters)])
            # Not read in the backward pass: torch 2.9 mixes up what is, where sizes vary.
            extras += self.sum_vectors.values()
        return extras

    @property
    def sum_vectors(self) -> dict[int, Tensor]:
        """Vectors of sketch() for the sums."""
        return self.recorder.sum_check.vectors(*(parameter for _, parameter in self.own))

    def factors(
        self, activations: Tensor, backprops: Tensor, rows: Tensor | None, n_samples: int
    ) -> dict[str, Factor]:
        """The parameters' factors over the measured rows; without those frozen since attaching."""
        sampler, full_batch = self.sampler, self.mixes_samples
        assert sampler is not None
        if self.layout is not Layout.BATCH_FIRST:
            backprops = self.layout.split(backprops, n_samples)
        if rows is not None and not full_batch:
            backprops = backprops.index_select(0, rows)
        found = sampler.rule(self.layer, activations, backprops)
        factors = {name: found[name] for name in self.parameters if name in found}
        if rows is not None and full_batch:
            factors = {name: factor.select(rows) for name, factor in factors.items()}
        return factors

    def uses_fused(
        self, layer: nn.Module, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int
    ) -> bool:
        """Whether a fused backward pass replaces the layer's: all its parameters are trained,
        measured and used only here, and the cost model says that it is cheaper. What activation
        checkpointing runs again gets the tap that it had."""
        fused = None if self.sampler is None else self.sampler.fused
        compiling, all_rows = is_compiling(), rows is None
        if compiling:
            return fused is not None and all_rows and self._may_fuse(layer, inputs, output, True)
        key = (inputs.shape, output.shape, n_samples if rows is None else len(rows))
        if running_backward() == -1:
            self.shapes = (self._samples_first(inputs, n_samples),
                           self._samples_first(output, n_samples))
            if fused is None:
                return False
            if key not in self._cheaper:
                if len(self._cheaper) >= MOST_SHAPES:
                    self._cheaper.clear()
                    self._placed.clear()
                cost = layer_cost(layer, *self.shapes)
                self._cheaper[key] = fused.always or cost.fused_is_cheaper(n_samples, key[2])
            self.fused = self._placed[key] = (
                self._cheaper[key] and self._may_fuse(layer, inputs, output, all_rows))
        elif fused is None or fused.always:
            return False
        return self._placed.get(key, self.fused)

    def _samples_first(self, tensor: Tensor, n_samples: int) -> tuple[int, ...]:
        if self.layout is Layout.BATCH_FIRST:
            return tuple(tensor.shape)
        return n_samples, tensor.numel() // max(1, n_samples)

    def _may_fuse(self, layer: nn.Module, inputs: Tensor, output: Tensor, all_rows: bool) -> bool:
        recorder, sampler = self.recorder, self.sampler
        if self.deferred or sampler is None or sampler.fused is None:
            return False
        if not (recorder.fuses if all_rows else recorder.fuses_subset):
            return False
        own = {name: each for name, each in layer._parameters.items() if each is not None}
        if own.keys() != self.parameters.keys():
            return False
        trained = all(parameter.requires_grad for parameter in own.values())
        return trained and sampler.fused.supports(layer, inputs, output, self.layout, all_rows)

    def defer(self, factors: Mapping[str, Factor]) -> None:
        """Keep the factors of a call until the pass has ended."""
        compact = {name: factor.compact() for name, factor in factors.items()}
        self.recorder.defer([ParameterUse(self.parameters[name], factor)
                             for name, factor in compact.items()])

    def report(
        self, factors: Mapping[str, Factor], measured: int, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """Report a call; gives the gradients of the tap's extra inputs."""
        if self.recorder.statistics:
            factors = {name: factor.compact() for name, factor in factors.items()}
        norms = {name: factor.sq_norms() for name, factor in factors.items()}
        extras = self._report("sq_norms", True, norms, measured, dtype)
        for each in self.recorder.statistics:
            values = {name: each.of_factor(self.parameters[name], factor)
                      for name, factor in factors.items()}
            extras += self._report(each.name, each.per_sample, values, measured, dtype)
        return extras

    def report_fused(
        self, result: FusedResult, rows: Tensor | None, measured: int, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """The same of a fused backward pass."""
        norms, moments = result.sq_norms, result.second_moments
        if rows is not None:
            norms = {name: value.index_select(0, rows) for name, value in norms.items()}
        extras = self._report("sq_norms", True, norms, measured, dtype)
        for each in self.recorder.statistics:
            values = {own: each.of_fused(full, norms[own], moments.get(own))
                      for own, full in self.parameters.items()}
            extras += self._report(each.name, each.per_sample, values, measured, dtype)
        return extras

    def compares_sums(self, node: Node) -> bool:
        """Whether the tap with this node reports sums in the backward pass that runs."""
        check = self.recorder.sum_check
        return check.sketches if is_compiling() else check.observes(node)

    def report_sums(
        self, totals: Mapping[str, Factor | Tensor], sq_norms: Mapping[str, Tensor], like: Tensor,
        dtype: torch.dtype, vectors: Mapping[int, Tensor],
    ) -> list[Tensor | None]:
        """Report sums to be compared; in a compiled graph, gives the gradients of the layer's line
        of Probe.sums and of the `vectors`.

        Args:
            totals: {own name: the factor over all samples, or Σ_i G_i}.
            sq_norms: {own name: Σ_i ‖G_i‖²}.
            like: a tensor of the type that the layer computed in.
        """
        if not is_compiling():
            self.recorder.sum_check.observe(self.parameters, totals, sq_norms, like.dtype)
            return []
        line = [like.new_full((), torch.finfo(like.dtype).eps, dtype=dtype)]
        for name in self.parameters:
            if name in totals:
                line += [sketch(totals[name], vectors).to(dtype), sq_norms[name].to(dtype)]
            else:  # frozen since attaching
                line += [line[0].new_zeros(())] * 2
        return [torch.stack(line), *[None] * len(vectors)]

    def _report(
        self, statistic: str, per_sample: bool, values: Mapping[str, Tensor | None], measured: int,
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        compiling, recorder = is_compiling(), self.recorder
        if not per_sample:
            if compiling:
                return [values.get(name) for name in self.parameters]
            for name, value in values.items():
                recorder.put(statistic, self.parameters[name], value)
            return []
        rows: dict[int, Tensor] = {}
        for name, value in values.items():
            if value is None:
                continue
            if value.dim() != 1 or (value.shape[0] != measured and not compiling):
                raise RuntimeError(
                    f"the rule of {self.name} gave {statistic} of shape {tuple(value.shape)}; one "
                    "value per sample was expected"
                )
            if recorder.norm_weights is not None:
                value = value * recorder.norm_weights[self.parameters[name]]
            row, value = self.rows[name], value.to(dtype)
            rows[row] = rows[row] + value if row in rows else value
        if compiling:
            return [rows.get(row) for row in dict.fromkeys(self.rows.values())]
        for row, value in rows.items():
            recorder.add(statistic, row, value)
        return []


def _known(layout: Layout, n_samples: int) -> int | None:
    """N where backward cannot read it from the output's gradient: a number known to the graph costs
    a recompilation for each value."""
    return None if layout is Layout.BATCH_FIRST or layout.stores_batch_size else n_samples


def _n_samples(known: int | None, layout: Layout, tensor: Tensor) -> int:
    if known is not None:
        return known
    return tensor.shape[0] if layout is Layout.BATCH_FIRST else layout.size(tensor)


class Tap(torch.autograd.Function):
    """The base of all taps. A subclass has forward(ctx, ..., report, site, ..., *extras), where
    `report` is what Probe.report gives and `extras` what TapSite.extra_inputs gives."""

    @staticmethod
    def place(
        ctx: Any, site: TapSite, report: Tensor, n_samples: int | None, extras: Sequence[Tensor],
    ) -> None:
        """Keep what backward needs; n_samples as _known gives it."""
        ctx.site, ctx.n_samples, ctx.n_extras = site, n_samples, len(extras)
        ctx.dtype, ctx.vectors = report.dtype, {}
        ctx.signal = None if is_compiling() else signal_gradient(report)
        if is_compiling() and site.recorder.sum_check.sketches:
            widths = [*site.sum_vectors]
            ctx.vectors = dict(zip(widths, extras[len(extras) - len(widths):], strict=True))

    @staticmethod
    def pass_on(ctx: Any, output: Tensor) -> Tensor:
        """The output, marked dirty rather than copied, so that in-place operations after the layer
        stay legal (registered layers never read their own output in backward); in a compiled graph
        a clone, which is no copy there."""
        if is_compiling():
            return output.clone()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def check() -> None:
        """Raise under create_graph=True."""
        if not is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)

    @staticmethod
    def call_report(ctx: Any, site: TapSite, n_samples: int, like: Tensor) -> Report:
        """Record a call; gives the gradient of `report`: in eager mode once in a pass, in a
        compiled graph (1, N) as a tensor [2]."""
        if ctx.signal is not None:
            return ctx.signal if site.recorder.record_call(site.index, n_samples) else None
        one = like.new_ones((1,), dtype=ctx.dtype)
        return torch.cat((one, one.new_full((1,), n_samples)))


class PassthroughTap(Tap):
    """Reports from the measured rows of the layer's input and of the output's gradient.

    forward(output, activations, rows, whole, report, site, n_samples, *extras): `activations` are
    the measured rows of the input (all rows where the rule needs them), `rows` the measured indices
    [S] or None for all, `whole` all rows where they are kept besides; `output` has to come first
    among the differentiable ones.
    """

    @staticmethod
    def forward(ctx, output, activations, rows, whole, report, site, n_samples, *extras):
        Tap.place(ctx, site, report, n_samples, extras)
        ctx.mixed = site.mixes_samples
        ctx.parallel = not is_compiling() and is_sharded(output)
        ctx.save_for_backward(activations, rows, whole)
        return Tap.pass_on(ctx, output)

    @staticmethod
    def backward(ctx, backprops):
        Tap.check()
        site = ctx.site
        site.check_mode(ctx.mixed)
        activations, rows, whole = ctx.saved_tensors
        with autocast_disabled(backprops.device):
            own = own_backprops(site.layer, backprops) if ctx.parallel else backprops
            n_samples = _n_samples(ctx.n_samples, site.layout, own)
            factors = site.factors(activations, own, rows, n_samples)
            sums: list[Tensor | None] = []
            if site.compares_sums(ctx):
                every = factors if rows is None else site.factors(
                    activations if whole is None else whole, own, None, n_samples)
                norms = squares(factors, None if rows is None else n_samples)
                sums = site.report_sums(every, norms, own, ctx.dtype, ctx.vectors)
            if site.must_defer:
                site.defer(factors)
                extras = [None] * ctx.n_extras
            else:
                measured = n_samples if rows is None else rows.shape[0]
                extras = site.report(factors, measured, ctx.dtype) + sums
        report = Tap.call_report(ctx, site, n_samples, own)
        return backprops, None, None, None, report, None, None, *extras


def pass_through(
    site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int,
    report: Tensor, extras: list[Tensor],
) -> Tensor:
    """The layer's output behind a PassthroughTap."""
    own, layout = site.layer._parameters.values(), site.layout
    plain = all(each is None or type(each) is nn.Parameter for each in own)
    parallel = not plain and is_parallel(site.layer)
    activations = own_activations(site.layer, inputs) if parallel else inputs.detach()
    if layout is not Layout.BATCH_FIRST:
        activations = layout.split(activations, n_samples)
    if parallel:
        site.shapes = tuple(activations.shape), tuple(output.to_local().shape)  # type: ignore[attr-defined]
    whole = None
    if rows is not None and not site.mixes_samples:
        check = site.recorder.sum_check
        if check.sketches if is_compiling() else check.keeps(site.layer, inputs, output):
            whole = activations
        activations = activations.index_select(0, rows)
    known = _known(layout, n_samples)
    return PassthroughTap.apply(output, activations, rows, whole, report, site, known, *extras)


class FusedBackwardTap(Tap):
    """Replaces the layer's own backward node: the parameters' gradients come out of the per-sample
    ones (see FusedBackward).

    forward(output, inputs, weight, bias, rows, report, site, n_samples, n_saved, *saved, *extras):
    the detached output; `saved` as for FusedBackward.backward.
    """

    @staticmethod
    def forward(ctx, output, inputs, weight, bias, rows, report, site, n_samples, n_saved, *rest):
        Tap.place(ctx, site, report, n_samples, rest[n_saved:])
        ctx.needs_inputs, ctx.input_dtype = inputs.requires_grad, inputs.dtype
        ctx.mixed = site.mixes_samples
        ctx.save_for_backward(weight, rows, *rest[:n_saved])
        return Tap.pass_on(ctx, output)

    @staticmethod
    def backward(ctx, backprops):
        Tap.check()
        site, (weight, rows, *saved) = ctx.site, ctx.saved_tensors
        site.check_mode(ctx.mixed)
        layer, layout, defer = site.layer, site.layout, site.must_defer
        with autocast_disabled(backprops.device):
            n_samples = _n_samples(ctx.n_samples, layout, backprops)
            result = site.sampler.fused.backward(
                layer, tuple(saved), weight, backprops, n_samples, layout,
                needs_inputs=ctx.needs_inputs, norms=not defer,
                second_moment=not defer and site.recorder.needs_second_moment,
            )
            factors = {}
            if defer:
                a, b = (layout.split(each, n_samples) for each in (saved[0], backprops))
                if rows is not None:
                    a, b = a.index_select(0, rows), b.index_select(0, rows)
                factors = site.sampler.rule(layer, a, b)
            sums: list[Tensor | None] = []
            if site.compares_sums(ctx):
                norms = (squares(factors, n_samples) if defer else
                         {name: each.sum() for name, each in result.sq_norms.items()})
                totals = {name: result.grads[name] for name in norms}
                sums = site.report_sums(totals, norms, backprops, ctx.dtype, ctx.vectors)
            if defer:
                site.defer(factors)
                extras = [None] * ctx.n_extras
            else:
                measured = n_samples if rows is None else rows.shape[0]
                extras = site.report_fused(result, rows, measured, ctx.dtype) + sums
            grad_inputs = result.grad_inputs
            if grad_inputs is not None:
                grad_inputs = grad_inputs.to(ctx.input_dtype)
        report = Tap.call_report(ctx, site, n_samples, backprops)
        grads = result.grads["weight"], result.grads.get("bias")
        return (None, grad_inputs, *grads, None, report, None, None, None, *[None] * len(saved),
                *extras)


def fuse(
    site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int,
    report: Tensor, extras: list[Tensor],
) -> Tensor:
    """The layer's output behind a FusedBackwardTap."""
    layer, sampler = site.layer, site.sampler
    assert sampler is not None
    assert sampler.fused is not None
    saved, from_node = inputs.detach(), sampler.fused.from_node
    if saved.dtype != output.dtype:
        saved = saved.to(output.dtype)
    more = () if from_node is None else from_node(output)
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    known = _known(site.layout, n_samples)
    return FusedBackwardTap.apply(output.detach(), inputs, weight, bias, rows, report, site, known,
                                  1 + len(more), saved, *more, *extras)


class RecomputeTap(Tap):
    """Behind the outputs of a call without a rule: a module run again sample by sample, or an
    operation that meets a traced parameter.

    forward(call, site, reporting, rows, report, n_samples, copied, *tensors): `tensors` are the
    outputs, the call's input tensors, then the extra inputs of the site, if it has one; `reporting`
    is the site whose use is reported. `copied` says for each output whether it is returned as a
    copy, because the backward formula of what made it may read it, or marked dirty.
    """

    @staticmethod
    def forward(ctx, call, site, reporting, rows, report, n_samples, copied, *tensors):
        n_outputs, n_inputs = len(copied), len(call.tensors)
        Tap.place(ctx, reporting, report, n_samples, tensors[n_outputs + n_inputs:])
        outputs = [tensor.clone() if copy else tensor
                   for tensor, copy in zip(tensors, copied, strict=False)]
        ctx.mark_dirty(*(tensor for tensor, copy in zip(outputs, copied, strict=True) if not copy))
        if site is None:
            # Not as saved tensors: activation checkpointing counts them, and need not trace again.
            ctx.rows, ctx.versions = rows, versions_of(call.tensors)
        else:
            ctx.save_for_backward(rows, *tensors[n_outputs : n_outputs + n_inputs])
        ctx.call, ctx.own_site, ctx.n_inputs = call, site, n_inputs
        kind = outputs[0].device.type
        autocast = not is_compiling() and torch.is_autocast_enabled(kind)
        ctx.autocast = (torch.get_autocast_dtype(kind),) if autocast else ()
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *backprops):
        site, recorder = ctx.own_site, ctx.site.recorder
        if site is None and not ctx.call.active:
            return (*[None] * 7, *backprops, *[None] * (ctx.n_inputs + ctx.n_extras))
        Tap.check()
        if site is None:
            rows, inputs = ctx.rows, ctx.call.tensors
            if ctx.versions != versions_of(inputs):
                raise RuntimeError(CHANGED.format(name=ctx.call.name))
        else:
            rows, *inputs = ctx.saved_tensors
        extras: Sequence[Tensor | None] = [None] * ctx.n_extras
        with autocast_disabled(backprops[0].device):
            discards = recorder.discards
            factors = {} if discards else ctx.call.factors(inputs, backprops, rows)
            names = {name: name for name in factors} if site is None else site.parameters
            if not is_compiling() and not discards and recorder.sum_check.observes(ctx):
                dtypes = [each.dtype for each in (*backprops, *inputs)]
                # Not more samples at once than are measured.
                chunks = [] if rows is None else torch.arange(
                    ctx.n_samples, device=rows.device).split(max(1, len(rows)))
                for every in (ctx.call.factors(inputs, backprops, chunk)
                              for chunk in chunks) if chunks else (factors,):
                    recorder.sum_check.observe(
                        names, every, squares(every), *dtypes, *ctx.autocast)
            measured = ctx.n_samples if rows is None else rows.shape[0]
            if site is None:
                ctx.site.uses.report(factors, measured, ctx.dtype)
            elif site.must_defer:
                recorder.defer([ParameterUse(names[name], each) for name, each in factors.items()])
            else:
                extras = site.report(factors, measured, ctx.dtype)
        report = Tap.call_report(ctx, ctx.site, ctx.n_samples, backprops[0])
        unused = [None] * ctx.n_inputs
        return None, None, None, None, report, None, None, *backprops, *unused, *extras
