"""Taps: identity autograd nodes that report per-sample squared gradient norms while the backward pass runs.

A tap passes a layer's output through unchanged. It saves the measured rows of the layer's input; in backward it gets the gradient b of the
output, works out the layer's per-sample squared norms, and returns b unchanged together with the norms as the gradient of its extra
inputs, the probe rows. Autograd itself then adds up the norms of all layers.

Legend: N samples in the batch, S rows measured.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adabatch.grad_sample.attach import MeasuredLayer
from adabatch.grad_sample.factors import Factor
from adabatch.grad_sample.registry import GradSampler

DOUBLE_BACKWARD = (
    "a backward pass with create_graph=True ran through a measured layer: its higher-order gradient reaches the parameters but not the taps, so the "
    "per-sample norms would be wrong. Measure on steps without it (`with hooks.paused(): ...` around the forward pass), or use the micro-batch estimator."
)


@dataclass
class Use:
    """One use of a parameter in a backward pass, kept until the pass ends: the parameter's name in the model and its factor over the measured rows."""

    parameter: str
    factor: Factor


class Stash:
    """What taps put aside during a backward pass because it can only be finished when all uses of a parameter are known."""

    def __init__(self):
        self._uses: dict[int, list[Use]] = {}
        self._lock = threading.Lock()

    def add(self, uses: list[Use]) -> None:
        """Keep uses under the running backward pass."""
        with self._lock:  # the engine runs one thread per device
            task = torch._C._current_graph_task_id()
            if task not in self._uses:  # what is left of another pass is never asked for: it failed, or was not a backward() to the leaves
                self._uses = {task: []}
            self._uses[task].extend(uses)

    def drain(self, task: int) -> list[Use]:
        """The uses of that backward pass; what a failed pass left behind is dropped."""
        with self._lock:
            uses, self._uses = self._uses.get(task, []), {}
        return uses


@dataclass(eq=False)
class TapSite:
    """A measured layer: where its tap sits, by which rule it is measured and where each parameter's norms go.

    Attributes:
        name: the layer's name in the model.
        index: its row in the reports.
        layer_reference: the module, weakly: its forward hook holds this site, and a cycle would keep the model alive until the garbage collector runs.
        sampler: its grad_sample rule.
        parameters: {the layer's own parameter name: the parameter's name in the model}, measured ones only.
        rows: {the layer's own parameter name: the probe row that receives its norms}.
        deferred: True when a parameter of this layer has several uses: factors are stashed, squared when the pass has ended.
        calls: forward passes through the layer since the last harvest (eager mode).
    """

    name: str
    index: int
    layer_reference: weakref.ref[nn.Module]
    sampler: GradSampler
    parameters: dict[str, str]
    rows: dict[str, int]
    stash: Stash
    deferred: bool = False
    calls: int = 0

    @classmethod
    def of(cls, measured: MeasuredLayer, index: int, row_of: dict[str, int], shared: Collection[str], stash: Stash) -> TapSite:
        """The site of a planned layer."""
        return cls(
            name=measured.name or type(measured.layer).__name__,
            index=index,
            layer_reference=weakref.ref(measured.layer),
            sampler=measured.sampler,
            parameters=measured.parameters,
            rows={own: row_of[name] for own, name in measured.parameters.items()},
            stash=stash,
            deferred=any(name in shared for name in measured.parameters.values()),
        )

    @property
    def layer(self) -> nn.Module:
        """The module."""
        return self.layer_reference()

    @property
    def probe_rows(self) -> tuple[int, ...]:
        """The distinct probe rows of this layer, in order: the extra inputs of its tap."""
        return tuple(dict.fromkeys(self.rows.values()))

    def factors(self, activations: Tensor, backprops: Tensor, rows: Tensor | None) -> dict[str, Factor]:
        """The measured parameters' factors, restricted to the measured rows; without those frozen since the hooks were attached."""
        full_batch = self.sampler.full_batch(self.layer)
        if rows is not None and not full_batch:
            backprops = backprops.index_select(0, rows)
        factors = self.sampler.rule(self.layer, activations, backprops)
        factors = {name: factors[name] for name in self.parameters if name in factors}
        if rows is not None and full_batch:
            factors = {name: factor.select(rows) for name, factor in factors.items()}
        return factors


def _extras(site: TapSite, factors: dict[str, Factor], dtype: torch.dtype, n_extras: int) -> list[Tensor | None]:
    """Gradients of a tap's extra inputs: the probe rows, then the second moments if they were asked for."""
    extras = _probe_gradients(site, factors, dtype)
    if n_extras > len(extras):
        extras += [factors[name].second_moment() if name in factors else None for name in site.parameters]
    return extras


def _probe_gradients(site: TapSite, factors: dict[str, Factor], dtype: torch.dtype) -> list[Tensor | None]:
    """Squared norms [S] of each of the site's probe rows: the sum over the parameters that share the row, None where all of them are frozen."""
    norms: dict[int, Tensor] = {}
    for name, factor in factors.items():
        row, value = site.rows[name], factor.sq_norms().to(dtype)
        if value.dim() != 1:
            raise RuntimeError(f"the rule of {site.name} gave squared norms of shape {tuple(value.shape)}; one value per sample was expected")
        norms[row] = norms[row] + value if row in norms else value
    return [norms.get(row) for row in site.probe_rows]


def _report(backprops: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, rows) as a tensor [2]: this use of the layer, and how many rows its output has."""
    one = backprops.new_ones((1,), dtype=dtype)
    return torch.cat((one, one.new_full((1,), backprops.shape[0])))


class ListeningTap(torch.autograd.Function):
    """Identity on the output; in backward, the per-sample squared norms of the layer's parameters as gradients of the probe rows.

    forward(output [N, ...], activations, rows, report [2], site, *extras): `activations` are the measured rows of the layer's input (all rows
    when the rule needs them), `rows` the measured indices [S] or None for all, `extras` the probe rows [S], then, if the site asks for second moments, one
    leaf per parameter that receives Σ_i (contribution of sample i)² as its gradient.

    The output is marked dirty, not copied: in-place operations after the layer stay legal, and the layers listed in the registry never read their
    own output in backward.
    """

    @staticmethod
    def forward(ctx, output, activations, rows, report, site, *extras):
        if torch.compiler.is_compiling():
            output = output.clone()  # no copy once compiled; an input returned as it is would forbid in-place operations behind the compiled part
        else:
            ctx.mark_dirty(output)
        ctx.save_for_backward(activations, rows)
        ctx.site = site
        ctx.dtype, ctx.n_extras = extras[0].dtype, len(extras)
        return output

    @staticmethod
    def backward(ctx, backprops):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site = ctx.site
        activations, rows = ctx.saved_tensors
        with torch.autocast(backprops.device.type, enabled=False):
            factors = site.factors(activations, backprops, rows)
            if site.deferred or site.calls > 1:
                site.stash.add([Use(site.parameters[name], factor) for name, factor in factors.items()])
                extras = [None] * ctx.n_extras
            else:
                extras = _extras(site, factors, ctx.dtype, ctx.n_extras)
        return backprops, None, None, _report(backprops, ctx.dtype), None, *extras
