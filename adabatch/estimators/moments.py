"""GradientMoments: the raw, unbiased moments of one step's per-sample gradients.

Legend: m samples in the step, s of them measured, g_i the gradient of sample i's loss, g the mean over the m samples, c = m/(m − 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.estimators.totals import Totals

FEW = 1024  # numbers that Python adds up in 20 microseconds

NO_INNER_PRODUCTS = (
    "{name} needs the inner products of the per-sample gradients with their mean: the spread of the norms alone is not the error of the trace, as the noise "
    "of ‖g‖² is correlated with it. Measure with GradSampleHooks(model, inner_products=True), or take the error of the smoothed trace from its residuals from step to "
    "step (the history's variance_trace_std_error)."
)


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Moments of the per-sample gradients of one optimizer step, nothing smoothed, nothing clamped.

    Samples of unequal weight (`weights` w_i with mean 1; a mean over tokens where sample i has n_i of them: w_i = m·n_i/Σn): everywhere below g_i stands for
    z_i = m × the contribution of sample i to g, which is w_i times the gradient of its own mean loss, and T̂ = c·mean_S ‖z_i − w_i g‖². This is the trace for
    which Cov(g) = T/m, to first order in 1/m; without weights the lengths' spread CV²(n)·‖g‖² would count as noise, which dividing by Σn takes out.

    Attributes:
        batch_size: m, samples in the step (all accumulated passes together).
        sq_norms: ‖g_i‖² of the measured samples, [s], of the per-sample loss (the loss reduction is undone); float32 or float64.
        grad_sq_norm: ‖g‖² of the batch-mean gradient, over the measured parameters, before any clipping.
        effective_batch_size: m_eff = 1/Σ a_i² for a gradient Σ a_i g_i; equal to m unless accumulated passes had unequal sizes.
        indices: rows of the batch that were measured, [s] (passes one after another), or None for all.
        by_group: {index of the parameter group: its GradientMoments}, when there are several groups.
        by_parameter: {name: ‖g_i‖² of that parameter, [s]}, on request.
        parameter_grad_sq_norms, parameter_inner_products: ‖g‖² {name: number} and ⟨g_i, g⟩ {name: [s]} of each parameter alone, with by_parameter; the latter with inner_products.
        second_moment: {name: Σ_i g_i² over the measured samples, elementwise, of the parameter's shape}, on request; or, weighed by a preconditioner P,
            {name: Σ P∘Σ_i g_i², a number}.
        preconditioned: with the latter, {name: Σ P∘g²/‖g‖², ‖g‖² over all parameters}; NaN where there is no P yet.
        inner_products: ⟨g_i, g⟩ [s], on request. With them T̂ is never negative, and far steadier where s < m and the signal is strong.
        weights: w_i [s], float64, where the samples weigh unequally; None for all 1. They need inner_products.
        corrections: factors [s] on the terms of T̂ where accumulated passes had unequal sizes; None for all 1.
        share: the part of the step's samples that this process had, where several processes share a batch and `totals` is still to come; grad_sq_norm is
            then this process's part of ‖g‖².
        totals: where several processes share a batch: means over the samples of all of them, from which T̂ and the rest are then worked out. batch_size,
            grad_sq_norm and n_measured are those of the whole batch, the same on every process; tensors with one value a sample are of this process's alone.

    Raises:
        ValueError: weights without inner_products.

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
    parameter_grad_sq_norms: dict[str, float] = field(default_factory=dict)
    parameter_inner_products: dict[str, Tensor] = field(default_factory=dict)
    second_moment: dict[str, Tensor] = field(default_factory=dict)
    preconditioned: dict[str, Tensor] = field(default_factory=dict)
    inner_products: Tensor | None = None
    weights: Tensor | None = None
    corrections: Tensor | None = None
    share: float = 1.0
    totals: Totals | None = None

    def __post_init__(self):
        if self.weights is not None and self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="the trace of samples of unequal weight"))

    @property
    def n_measured(self) -> int:
        """s, the number of measured samples."""
        return len(self.sq_norms) if self.totals is None else self.totals.n_measured

    @property
    def mean_sq_norm(self) -> float:
        """mean over the measured samples of ‖g_i‖²."""
        return mean_of(self.sq_norms) if self.totals is None else self.totals.mean_sq_norm

    @property
    def biased_variance_trace(self) -> float:
        """mean ‖g_i‖² − ‖g‖², with inner_products mean_S d_i: the trace with divisor m, as reference implementations of CABS use it."""
        return self.mean_sq_norm - self.grad_sq_norm if self.inner_products is None else self._mean_term()

    @property
    def centred_sq_norms(self) -> Tensor:
        """d_i = ‖g_i − g‖² = ‖g_i‖² − 2⟨g_i, g⟩ + ‖g‖² [s], float64; with weights ‖z_i − w_i g‖². Below 0 only by rounding, which is cut off.

        Raises:
            ValueError: measured without inner_products.
        """
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="centred_sq_norms"))
        weights = 1.0 if self.weights is None else self.weights
        return (self.sq_norms.double() - 2 * weights * self.inner_products.double() + weights**2 * self.grad_sq_norm).clamp(min=0)

    @property
    def variance_trace(self) -> float:
        """T̂ = (mean_S ‖g_i‖² − ‖g‖²)/(1 − 1/m_eff), with inner_products mean_S d_i/(1 − 1/m_eff): unbiased for tr Cov(g_i) (divisor m − 1), also for s < m.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self._check_size()
        return self.biased_variance_trace / (1 - 1 / self._m_eff)

    @property
    def std_error(self) -> float:
        """Standard error of T̂ as an estimate of the data's tr Cov(g_i): c·√(var_S(d_i)/s · ((m − 1)² + s − 1)/(m(m − 2))), var with divisor s − 1.

        The last factor takes out that all d_i share one g, so that they spread less than independent ones would: exact for normal gradients (8 % of the error
        at m = s = 8), to first order in 1/m for others.

        Of an estimate from the gradients of k processes (totals.degrees_of_freedom: f = k − 1) T̂·√(2/f): that of noise in one direction; noise in many
        directions of like size has less.

        Raises:
            ValueError: measured without inner_products, fewer than two measured samples, or a batch of two, in which both lie at the same distance from their mean.
        """
        self._check_size()
        if self.totals is not None and self.totals.degrees_of_freedom:
            return self.variance_trace * math.sqrt(2 / self.totals.degrees_of_freedom)
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="std_error"))
        if self.n_measured < 2:
            raise ValueError("the standard error needs at least 2 measured samples, got 1: measure more (samples=)")
        m, s = self._m_eff, self.n_measured
        if m <= 2:
            raise ValueError(f"the standard error needs a batch of at least 3 samples, got {self.batch_size}: of two, both lie at one distance from their mean")
        shared = ((m - 1) ** 2 + s - 1) / (m * (m - 2))
        return self._term_spread() * math.sqrt(shared / s) / (1 - 1 / m)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) = (T̂/(1 + t·r), T̂/(1 − t·r)), r = std_error/T̂, t the quantile of Student's distribution with s − 1 degrees of freedom.

        The error of a variance grows with the variance: r is taken to hold at the true T, so that T̂ is compared with T at an error of r·T. T̂ ∓ t·std_error
        would be too low too often, as a T̂ that is low by chance brings a low error with it (.73 against .82 of 4,000 runs for linear regression on 8 normal
        inputs at s = 8). high is infinite where t·r >= 1. Where ‖g_i − g‖² has heavy tails it covers less than its level until s is large: there .82, .87 and
        .89 for s = 8, 64 and 256; for normal gradients .88 to .90 from s = 8 on.

        Raises:
            ValueError: measured without inner_products, too few samples for an error, or a level outside (0, 1).

        Example:
            >>> import torch
            >>> grads = torch.tensor([1.0, 2.0, 3.0, 6.0])
            >>> moments = GradientMoments(4, sq_norms=grads**2, grad_sq_norm=9.0, inner_products=3 * grads)
            >>> moments.variance_trace, [round(end, 2) for end in moments.interval(0.5)]
            (4.666666666666667, [3.03, 10.16])
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, both excluded, got {level!r}; 0.9 is usual")
        from scipy.special import stdtrit

        trace, half = self.variance_trace, float(stdtrit(self.n_measured - 1, (1 + level) / 2)) * self.std_error
        if not trace > 0:
            return 0.0, half
        return trace**2 / (trace + half), trace**2 / (trace - half) if half < trace else math.inf

    @property
    def inner_product_variance(self) -> float:
        """Var_i⟨g_i, g⟩ = mean_S (⟨g_i, g⟩ − ‖g‖²)²/(1 − 1/m_eff), divisor m − 1; with weights ⟨z_i − w_i g, g⟩. The part of the trace along g, times ‖g‖².

        Raises:
            ValueError: measured without inner_products, or a batch of one.
        """
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="inner_product_variance"))
        self._check_size()
        if self.totals is not None:
            return self.totals.mean_inner / (1 - 1 / self._m_eff)
        squares = (self.inner_products.double() - (1.0 if self.weights is None else self.weights) * self.grad_sq_norm).square()
        return float((squares if self.corrections is None else self.corrections * squares).mean()) / (1 - 1 / self._m_eff)

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
        if self.totals is not None:
            return math.isfinite(self.grad_sq_norm) and math.isfinite(self.mean_sq_norm)
        parts = (self.sq_norms,) if self.inner_products is None else (self.sq_norms, self.inner_products)
        return math.isfinite(self.grad_sq_norm) and all(bool(part.isfinite().all()) for part in parts)

    def _terms(self) -> Tensor:
        """Values [s] whose mean is T̂·(1 − 1/m_eff)."""
        return self.centred_sq_norms if self.corrections is None else self.corrections * self.centred_sq_norms

    def _mean_term(self) -> float:
        return mean_of(self._terms()) if self.totals is None else self.totals.mean_term

    def _term_spread(self) -> float:
        """Their standard deviation, divisor s − 1."""
        if self.totals is None:
            return float(self._terms().std())
        s = self.n_measured
        return math.sqrt(max(0.0, self.totals.mean_square_term - self.totals.mean_term**2) * s / (s - 1))

    def _check_size(self) -> None:
        if self._m_eff <= 1:
            raise ValueError(f"the variance of the gradient needs at least 2 samples, got a batch of {self.batch_size}")
        if not self.n_measured:
            raise ValueError("no sample was measured")

    @property
    def _m_eff(self) -> float:
        return float(self.batch_size) if self.effective_batch_size is None else self.effective_batch_size


def mean_of(values: Tensor) -> float:
    """The mean, added up in float64. Few values are added up in Python: the first reduction in a step takes longer than that.

    Example:
        >>> mean_of(torch.tensor([1.0, 2.0]))
        1.5
    """
    if len(values) > FEW:
        return float(values.mean(dtype=torch.float64))
    return sum(values.tolist()) / len(values) if len(values) else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.nan if numerator == 0 else math.copysign(math.inf, numerator)
