"""The comparison with exact gradients: one backward pass per sample, what the layers' calls account
for, and what the taps measure.

Legend: N samples in the batch, S of them compared.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from adabatch._types import Batch
from adabatch.check.isolate import no_gradients_yet, restored
from adabatch.check.layouts import LayoutResult
from adabatch.check.passes import CheckedModel, ParameterOwner, PassRecord, real_parts
from adabatch.check.report import CheckReport, CheckRow
from adabatch.grad_sample.cost import called_shapes, layer_cost
from adabatch.grad_sample.hooks import GradSampleHooks
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import GradSampler, find_grad_sampler

MAX_COMPARED = 4
# The taps' norms equal exact ones to this: nothing that matters escaped them.
AGREEMENT = 1e-4

ADDED_TERM = (
    "part of its gradient does not depend on the samples: a penalty on the weights inside the "
    "loss, which the per-sample norms cannot contain. Take it out of the loss and use the "
    "optimizer's weight_decay")
NOT_FINITE = "its gradients are not finite on this batch; pass one on which they are"
OUTSIDE = (
    "part of its gradient comes from a use outside the layer's own forward pass, such as "
    "F.linear(x, layer.weight), or from reentrant checkpointing. Call the layer instead, or pass "
    "ignore=[...]")

DEPENDENT = (
    "the losses of the samples change where others are left out of the batch: what is measured is "
    "each sample's contribution within this batch, a proxy of the variance over fresh batches")


class ExactNorms(NamedTuple):
    """Of each parameter, by its name."""

    sq_norms: dict[str, Tensor]  # ‖g_i‖² of the first S samples, [S], float64
    variance_trace: dict[str, float]  # Σ_i ‖g_i − ḡ‖² / (S − 1)


def exact_norms(checked: CheckedModel, batch: Batch, n_samples: int) -> ExactNorms:
    """Norms of ∇l_i for the first samples: a pass each, over the whole batch, so that a model that
    mixes samples is seen as it is."""
    parameters = checked.parameters
    n_compared = min(n_samples, MAX_COMPARED)
    norms: dict[str, list[float]] = {name: [] for name in parameters}
    totals = {name: torch.zeros_like(real_parts(each.detach()), dtype=torch.float64)
              for name, each in parameters.items()}
    for sample in range(n_compared):
        with restored(checked.model):
            loss = checked.loss_fn(checked.model, batch)[sample]
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            value = torch.zeros(()) if grad is None else real_parts(grad.to_dense()).double()
            norms[name].append(float(value.square().sum()))
            totals[name] += value.to(totals[name])
    traces = {name: max(0.0, sum(norms[name]) - float(total.square().sum()) / n_compared)
              for name, total in totals.items()}
    sq_norms = {name: torch.tensor(values, dtype=torch.float64) for name, values in norms.items()}
    return ExactNorms(sq_norms, {name: each / (n_compared - 1) for name, each in traces.items()})


class TapResults(NamedTuple):
    """What the hooks measured, and why they could not."""

    sq_norms: dict[str, Tensor]  # {parameter's name: ‖g_i‖², [N]}
    refused: dict[str, str]  # {layer's name: why the hooks cannot measure it}
    problem: str  # an error that names no layer, or ''


def settle_roles(
    checked: CheckedModel, batches: Iterable[Batch], report: CheckReport
) -> None:
    """Learn from batches of different sizes what carries samples, where the data flow does not
    show it."""
    with restored(checked.model), suppress(Exception):  # measuring will say what is wrong
        hooks = GradSampleHooks(checked.model, layout=report)
        try:
            for batch in batches:
                checked.loss_fn(checked.model, batch)
            report.roles = hooks.roles.settled
        finally:
            hooks.remove()


def measure_with_taps(checked: CheckedModel, batch: Batch, report: CheckReport) -> TapResults:
    """Measure the batch with the hooks; layers that an error names are ignored in the next try."""
    refused: dict[str, str] = {}
    while True:
        found, problem = _measure(checked, batch, list(refused), report)
        before = len(refused)
        for owner in checked.owners:
            lines = lines_about([owner.name or "the model itself", *owner.parameters], problem)
            if lines:
                refused.setdefault(owner.name, lines)
        if len(refused) == before:
            all_refused = len(refused) == len(checked.owners)
            return TapResults(found, refused, "" if all_refused else problem)


def _measure(
    checked: CheckedModel, batch: Batch, ignore: list[str], report: CheckReport
) -> tuple[dict[str, Tensor], str]:
    model, hooks = checked.model, None
    try:
        with restored(model), no_gradients_yet(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooks = GradSampleHooks(
                model, loss_reduction="sum", per_parameter=True, ignore=ignore, layout=report)
            checked.loss_fn(model, batch).sum().backward()
            return hooks.collect().by_parameter, ""
    except Exception as error:  # every reason belongs in the report
        return {}, str(error) or type(error).__name__
    finally:
        if hooks is not None:
            hooks.remove()


def lines_about(names: Iterable[str], message: str) -> str:
    """The lines of a message that name 'Type (layer)', 'layer (...)' or a parameter."""
    layer, *parameters = map(re.escape, names)
    patterns = [rf"\({layer}\)", rf"(?<![\w.(]){layer} \("]
    pattern = "|".join([*patterns, *(rf"(?<![\w.]){name}(?![\w.])" for name in parameters)])
    return "; ".join(line.strip(" -") for line in message.splitlines() if re.search(pattern, line))


class Findings:
    """The report's rows, {layer's name: CheckRow}, and what is entered into them step by step."""

    def __init__(
        self, owners: list[ParameterOwner], found: dict[str, LayoutResult],
        passes: tuple[PassRecord, PassRecord], exact: ExactNorms, n_samples: int,
    ):
        self._owners, self._passes, self._exact = owners, passes, exact
        self._samplers = {owner.name: find_grad_sampler(owner.module) for owner in owners}
        self._total = sum(exact.variance_trace.values())
        self._layer_of: dict[str, str] = {}  # {parameter: the layer it counts with}
        for name in exact.sq_norms:
            holders = [owner.name for owner in owners if name in owner.parameters]
            used = [layer for layer in holders if layer in passes[0].inside.get(name, {})]
            self._layer_of[name] = (used or holders)[0]
        self.rows = {owner.name: self._row(owner, found[owner.name], n_samples) for owner in owners}

    def _own(self, owner: ParameterOwner) -> list[str]:
        return [name for name in owner.parameters if self._layer_of[name] == owner.name]

    def _row(self, owner: ParameterOwner, found: LayoutResult, n_samples: int) -> CheckRow:
        sampler, own = self._samplers[owner.name], self._own(owner)
        unsupported = sampler.unsupported(owner.module) if sampler else None
        trace = sum(self._exact.variance_trace[name] for name in own)
        row = CheckRow(
            owner.name, type(owner.module).__name__, "rule" if sampler else "generic",
            sum(owner.parameters[name].numel() for name in own), found.layout,
            variance_share=trace / self._total if self._total else math.nan,
            cost=self._cost(owner, sampler, found.layout, n_samples), reason=found.reason,
            parameters=tuple(owner.parameters))
        if found.refused or unsupported:
            row.rule = row.rule if found.refused and sampler and not unsupported else "none"
            row.refuse(unsupported or found.reason)
        return row

    def _cost(
        self, owner: ParameterOwner, sampler: GradSampler | None, layout: Layout | None,
        n_samples: int,
    ) -> float:
        measuring = training = 0.0
        samples = 1 if layout is Layout.SHARED else n_samples
        for call in self._passes[0].calls[owner.name]:
            if layout is not None and call.inputs and call.output is not None:
                shapes = called_shapes(call.inputs, call.output, samples)
                cost = layer_cost(owner.module, *shapes, run_again=sampler is None)
                measuring += cost.measuring(samples, samples)
                training += samples * cost.training
        return measuring / training if training else math.nan

    def mark_contributions(self, found: dict[str, LayoutResult]) -> None:
        """Mark batch norm in training mode, and the layers whose rows belong to single samples only
        without it; found: the layouts with it."""
        for owner in self._owners:
            row, sampler = self.rows[owner.name], self._samplers[owner.name]
            mixes = row.layout is Layout.SHARED or found[owner.name].layout is not row.layout
            mixes = mixes or (sampler is not None and sampler.full_batch(owner.module))
            if row.status == "exact" and row.layout is not None and mixes:
                row.status = "contribution"
                row.reason = "samples depend on each other through batch norm in training mode"

    def mark_dependent(self) -> None:
        """Mark what is measured exactly of losses that depend on other samples as a proxy."""
        for row in self.rows.values():
            if row.status == "exact":
                row.status, row.reason = "contribution", DEPENDENT

    def enter_errors(self, taps: TapResults) -> None:
        """Enter the errors of the taps' norms, and refuse the layers that cannot be measured. The
        divisor is at least a small part of the whole model's norm: a gradient may be zero."""
        finite = [each for each in self._exact.sq_norms.values() if each.isfinite().all()]
        total = float(sum(finite, torch.zeros(())).max())
        for owner in self._owners:
            row = self.rows[owner.name]
            if owner.name in taps.refused:
                row.rule = "rule" if self._samplers[owner.name] else "none"
                row.refuse(taps.refused[owner.name])
            if not all(self._exact.sq_norms[name].isfinite().all() for name in self._own(owner)):
                row.refuse(NOT_FINITE)
            pairs = [(self._exact.sq_norms[name], taps.sq_norms[name].cpu().double())
                     for name in self._own(owner) if name in taps.sq_norms]
            if pairs:
                errors = torch.stack([
                    (found[:len(exact)] - exact if len(found) >= len(exact) else exact + math.inf)
                    for exact, found in pairs]).abs().sum(0)
                norm = float(torch.stack([exact for exact, _ in pairs]).sum(0).max())
                floor = (1e-3 if owner.is_narrow else 1e-6) * total
                row.error = float(errors.max()) / max(norm, floor, 1e-300)
            if row.rule == "none" and row.error <= AGREEMENT:
                # Tapped inside the module: the order of its output does not matter.
                row.rule, row.status, row.reason = "generic", "exact", ""

    def refuse_unaccounted(self, growth: float) -> None:
        """Refuse layers whose gradients did not come through their calls alone; growth: Σw'/Σw."""
        reasons: dict[str, list[str]] = {}
        for name, layer in self._layer_of.items():
            reason = self._unaccounted(name, growth)
            if reason is OUTSIDE and self.rows[layer].error <= AGREEMENT:
                self.rows[layer].reason = "used outside its own forward pass, and measured there"
            elif reason:
                reasons.setdefault(layer, []).append(f"{name}: {reason}")
        for layer, listed in reasons.items():
            self.rows[layer].refuse("; ".join(listed))

    def _unaccounted(self, name: str, growth: float) -> str | None:
        """A part r that is the same for every sample grows like the weights: r' = r·Σw'/Σw."""
        r, second = (_rest(name, record) for record in self._passes)
        if r is None and second is None:
            return None
        r, second = (torch.zeros(()) if each is None else each for each in (r, second))
        error = float((second - growth * r).norm()) / max(float(second.norm()), 1e-300)
        return ADDED_TERM if error < 0.05 else OUTSIDE

    def refuse_wrong(self) -> None:
        """Refuse the layers whose norms are wrong for a reason that nothing else explained."""
        for owner in self._owners:
            row = self.rows[owner.name]
            if row.error > (5e-2 if owner.is_narrow else 1e-3):
                row.refuse(f"the taps' squared norms differ from exact ones by {row.error:.1%}")


def _rest(name: str, record: PassRecord) -> Tensor | None:
    """A parameter's gradient less what came through its layers' calls; None for mere rounding."""
    grad = record.grads[name]
    if grad is None:
        return None
    parts = [real_parts(part).double() for part in record.inside.get(name, {}).values()]
    whole = real_parts(grad.to_dense()).double()
    rest = whole - sum(parts)
    uses = record.uses.get(name, 0)
    # One use passes its gradient on bit for bit; several are added up in the parameter's own type.
    rounding = 4 * torch.finfo(grad.dtype).eps * uses**0.5 if uses > 1 else 0.0
    scale = float(whole.norm()) + sum(float(part.norm()) for part in parts)
    return rest if float(rest.norm()) > rounding * scale else None
