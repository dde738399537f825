"""Intervals of ratios of one step's moments, for rules that smooth nothing.

Legend: m samples in the step, s measured, g_i their gradients, g the mean over the batch, d_i = ‖g_i − g‖², V = Var_i⟨g_i, g⟩, S = ‖g‖², Σ = Cov(g_i).
"""

from __future__ import annotations

import math

from torch import Tensor

from adabatch.estimators.averages import student_quantile
from adabatch.estimators.intervals import NO_INTERVAL, fieller, trace_error
from adabatch.estimators.moments import GradientMoments


def signal_error(moments: GradientMoments) -> float:
    """Standard error of S = ‖g‖² as an estimate of E‖g‖² = G² + T/m; NaN without inner products, or with too few samples.

        SE² = max(4V/m − s·SE(T̂)²/m², 2V/m)

    The variance of S is 4·GᵀΣG/m + 2·tr(Σ²)/m², that of normal g; V is GᵀΣG + tr(Σ²)/m on average, and the spread of the d_i that of normal gradients,
    2·tr(Σ²). With heavier tails they spread more; never is the variance below half of 4V/m. Where noise prevails, both are right on average, and the larger of
    them up to a fifth too large.

    Example:
        >>> import torch
        >>> grads = torch.tensor([1.0, 2.0, 3.0, 6.0])  # V = 42, SE(T̂)² = 98/9: √(42 − 4 · 98/9/16)
        >>> round(signal_error(GradientMoments(4, sq_norms=grads**2, grad_sq_norm=9.0, inner_products=3 * grads)), 4)
        6.2672
    """
    error, _ = trace_error(moments)
    if moments.inner_products is None or math.isnan(error):
        return math.nan
    m, variance = _size(moments), moments.inner_product_variance
    return math.sqrt(max(4 * variance / m - moments.n_measured * (error / m) ** 2, 2 * variance / m))


def mean_error(terms: Tensor, moments: GradientMoments) -> float:
    """Standard error of Σ x_i/s·m/(m − 1) for terms [s] that are centred at the batch's own mean gradient, as those of T̂: see `GradientMoments.std_error`.

    Example:
        >>> import torch
        >>> grads = torch.tensor([1.0, 2.0, 3.0, 6.0])
        >>> moments = GradientMoments(4, sq_norms=grads**2, grad_sq_norm=9.0, inner_products=3 * grads)
        >>> round(mean_error(moments.centred_sq_norms, moments) / moments.std_error, 9)
        1.0
    """
    m, s = _size(moments), len(terms)
    if s < 2 or m <= 2:
        return math.nan
    return float(terms.double().std()) * math.sqrt(((m - 1) ** 2 + s - 1) / (m * (m - 2)) / s) / (1 - 1 / m)


def ratio_interval(numerator: float, error: float, moments: GradientMoments, level: float = 0.9, scale: float = 1.0) -> tuple[float, float]:
    """`fieller` of scale·X/‖g‖², for an X of this step with its standard error, s − 1 degrees of freedom; (NaN, NaN) where an error is not known.

    The ratio held is that of what X and ‖g‖² estimate, E‖g‖² = G² + T/m: what the rule would ask for on average at this size. Spread within the batch and
    the batch's mean are independent for normal gradients, and count as such: with the covariance estimated, skewed (exponential) gradients were covered in .70
    to .89 of the runs, without in .84 to .98; normal ones in .83 to .93, the least for V/‖g‖⁴ of 8 samples whose signal is strong.

    Raises:
        ValueError: a level outside (0, 1).

    Example:
        >>> import torch
        >>> grads = torch.tensor([4.0, 5.0, 6.0, 5.0])
        >>> moments = GradientMoments(4, sq_norms=grads**2, grad_sq_norm=25.0, inner_products=5 * grads)
        >>> [round(end, 3) for end in ratio_interval(moments.variance_trace, moments.std_error, moments)]
        [0.0, 0.081]
    """
    quantile = student_quantile(level, moments.n_measured - 1)
    of_signal = signal_error(moments)
    if math.isnan(error) or math.isnan(of_signal):
        return NO_INTERVAL
    return fieller(scale * numerator, moments.grad_sq_norm, ((scale * error) ** 2, of_signal**2), 0.0, quantile)


def _size(moments: GradientMoments) -> float:
    return float(moments.batch_size) if moments.effective_batch_size is None else moments.effective_batch_size
