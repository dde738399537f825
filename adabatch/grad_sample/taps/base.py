"""Taps: identity autograd nodes that report per-sample squared gradient norms while the backward pass runs.

A tap passes a layer's output through unchanged. It saves the measured rows of the layer's input; in backward it gets the gradient b of the
output, works out the layer's per-sample squared norms, and returns b unchanged. In eager mode the norms go to the stash; in a compiled graph they are the
gradient of the tap's extra inputs, the probe rows, and autograd itself adds up the norms of all layers.

Legend: N samples in the batch, S rows measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adabatch.distributed.grad_norms import is_sharded
from adabatch.distributed.sharded_layers import is_parallel, own_activations, own_backprops
from adabatch.grad_sample.backward.probe import Probe
from adabatch.grad_sample.backward.recorder import BackwardRecorder, ParameterUse, signal_gradient
from adabatch.grad_sample.compat import autocast_disabled
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.plan import Plan
from adabatch.grad_sample.registry import GradSampler

DOUBLE_BACKWARD = (
    "a backward pass with create_graph=True ran through a measured layer: its higher-order gradient reaches the parameters but not the taps, so the "
    "per-sample norms would be wrong. Measure on steps without it (`with hooks.paused(): ...` around the forward pass), or use the micro-batch estimator."
)


SHARED_COMPILED = (
    "{name} shares a parameter with another use, or is measured with inner_products=True, which a compiled graph cannot do: do not compile the model, or leave "
    "inner_products=True away"
)

TRACED = "operations on traced parameters"


@dataclass(eq=False)
class TapSite:
    """A measured layer: where its tap sits, by which rule it is measured and where each parameter's norms go.

    Attributes:
        name: the layer's name in the model.
        index: its row in the reports.
        layer_reference: the module, weakly: its forward hook holds this site, and a cycle would keep the model alive until the garbage collector runs.
        sampler: its grad_sample rule; None where the layer is run again sample by sample.
        parameters: {the layer's own parameter name: the parameter's name in the model}, measured ones only.
        rows: {the layer's own parameter name: the probe row that receives its norms}.
        deferred: True when a parameter of this layer has several uses: factors are stashed, squared when the pass has ended.
        layout: how the samples lie in its input and output.
        calls: forward passes through the layer since the last harvest (eager mode).
        takes: whether its last tap was a taking one.
        pays, taken: by the shapes of its calls, whether a taking tap would pay, and whether it was placed (activation checkpointing places the same again).
        shapes: of its last input and output, samples first (eager mode), for the cost model.
        vectors: its weight and bias, and whether the layer with them may get the tap for vectors.
    """

    name: str
    index: int
    layer_reference: Callable[[], nn.Module | None]
    sampler: GradSampler | None
    parameters: dict[str, str]
    rows: dict[str, int]
    stash: BackwardRecorder
    layout: Layout = Layout.BATCH_FIRST
    deferred: bool = False
    calls: int = 0
    takes: bool = False
    pays: dict[tuple, bool] = field(default_factory=dict)
    taken: dict[tuple, bool] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    vectors: tuple[Tensor | None, Tensor | None, bool] | None = None

    @classmethod
    def all_of(cls, plan: Plan, row_of: Mapping[str, int], stash: BackwardRecorder, layouts: Mapping[str, Layout]) -> list[TapSite]:
        """The sites of a plan's layers, and last the one that stands for all traced operations."""
        sites = []
        for index, measured in enumerate(plan.layers):
            name = measured.name or type(measured.layer).__name__
            rows = {own: row_of[full] for own, full in measured.parameters.items()}
            layout = layouts.get(measured.name, Layout.BATCH_FIRST)
            deferred = not plan.shared.isdisjoint(measured.parameters.values())
            sites.append(cls(name, index, weakref.ref(measured.layer), measured.sampler, measured.parameters, rows, stash, layout, deferred))
        return [*sites, cls(TRACED, len(sites), lambda: None, None, {}, {}, stash, deferred=True)]

    @property
    def layer(self) -> nn.Module:
        """The module."""
        return self.layer_reference()

    @property
    def probe_rows(self) -> tuple[int, ...]:
        """The distinct probe rows of this layer, in order: the extra inputs of its tap."""
        return tuple(dict.fromkeys(self.rows.values()))

    @property
    def mixes_samples(self) -> bool:
        """Whether the layer, as it is now, mixes the samples of a batch, so that its rule needs all rows."""
        return self.sampler is not None and self.sampler.may_mix and self.sampler.full_batch(self.layer)

    def factors(self, activations: Tensor, backprops: Tensor, rows: Tensor | None, n_samples: int) -> dict[str, Factor]:
        """The measured parameters' factors, restricted to the measured rows; without those frozen since the hooks were attached."""
        full_batch = self.mixes_samples
        backprops = self.layout.split(backprops, n_samples)
        if rows is not None and not full_batch:
            backprops = backprops.index_select(0, rows)
        factors = self.sampler.rule(self.layer, activations, backprops)
        factors = {name: factors[name] for name in self.parameters if name in factors}
        if rows is not None and full_batch:
            factors = {name: factor.select(rows) for name, factor in factors.items()}
        return factors


def extra_inputs(site: TapSite, probe: Probe, length: int) -> list[Tensor]:
    """What a tap of S = `length` measured rows gets beside its report: in a compiled graph the probe rows, then leaves for second moments, if asked for."""
    moments = site.stash.second_moments
    rows = site.probe_rows if torch.compiler.is_compiling() else ()
    names = () if moments is None else site.parameters.values()
    return [*(probe.row(row, length) for row in rows), *(probe.second_moment(name, moments.shape(name)) for name in names)]


def report_norms(site: TapSite, sq_norms: Mapping[str, Tensor], measured: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Report the squared norms [S] of the site's parameters; gives the gradients of those of the tap's inputs that are probe rows, none in eager mode."""
    norms: dict[int, Tensor] = {}
    for name, value in sq_norms.items():
        if value.dim() != 1 or (value.shape[0] != measured and not torch.compiler.is_compiling()):
            raise RuntimeError(f"the rule of {site.name} gave squared norms of shape {tuple(value.shape)}; one value per sample was expected")
        if site.stash.shares is not None:
            value = value * site.stash.shares[site.parameters[name]]
        row = site.rows[name]
        norms[row] = norms[row] + value.to(dtype) if row in norms else value.to(dtype)
    if torch.compiler.is_compiling():
        return [norms.get(row) for row in site.probe_rows]
    for row, value in norms.items():
        site.stash.add_norms(row, value)
    return []


def report_factors(site: TapSite, factors: dict[str, Factor], measured: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Report norms, and second moments if they were asked for: the gradients of a tap's extra inputs, probe rows first."""
    moments = site.stash.second_moments
    if moments is not None:
        factors = {name: factor.compact() for name, factor in factors.items()}
    extras = report_norms(site, {name: factor.sq_norms() for name, factor in factors.items()}, measured, dtype)
    if moments is not None:
        extras += [moments.of(full, factors[name]) if name in factors else None for name, full in site.parameters.items()]
    return extras


def defer_factors(site: TapSite, factors: dict[str, Factor], rows: Tensor | None) -> None:
    """Put the factors of a layer aside until the pass has ended."""
    factors = {name: factor.compact() for name, factor in factors.items()}
    if rows is None and site.stash.witness is not None:
        site.stash.witness.hear(site.parameters, factors)
    site.stash.add([ParameterUse(site.parameters[name], factor) for name, factor in factors.items()])


def saved_signal(report: Tensor) -> Tensor | None:
    """What a tap keeps of its report input: in eager mode the gradient that it may give it."""
    return None if torch.compiler.is_compiling() else signal_gradient(report)


def record_call(site: TapSite, n_samples: int, signal: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Report a use of the layer; gives the gradient of the tap's report input: in eager mode once in a pass, in a compiled graph (1, N) as a tensor [2]."""
    if signal is not None:
        return signal if site.stash.report(site.index, n_samples) else None
    one = like.new_ones((1,), dtype=dtype)
    return torch.cat((one, one.new_full((1,), n_samples)))


def listen(site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int, report: Tensor, extras: list[Tensor]) -> Tensor:
    """The layer's output behind a listening tap."""
    parallel = is_parallel(site.layer)
    activations = site.layout.split(own_activations(site.layer, inputs) if parallel else inputs.detach(), n_samples)
    if parallel:
        site.shapes = tuple(activations.shape), tuple(output.to_local().shape)
    if rows is not None and not site.mixes_samples:
        activations = activations.index_select(0, rows)
    return PassthroughTap.apply(output, activations, rows, report, site, None if site.layout.stores_batch_size else n_samples, *extras)


class PassthroughTap(torch.autograd.Function):
    """Identity on the output; in backward, the per-sample squared norms of the layer's parameters are reported.

    forward(output, activations, rows, report, site, n_samples, *extras): `activations` are the measured rows of the layer's input (all rows
    when the rule needs them), `rows` the measured indices [S] or None for all, `report` what Probe.report gives, `n_samples` N where the output does not
    tell it (a number known to the graph costs a recompilation for each value), `extras` in a compiled graph the probe rows [S], then, if the site asks for
    second moments, one leaf per parameter that receives Σ_i (contribution of sample i)² as its gradient.

    The output is marked dirty, not copied: in-place operations after the layer stay legal, and the layers listed in the registry never read their
    own output in backward.
    """

    @staticmethod
    def forward(ctx, output, activations, rows, report, site, n_samples, *extras):
        if torch.compiler.is_compiling():
            output = output.clone()  # no copy once compiled; an input returned as it is would forbid in-place operations behind the compiled part
        else:
            ctx.mark_dirty(output)
        ctx.save_for_backward(activations, rows)
        ctx.site, ctx.n_samples, ctx.mixed = site, n_samples, site.mixes_samples
        ctx.signal, ctx.dtype, ctx.n_extras = saved_signal(report), report.dtype, len(extras)
        ctx.parallel = not torch.compiler.is_compiling() and is_sharded(output)
        return output

    @staticmethod
    def backward(ctx, backprops):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site = ctx.site
        if site.mixes_samples != ctx.mixed:
            raise RuntimeError(f"{site.name} changed between train and eval mode after its forward pass: call model.train() or eval() after loss.backward()")
        activations, rows = ctx.saved_tensors
        with autocast_disabled(backprops.device):
            own = own_backprops(site.layer, backprops) if ctx.parallel else backprops
            n_samples = site.layout.size(own) if ctx.n_samples is None else ctx.n_samples
            factors = site.factors(activations, own, rows, n_samples)
            if site.deferred or site.calls > 1:
                defer_factors(site, factors, rows)
                extras = [None] * ctx.n_extras
            else:
                extras = report_factors(site, factors, n_samples if rows is None else rows.shape[0], ctx.dtype)
        return backprops, None, None, record_call(site, n_samples, ctx.signal, own, ctx.dtype), None, None, *extras


class CallTap(torch.autograd.Function):
    """Identity on the outputs of a call without a rule: a module run again per sample, or an operation that meets a traced parameter.

    forward(call, site, reporting, rows, report, n_samples, copied, *tensors): `tensors` are the outputs, the call's input tensors,
    then the extra inputs of the site, if it has one; `reporting` is the site that the use is reported of.
    `copied` says for each output whether it is returned as a copy, because the backward formula of what made it may read it, or marked dirty.
    """

    @staticmethod
    def forward(ctx, call, site, reporting, rows, report, n_samples, copied, *tensors):
        n_outputs, n_inputs = len(copied), len(call.tensors)
        outputs = [tensor.clone() if copy else tensor for tensor, copy in zip(tensors, copied, strict=False)]
        ctx.mark_dirty(*(tensor for tensor, copy in zip(outputs, copied, strict=True) if not copy))
        ctx.save_for_backward(rows, *tensors[n_outputs : n_outputs + n_inputs])
        ctx.call, ctx.site, ctx.reporting, ctx.n_samples = call, site, reporting, n_samples
        ctx.signal, ctx.dtype = saved_signal(report), report.dtype
        ctx.n_inputs, ctx.n_extras = n_inputs, len(tensors) - n_outputs - n_inputs
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *backprops):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site, stash, (rows, *inputs) = ctx.site, ctx.reporting.stash, ctx.saved_tensors
        with autocast_disabled(backprops[0].device):
            factors = ctx.call.factors(inputs, backprops, rows)
            names = site.parameters if site is not None else {name: name for name in factors}
            if not torch.compiler.is_compiling() and rows is None and stash.witness is not None:
                stash.witness.hear(names, factors)
            if site is None or site.deferred or site.calls > 1:
                stash.add([ParameterUse(names[name], factor) for name, factor in factors.items()])
                extras = [None] * ctx.n_extras
            else:
                extras = report_factors(site, factors, ctx.n_samples if rows is None else rows.shape[0], ctx.dtype)
        report = record_call(ctx.reporting, ctx.n_samples, ctx.signal, backprops[0], ctx.dtype)
        return None, None, None, None, report, None, None, *backprops, *[None] * ctx.n_inputs, *extras
