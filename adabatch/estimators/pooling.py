"""From the sums of a step's backward passes to GradientMoments: the loss reduction, the accumulation and the loss scale are undone here, only here.

Autograd's contribution of sample i in pass j is z_i = a_i·g_i·(loss scale), with a_i = 1/(k·m_j) for a mean-reduced loss divided by the k accumulated
passes, and the step's gradient is Σ z_i. For a sum-reduced loss a_i = 1, and the step's gradient is divided by the number of samples.

Samples of unequal weight n_i (tokens under a token mean) have a_i = n_i/(k·Σ_pass n): of each pass its own weighted mean, divided by k. They are known
only through m·z_i = w_i·g_i with w_i = m·a_i.

Legend: m samples in the step, m_j in pass j of k, s and s_j of them measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adabatch.estimators.moments import GradientMoments

LOSS_REDUCTIONS = ("mean", "sum")


def check_arguments(loss_reduction: str, **counts: int | None) -> None:
    """Refuse an unknown reduction, and numbers that are no counts; `samples` may be None.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_arguments("mean", samples=None, accumulate=1)
    """
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {loss_reduction!r}")
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive integer{' or None' if name == 'samples' else ''}, got {value!r}")


@dataclass
class BackwardPass:
    """Sums of one backward pass, in the scale autograd gave them (nothing undone yet).

    Attributes:
        batch_size: samples in the pass.
        norms: for each probe row ‖contribution of sample i‖² [s], or None where no parameter of the row took part.
        indices: the measured rows [s], or None for all.
        second_moments: {parameter name: Σ_i contribution_i²}, on request.
        inner_products: for each probe row ⟨contribution of sample i, the step's finished gradient⟩ [s], or None where no parameter of the row took part; on request.
        preconditioned: with second moments weighed by P, in the last pass of a step {parameter name: Σ P∘g²/‖g‖²}, g the step's finished gradient.
        share: where processes share a batch, the part of the pass's samples over all processes that this one had.
    """

    batch_size: int
    norms: list[Tensor | None]
    indices: Tensor | None
    second_moments: dict[str, Tensor] = field(default_factory=dict)
    inner_products: list[Tensor | None] | None = None
    share: float = 1.0
    preconditioned: dict[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """m_j, samples in the pass over all processes."""
        return self.batch_size / self.share


def pool_passes(
    passes: Sequence[BackwardPass],
    grad_sq_norms: Tensor,
    *,
    loss_reduction: str = "mean",
    loss_scale: float = 1.0,
    group_of_row: Sequence[int] = (0,),
    row_names: Sequence[str] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    by_samples: bool = False,
    world_size: int = 1,
) -> GradientMoments:
    """Pool the passes of one step.

    Args:
        passes: what each backward pass left, all with the same K probe rows.
        grad_sq_norms: squared norm of the finished gradient of each row's parameters, [K].
        loss_reduction: 'mean' or 'sum', over the samples of a pass.
        loss_scale: the factor a GradScaler put on the loss.
        group_of_row: parameter group of each probe row.
        row_names: parameter name of each row, if each parameter has one.
        weights: of the samples, [m], one pass after another, on any scale: numbers of tokens for instance. None: all alike.
        by_samples: pass j's share of the gradient is m_j/m, put on after the taps (micro-batches), and not 1/k, divided out of the loss.
        world_size: W processes share each pass, of which this one had `share`: its gradients were multiplied by W·share (by W for a summed loss) before they
            were averaged over the processes.

    Returns:
        GradientMoments with T̂ unbiased: equal passes give m_eff = m, unequal ones m_eff = k²/Σ_j(1/m_j).

    Raises:
        ValueError: weights that are no m numbers >= 0 with a positive sum in each pass; weights under a summed loss, or without inner_products.
    """
    whole_size = sum(step.whole for step in passes)
    batch_size = round(whole_size)
    k = len(passes)
    mean = loss_reduction == "mean"
    loss_scale *= world_size
    share = sum(step.batch_size for step in passes) / whole_size if batch_size else 1.0
    common = {"batch_size": batch_size, "indices": _indices(passes), "share": share}
    if weights is None:
        per_pass = [(step.whole * (1 if by_samples else k) if mean else 1) / loss_scale for step in passes]
        if k > 1:
            m_eff = _effective(passes) if mean and not by_samples else None
            common |= {"effective_batch_size": m_eff, "corrections": _corrections(passes, m_eff)}
    else:
        per_pass = [(step.whole if by_samples else whole_size) / loss_scale for step in passes]
        common |= {"weights": measured_weights(passes, weights, loss_reduction, by_samples), "corrections": _strata(passes)}
    whole = (1 if mean else 1 / max(1, batch_size)) * world_size / loss_scale
    rows = [_row(passes, [scale**2 for scale in per_pass], row) for row in range(len(group_of_row))]
    inner_products = [_row(passes, [scale * whole for scale in per_pass], row, "inner_products") for row in range(len(group_of_row))] if passes[0].inner_products is not None else None
    batch_norms = [float(value) * whole**2 for value in grad_sq_norms.tolist()]
    groups = sorted(set(group_of_row)) if len(group_of_row) > 1 else ()

    def summed(of_group: int | None) -> dict[str, Any]:
        """Over the rows of a group, or over all."""
        chosen = [row for row, group in enumerate(group_of_row) if of_group in (None, group)]
        sums = {"sq_norms": _sum([rows[row] for row in chosen]), "grad_sq_norm": sum(batch_norms[row] for row in chosen)}
        return sums | {"inner_products": None if inner_products is None else _sum([inner_products[row] for row in chosen])} | common

    return GradientMoments(
        **summed(None),
        by_group={group: GradientMoments(**summed(group)) for group in groups} if len(groups) > 1 else {},
        by_parameter=dict(zip(row_names, rows, strict=True)) if row_names else {},
        parameter_grad_sq_norms=dict(zip(row_names, batch_norms, strict=True)) if row_names else {},
        parameter_inner_products=dict(zip(row_names, inner_products, strict=True)) if row_names and inner_products is not None else {},
        second_moment=_second_moments(passes, per_pass),
        preconditioned=passes[-1].preconditioned,
    )


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def _row(passes: Sequence[BackwardPass], scales: Sequence[float], row: int, kind: str = "norms") -> Tensor:
    """One probe row's values over all passes, [s]; a row that no layer reported to has no gradient, so zeros."""
    parts = []
    for step, scale in zip(passes, scales, strict=True):
        values = getattr(step, kind)
        value = values[row]
        parts.append(value * scale if value is not None else torch.zeros_like(next(other for other in values if other is not None)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _effective(passes: Sequence[BackwardPass]) -> float | None:
    sizes = [round(step.whole) for step in passes]
    if len(set(sizes)) <= 1 or 0 in sizes:
        return None
    return len(sizes) ** 2 / sum(1 / size for size in sizes)


def measured_weights(passes: Sequence[BackwardPass], weights: Tensor | Sequence[float], loss_reduction: str, by_samples: bool = False) -> Tensor:
    """w_i = m·a_i of the measured samples, [s] float64, a_i = n_i/(k·Σ_pass n), or by_samples (m_j/m)·n_i/Σ_pass n.

    Example:
        >>> measured_weights([BackwardPass(3, [torch.ones(2)], torch.tensor([0, 2]))], [10, 20, 30], "mean")
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    if loss_reduction != "mean":
        raise ValueError(
            "weights describe a mean over tokens. Under loss_reduction='sum' every sample's gradient counts whole, and the plain trace is right: leave "
            "weights away"
        )
    sizes = [step.batch_size for step in passes]
    weights = torch.as_tensor(weights).detach().double()
    if weights.shape != (sum(sizes),):
        raise ValueError(f"weights must have one number for each of the {sum(sizes)} samples of the step, got the shape {tuple(weights.shape)}")
    parts = weights.split(sizes)
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not all(float(part.sum()) > 0 for part in parts):
        raise ValueError("weights must be finite numbers >= 0 with a positive sum in each backward pass, numbers of tokens for instance")
    whole = sum(step.whole for step in passes)
    scales = [step.batch_size if by_samples else whole / len(passes) * step.share for step in passes]
    shares = [scale * part / part.sum() for part, scale in zip(parts, scales, strict=True)]
    picked = [share if step.indices is None else share[step.indices.to(share.device)] for share, step in zip(shares, passes, strict=True)]
    return torch.cat(picked).to(_measured(passes[0]).device)


def _measured(step: BackwardPass) -> Tensor:
    return next(value for value in step.norms if value is not None)


def _strata(passes: Sequence[BackwardPass]) -> Tensor | None:
    """(m_j/m)/(s_j/s) for each measured sample, [s]: where passes were not measured at one rate, the mean over S must weigh them as they are in the batch."""
    rates = [len(_measured(step)) / max(1, step.batch_size) for step in passes]
    if len(set(rates)) == 1:
        return None
    whole = sum(len(_measured(step)) for step in passes) / sum(step.batch_size for step in passes)
    return _by_pass(passes, [whole / rate for rate in rates])


def _corrections(passes: Sequence[BackwardPass], m_eff: float | None) -> Tensor | None:
    """(1 − 1/m_eff)/(1 − 2a_i + 1/m_eff) for each measured sample, [s], as E‖g_i − g‖² = T·(1 − 2a_i + 1/m_eff): for passes of unequal sizes with inner_products."""
    if m_eff is None or passes[0].inner_products is None:
        return None
    factors = [(1 - 1 / m_eff) / (1 - 2 / (len(passes) * step.whole) + 1 / m_eff) for step in passes]
    return _by_pass(passes, factors)


def _by_pass(passes: Sequence[BackwardPass], values: Sequence[float]) -> Tensor:
    """One value per pass, for each measured sample [s]."""
    return torch.cat([torch.full_like(_measured(step), value, dtype=torch.float64) for step, value in zip(passes, values, strict=True)])


def _indices(passes: Sequence[BackwardPass]) -> Tensor | None:
    """Measured rows counted through the passes, or None when every pass measured all of its rows."""
    if all(step.indices is None for step in passes):
        return None
    if len(passes) == 1:
        return passes[0].indices.cpu()
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
