"""GradientMoments: the raw, unbiased moments of one step's per-sample gradients.

Legend: m samples in the step, s of them measured, g_i the gradient of sample i's loss, g the mean
over the m samples, c = m/(m − 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adabatch.estimators.totals import Totals

FEW = 1024  # numbers that Python adds up in 20 microseconds

NO_INNER_PRODUCTS = (
    "{name} needs the inner products of the per-sample gradients with their mean: the spread of "
    "the norms alone is not the error of the trace, as the noise of ‖g‖² is correlated with it. "
    'Measure with GradSampleHooks(model, statistics=["inner_products"]), or take the error of the '
    "smoothed trace from its residuals from step to step (the history's variance_trace_std_error)."
)


@dataclass(frozen=True, eq=False, repr=False)
class GradientMoments:
    """Moments of the per-sample gradients of one optimizer step, nothing smoothed or clamped.

    Samples of unequal weight (`weights` w_i with mean 1; a mean over tokens where sample i has n_i
    of them: w_i = m·n_i/Σn): everywhere below g_i stands for z_i = m × the contribution of sample i
    to g, which is w_i times the gradient of its own mean loss, and T̂ = c·mean_S ‖z_i − w_i g‖². For
    this trace Cov(g) = T/m, to first order in 1/m; without weights the lengths' spread
    CV²(n)·‖g‖² would count as noise, which dividing by Σn takes out.

    Attributes:
        batch_size: m, samples in the step (all accumulated passes together).
        sq_norms: ‖g_i‖² of the measured samples, [s], of the per-sample loss (the loss reduction is
            undone); float32 or float64.
        grad_sq_norm: ‖g‖² of the batch-mean gradient, before any clipping.
        effective_batch_size: m_eff = 1/Σ a_i² for a gradient Σ a_i g_i; None where it is m: it
            differs where accumulated passes had unequal sizes.
        indices: rows of the batch that were measured, [s], or None for all.
        by_group: {index of the parameter group: its moments}, where there are several groups.
        by_parameter: {name: ‖g_i‖² of that parameter, [s]}, on request.
        parameter_grad_sq_norms, parameter_inner_products: ‖g‖² {name: number} and ⟨g_i, g⟩
            {name: [s]} of each parameter, with by_parameter.
        inner_products: ⟨g_i, g⟩ [s], on request. With them T̂ is never negative, and far steadier
            where s < m and the signal is strong.
        weights: w_i [s], float64, where samples have unequal weights. They need inner products.
        corrections: factors [s] on the terms of T̂ where accumulated passes had unequal sizes.
        statistics: {name: what another Statistic gave}: "second_moment" is {parameter: Σ_i g_i²
            over the measured samples, elementwise}.
        share: the fraction of the step's samples that this process had, where several share a
            batch and `totals` is still to come; grad_sq_norm is then this process's part of ‖g‖².
        totals: means over the samples of all processes that share the batch; T̂ and the rest come
            from them. batch_size, grad_sq_norm and n_measured are then the same on every process,
            tensors with one value a sample are of this process's samples.

    Raises:
        ValueError: weights without inner products.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> moments.variance_trace, moments.true_grad_sq_norm
        (2.0, 0.0)
        >>> moments
        GradientMoments(batch 2, 2 measured, trace 2, ‖g‖² 1, noise scale inf)
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
    inner_products: Tensor | None = None
    weights: Tensor | None = None
    corrections: Tensor | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    totals: Totals | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.inner_products is None:
            name = "the trace of samples of unequal weight"
            raise ValueError(NO_INNER_PRODUCTS.format(name=name))

    def __repr__(self) -> str:
        try:
            trace = f"trace {self.variance_trace:.4g}, "
            scale = f", noise scale {self.noise_scale:.4g}"
        except ValueError:
            trace = scale = ""
        more = "".join(f", {name}" for name in self.statistics)
        return (f"GradientMoments(batch {self.batch_size}, {self.n_measured} measured, {trace}"
                f"‖g‖² {self.grad_sq_norm:.4g}{scale}{more})")

    @property
    def m_eff(self) -> float:
        """effective_batch_size, or m."""
        size = self.effective_batch_size
        return float(self.batch_size) if size is None else size

    @property
    def second_moment(self) -> dict[str, Tensor]:
        """statistics["second_moment"]; empty where it was not measured."""
        return self.statistics.get("second_moment", {})

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
        """mean ‖g_i‖² − ‖g‖², with inner products mean_S d_i: the trace with divisor m, as
        reference implementations of CABS use it."""
        if self.inner_products is None:
            return self.mean_sq_norm - self.grad_sq_norm
        if self.totals is not None and self.totals.mean_term is not None:
            return self.totals.mean_term
        return mean_of(self._terms())

    @property
    def centred_sq_norms(self) -> Tensor:
        """d_i = ‖g_i − g‖² = ‖g_i‖² − 2⟨g_i, g⟩ + ‖g‖² [s], float64; with weights
        ‖z_i − w_i g‖². Below 0 only by rounding, which is cut off.

        Raises:
            ValueError: measured without inner products.
        """
        constant, factor = centred_terms(self, "centred_sq_norms")
        return (constant + factor * self.grad_sq_norm).clamp(min=0)

    @property
    def variance_trace(self) -> float:
        """T̂ = (mean_S ‖g_i‖² − ‖g‖²)/(1 − 1/m_eff), with inner products mean_S d_i/(1 − 1/m_eff):
        unbiased for tr Cov(g_i) (divisor m − 1), also for s < m.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self._check_size()
        return self.biased_variance_trace / (1 - 1 / self.m_eff)

    @property
    def std_error(self) -> float:
        """Standard error of T̂ as an estimate of the data's tr Cov(g_i):
        c·√(var_S(d_i)/s · ((m − 1)² + s − 1)/(m(m − 2))), var with divisor s − 1.

        The last factor takes out that all d_i share one g, so that they spread less than
        independent ones: exact for normal gradients (8 % of the error at m = s = 8), to first order
        in 1/m for others. Of an estimate from the gradients of k processes
        (totals.degrees_of_freedom: f = k − 1) T̂·√(2/f): that of noise in one direction.

        Raises:
            ValueError: measured without inner products, fewer than two measured samples, or a batch
                of two, in which both lie at the same distance from their mean.
        """
        self._check_size()
        if self.totals is not None and self.totals.degrees_of_freedom:
            return self.variance_trace * math.sqrt(2 / self.totals.degrees_of_freedom)
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="std_error"))
        if self.n_measured < 2:
            raise ValueError("the standard error needs at least 2 measured samples, got 1: measure "
                             "more (samples=)")
        if self.m_eff <= 2:
            raise ValueError(f"the standard error needs a batch of at least 3 samples, got "
                             f"{self.batch_size}: of two, both lie at one distance from their mean")
        return self.error_of_mean(self._term_spread())

    def error_of_mean(self, spread: float) -> float:
        """Standard error of c·mean_S x_i for terms of standard deviation `spread` that are centred
        at the batch's own mean gradient, as those of T̂."""
        m, s = self.m_eff, self.n_measured
        shared = ((m - 1) ** 2 + s - 1) / (m * (m - 2))
        return spread * math.sqrt(shared / s) / (1 - 1 / m)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) = (T̂/(1 + t·r), T̂/(1 − t·r)), r = std_error/T̂, t the quantile of Student's
        distribution with s − 1 degrees of freedom; high is infinite where t·r >= 1.

        The error of a variance grows with the variance: r is taken to hold at the true T. Where
        ‖g_i − g‖² has heavy tails it covers less than its level until s is large; see
        adabatch/diagnostics/README.md.

        Raises:
            ValueError: measured without inner products, too few samples for an error, or a level
                outside (0, 1).

        Example:
            >>> import torch
            >>> g = torch.tensor([1.0, 2.0, 3.0, 6.0])
            >>> moments = GradientMoments(4, g**2, 9.0, inner_products=3 * g)
            >>> round(moments.variance_trace, 3), [round(end, 2) for end in moments.interval(0.5)]
            (4.667, [3.03, 10.16])
        """
        from scipy.special import stdtrit

        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, both excluded, got {level!r}; 0.9 "
                             "is usual")
        trace = self.variance_trace
        half = float(stdtrit(self.n_measured - 1, (1 + level) / 2)) * self.std_error
        if not trace > 0:
            return 0.0, half
        return trace**2 / (trace + half), trace**2 / (trace - half) if half < trace else math.inf

    @property
    def inner_product_variance(self) -> float:
        """Var_i⟨g_i, g⟩ = mean_S (⟨g_i, g⟩ − ‖g‖²)²/(1 − 1/m_eff), divisor m − 1; with weights
        ⟨z_i − w_i g, g⟩. The part of the trace along g, times ‖g‖².

        Raises:
            ValueError: measured without inner products, or a batch of one.
        """
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="inner_product_variance"))
        self._check_size()
        if self.totals is not None and self.totals.mean_inner is not None:
            return self.totals.mean_inner / (1 - 1 / self.m_eff)
        weights = 1.0 if self.weights is None else self.weights
        squares = (self.inner_products.double() - weights * self.grad_sq_norm).square()
        if self.corrections is not None:
            squares = self.corrections * squares
        return float(squares.mean()) / (1 - 1 / self.m_eff)

    @property
    def true_grad_sq_norm(self) -> float:
        """Ĝ² = ‖g‖² − T̂/m_eff, unbiased for ‖E g_i‖²; may be negative on one batch: smooth first,
        clamp after."""
        return self.grad_sq_norm - self.variance_trace / self.m_eff

    @property
    def noise_scale(self) -> float:
        """T̂/Ĝ² of this batch alone (in samples). A ratio of single estimates: for a steady figure
        divide smoothed ones. Infinite if Ĝ² is 0."""
        return _ratio(self.variance_trace, self.true_grad_sq_norm)

    @property
    def snr(self) -> float:
        """m·Ĝ²/T̂, the signal-to-noise ratio of the batch gradient. Infinite if T̂ is 0."""
        return _ratio(self.m_eff * self.true_grad_sq_norm, self.variance_trace)

    @property
    def is_finite(self) -> bool:
        """Whether all moments are finite numbers."""
        if self.totals is not None:
            return math.isfinite(self.grad_sq_norm) and math.isfinite(self.mean_sq_norm)
        parts = [each for each in (self.sq_norms, self.inner_products) if each is not None]
        finite = all(bool(part.isfinite().all()) for part in parts)
        return math.isfinite(self.grad_sq_norm) and finite

    def _terms(self) -> Tensor:
        """Values [s] whose mean is T̂·(1 − 1/m_eff)."""
        terms = self.centred_sq_norms
        return terms if self.corrections is None else self.corrections * terms

    def _term_spread(self) -> float:
        """Their standard deviation, divisor s − 1."""
        totals, s = self.totals, self.n_measured
        if totals is None or totals.mean_term is None or totals.mean_square_term is None:
            return float(self._terms().std())
        variance = totals.mean_square_term - totals.mean_term**2
        return math.sqrt(max(0.0, variance) * s / (s - 1))

    def _check_size(self) -> None:
        if self.m_eff <= 1:
            raise ValueError("the variance of the gradient needs at least 2 samples, got a batch "
                             f"of {self.batch_size}")
        if not self.n_measured:
            raise ValueError("no sample was measured")


def centred_terms(moments: GradientMoments, name: str = "the trace") -> tuple[Tensor, Tensor]:
    """(a, b) [s], float64, with ‖g_i − w_i g‖² = a_i + b_i ‖g‖²: a_i = ‖g_i‖² − 2 w_i ⟨g_i, g⟩,
    b_i = w_i².

    Raises:
        ValueError: measured without inner products.
    """
    if moments.inner_products is None:
        raise ValueError(NO_INNER_PRODUCTS.format(name=name))
    norms, products = moments.sq_norms.double(), moments.inner_products.double()
    weights = torch.ones_like(norms) if moments.weights is None else moments.weights.double()
    return norms - 2 * weights * products, weights**2


def mean_of(values: Tensor) -> float:
    """The mean, added up in float64. Few values are added up in Python: the first reduction in a
    step takes longer than that.

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
