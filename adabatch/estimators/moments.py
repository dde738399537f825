"""GradientMoments: the raw, unbiased moments of one step's per-sample gradients.

Legend: m samples in the step, s of them measured, g_i the gradient of sample i's loss, g the mean over the m samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Moments of the per-sample gradients of one optimizer step, nothing smoothed, nothing clamped.

    Attributes:
        batch_size: m, samples in the step (all accumulated passes together).
        sq_norms: ‖g_i‖² of the measured samples, [s], of the per-sample loss (the loss reduction is undone); float32 or float64.
        grad_sq_norm: ‖g‖² of the batch-mean gradient, over the measured parameters, before any clipping.
        effective_batch_size: m_eff = 1/Σ a_i² for a gradient Σ a_i g_i; equal to m unless accumulated passes had unequal sizes.
        indices: rows of the batch that were measured, [s] (passes one after another), or None for all.
        by_group: {index of the parameter group: its GradientMoments}, when there are several groups.
        by_parameter: {name: ‖g_i‖² of that parameter, [s]}, on request.
        second_moment: {name: Σ_i g_i² over the measured samples, elementwise, of the parameter's shape}, on request.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> moments.variance_trace, moments.true_grad_sq_norm
        (2.0, 0.0)
    """

    batch_size: int
    sq_norms: Tensor
    grad_sq_norm: float
    effective_batch_size: float | None = None
    indices: Tensor | None = None
    by_group: dict[int, GradientMoments] = field(default_factory=dict)
    by_parameter: dict[str, Tensor] = field(default_factory=dict)
    second_moment: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_measured(self) -> int:
        """s, the number of measured samples."""
        return len(self.sq_norms)

    @property
    def mean_sq_norm(self) -> float:
        """mean over the measured samples of ‖g_i‖²."""
        return float(self.sq_norms.double().mean())

    @property
    def biased_variance_trace(self) -> float:
        """mean ‖g_i‖² − ‖g‖²: the trace with divisor m, as reference implementations of CABS use it."""
        return self.mean_sq_norm - self.grad_sq_norm

    @property
    def variance_trace(self) -> float:
        """T̂ = (mean_S ‖g_i‖² − ‖g‖²)/(1 − 1/m_eff), unbiased for tr Cov(g_i) (divisor m − 1), also for s < m.

        Raises:
            ValueError: a batch of one has no variance.
        """
        m = self._m_eff
        if m <= 1:
            raise ValueError(f"the variance of the gradient needs at least 2 samples, got a batch of {self.batch_size}")
        if not self.n_measured:
            raise ValueError("no sample was measured")
        return self.biased_variance_trace / (1 - 1 / m)

    @property
    def true_grad_sq_norm(self) -> float:
        """Ĝ² = ‖g‖² − T̂/m_eff, unbiased for ‖E g_i‖²; may be negative on one batch: smooth first, clamp after."""
        return self.grad_sq_norm - self.variance_trace / self._m_eff

    @property
    def noise_scale(self) -> float:
        """T̂/Ĝ² of this batch alone (in samples). A ratio of single estimates: for a steady figure divide smoothed ones. Infinite if Ĝ² is 0."""
        return _ratio(self.variance_trace, self.true_grad_sq_norm)

    @property
    def snr(self) -> float:
        """m·Ĝ²/T̂, the signal-to-noise ratio of the batch gradient. Infinite if T̂ is 0."""
        return _ratio(self._m_eff * self.true_grad_sq_norm, self.variance_trace)

    @property
    def is_finite(self) -> bool:
        """Whether all moments are finite numbers."""
        return math.isfinite(self.grad_sq_norm) and bool(self.sq_norms.isfinite().all())

    @property
    def _m_eff(self) -> float:
        return float(self.batch_size) if self.effective_batch_size is None else self.effective_batch_size


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.nan if numerator == 0 else math.copysign(math.inf, numerator)
