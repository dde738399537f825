"""Filling the report: each finding is entered into the row of the layer that it is about."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adabatch.check.comparison import OUTSIDE, ExactNorms, relative_error, unaccounted
from adabatch.check.cost import relative_cost
from adabatch.check.listening import PassRecord
from adabatch.check.owners import ParameterOwner
from adabatch.check.report import CheckRow
from adabatch.check.settling import LayoutResult, settle
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import find_grad_sampler

# The taps' norms equal exact ones to this: nothing that matters escaped them.
AGREEMENT = 1e-4


def _parameters(owners: list[ParameterOwner]) -> dict[str, Tensor]:
    return {name: parameter for owner in owners for name, parameter in owner.parameters.items()}


def _homes(owners: list[ParameterOwner], first: PassRecord) -> dict[str, str]:
    """{parameter's name: the layer it counts with}: the first whose calls gave it a gradient, else the first that holds it."""
    homes = {name: owner.name for owner in reversed(owners) for name in owner.parameters}
    return {name: next((owner.name for owner in owners if owner.name in first.inside.get(name, {})), home) for name, home in homes.items()}


def make_rows(owners: list[ParameterOwner], settled: dict[str, LayoutResult], first: PassRecord, exact: ExactNorms, n_samples: int) -> dict[str, CheckRow]:
    """{layer's name: its row}, as far as the passes over the layers tell."""
    homes, total = _homes(owners, first), sum(exact.variance_trace.values())
    rows = {}
    for owner in owners:
        found, own = settled[owner.name], [name for name in owner.parameters if homes[name] == owner.name]
        sampler = find_grad_sampler(owner.module)
        unsupported = sampler.unsupported(owner.module) if sampler else None
        row = rows[owner.name] = CheckRow(
            owner.name,
            type(owner.module).__name__,
            "rule" if sampler else "generic",
            sum(owner.parameters[name].numel() for name in own),
            found.layout,
            variance_share=sum(exact.variance_trace[name] for name in own) / total if total else math.nan,
            cost=relative_cost(owner.module, first.calls[owner.name], found.layout, n_samples) if sampler else math.nan,
            reason=found.reason,
        )
        if found.refused or unsupported:
            row.rule = row.rule if found.refused and sampler and not unsupported else "none"
            row.refuse(unsupported or found.reason)
    return rows


def refuse_unaccounted(rows: dict[str, CheckRow], owners: list[ParameterOwner], first: PassRecord, second: PassRecord, weights: Tensor, ratios: Tensor) -> None:
    """Refuse the layers whose parameters have a gradient that did not come through their calls."""
    homes, growth = _homes(owners, first), float((weights * ratios).sum() / weights.sum())
    reasons: dict[str, list[str]] = {}
    for name in _parameters(owners):
        reason = unaccounted(name, first, second, growth)
        row = rows[homes[name]]
        if reason is OUTSIDE and row.error <= AGREEMENT:
            row.reason = "used outside its own forward pass, and measured there"
        elif reason:
            reasons.setdefault(homes[name], []).append(f"{name}: {reason}")
    for layer, listed in reasons.items():
        rows[layer].refuse("; ".join(listed))


def mark_contributions(rows: dict[str, CheckRow], owners: list[ParameterOwner], passes: list[PassRecord], ratios: Tensor, dims: dict[str, Any]) -> None:
    """Mark the layers whose rows belong to single samples only while batch norm does not mix them, and batch norm itself."""
    for owner in owners:
        row, sampler = rows[owner.name], find_grad_sampler(owner.module)
        now = settle(owner, *passes, ratios, dims.get(owner.name))
        mixes = row.layout is not None and (row.layout is Layout.SHARED or now.layout is not row.layout or (sampler and sampler.full_batch(owner.module)))
        if row.status == "exact" and mixes:
            row.status, row.reason = "contribution", "samples depend on each other through batch norm in training mode"


def enter_comparison(
    rows: dict[str, CheckRow], owners: list[ParameterOwner], first: PassRecord, exact: ExactNorms, differences: dict[str, Tensor], refused: dict[str, str]
) -> None:
    """Enter the errors of the taps' norms, and refuse the layers that the hooks could not measure."""
    homes = _homes(owners, first)
    for owner in owners:
        row, narrow = rows[owner.name], _is_narrow(owner)
        if owner.name in refused:
            row.rule = "rule" if find_grad_sampler(owner.module) else "none"
            row.refuse(refused[owner.name])
        own = [name for name in owner.parameters if homes[name] == owner.name]
        row.error = relative_error(own, differences, exact, floor=1e-3 if narrow else 1e-6)
        if row.rule == "none" and row.error <= AGREEMENT:  # its parameters are tapped inside the module, so the order of its output does not matter
            row.rule, row.status, row.reason = "generic", "exact", ""


def refuse_differing(rows: dict[str, CheckRow], owners: list[ParameterOwner]) -> None:
    """Refuse the layers whose norms are wrong for a reason that nothing else explained."""
    for owner in owners:
        row = rows[owner.name]
        if row.error > (5e-2 if _is_narrow(owner) else 1e-3):
            row.refuse(f"the taps' squared norms differ from exact ones by {row.error:.1%}")


def _is_narrow(owner: ParameterOwner) -> bool:
    return any(torch.finfo(parameter.dtype).bits < 32 for parameter in owner.parameters.values())
