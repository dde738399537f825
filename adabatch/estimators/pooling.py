"""From the sums of a step's backward passes to GradientMoments: the loss reduction, the accumulation and the loss scale are undone here, only here.

Autograd's contribution of sample i in pass j is z_i = a_i·g_i·(loss scale), with a_i = 1/(k·m_j) for a mean-reduced loss divided by the k accumulated
passes, and the step's gradient is Σ z_i. For a sum-reduced loss a_i = 1, and the step's gradient is divided by the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.estimators.moments import GradientMoments

LOSS_REDUCTIONS = ("mean", "sum")


@dataclass
class BackwardPass:
    """Sums of one backward pass, in the scale autograd gave them (nothing undone yet).

    Attributes:
        batch_size: samples in the pass.
        norms: for each probe row ‖contribution of sample i‖² [s], or None where no parameter of the row took part.
        indices: the measured rows [s], or None for all.
        second_moments: {parameter name: Σ_i contribution_i²}, on request.
    """

    batch_size: int
    norms: list[Tensor | None]
    indices: Tensor | None
    second_moments: dict[str, Tensor] = field(default_factory=dict)


def pool_passes(
    passes: Sequence[BackwardPass],
    grad_sq_norms: Tensor,
    *,
    loss_reduction: str = "mean",
    loss_scale: float = 1.0,
    group_of_row: Sequence[int] = (0,),
    row_names: Sequence[str] | None = None,
) -> GradientMoments:
    """Pool the passes of one step.

    Args:
        passes: what each backward pass left, all with the same K probe rows.
        grad_sq_norms: squared norm of the finished gradient of each row's parameters, [K].
        loss_reduction: 'mean' or 'sum', over the samples of a pass.
        loss_scale: the factor a GradScaler put on the loss.
        group_of_row: parameter group of each probe row.
        row_names: parameter name of each row, if each parameter has one.

    Returns:
        GradientMoments with T̂ unbiased: equal passes give m_eff = m, unequal ones m_eff = k²/Σ_j(1/m_j).
    """
    batch_size = sum(step.batch_size for step in passes)
    k = len(passes)
    mean = loss_reduction == "mean"
    per_pass = [(k * step.batch_size if mean else 1) / loss_scale for step in passes]
    whole = (1 if mean else 1 / max(1, batch_size)) / loss_scale
    rows = [_row(passes, per_pass, row) for row in range(len(group_of_row))]
    batch_norms = [float(value) * whole**2 for value in grad_sq_norms.tolist()]
    common = {"batch_size": batch_size, "effective_batch_size": _effective(passes) if mean else None, "indices": _indices(passes)}
    groups = sorted(set(group_of_row))
    by_group = {
        group: GradientMoments(
            sq_norms=torch.stack([rows[row] for row, of in enumerate(group_of_row) if of == group]).sum(0),
            grad_sq_norm=sum(batch_norms[row] for row, of in enumerate(group_of_row) if of == group),
            **common,
        )
        for group in groups
    }
    return GradientMoments(
        sq_norms=torch.stack(rows).sum(0),
        grad_sq_norm=sum(batch_norms),
        by_group=by_group if len(groups) > 1 else {},
        by_parameter=dict(zip(row_names, rows, strict=True)) if row_names else {},
        second_moment=_second_moments(passes, per_pass),
        **common,
    )


def _row(passes: Sequence[BackwardPass], scales: Sequence[float], row: int) -> Tensor:
    """‖g_i‖² of one probe row over all passes, [s]; a row that no layer reported to has no gradient, so zeros."""
    parts = []
    for step, scale in zip(passes, scales, strict=True):
        norms = step.norms[row]
        parts.append(norms * scale**2 if norms is not None else torch.zeros_like(next(other for other in step.norms if other is not None)))
    return torch.cat(parts)


def _effective(passes: Sequence[BackwardPass]) -> float | None:
    sizes = [step.batch_size for step in passes]
    if len(set(sizes)) <= 1 or 0 in sizes:
        return None
    return len(sizes) ** 2 / sum(1 / size for size in sizes)


def _indices(passes: Sequence[BackwardPass]) -> Tensor | None:
    """Measured rows counted through the passes, or None when every pass measured all of its rows."""
    if all(step.indices is None for step in passes):
        return None
    parts, offset = [], 0
    for step in passes:
        rows = torch.arange(step.batch_size) if step.indices is None else step.indices.cpu()
        parts.append(rows + offset)
        offset += step.batch_size
    return torch.cat(parts)


def _second_moments(passes: Sequence[BackwardPass], scales: Sequence[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for step, scale in zip(passes, scales, strict=True):
        for name, moment in step.second_moments.items():
            total[name] = total[name] + moment * scale**2 if name in total else moment * scale**2
    return total
