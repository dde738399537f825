"""Intervals of ratios of moving averages: the noise scale, and the proposals of controllers.

Legend: x, y values of the same steps, p_i and q_i their weights in their averages X and Y, φ a
ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from adabatch.estimators.averages import MovingAverage, student_quantile
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import NO_INTERVAL

UNKNOWN = (0.0, math.inf)


def fieller(
    numerator: float,
    denominator: float,
    variances: tuple[float, float],
    covariance: float,
    quantile: float,
) -> tuple[float, float]:
    """(low, high): the ratios φ >= 0 with (X − φY)² <= t²·(V_X − 2φ·V_XY + φ²·V_Y).

    X and Y estimate two quantities that are not negative. Exact for normal X and Y, where X/Y ∓ its
    error is not: a ratio is skewed, and has no end where Y might be 0. There, Y² <= t²·V_Y, it is
    [low, ∞); [0, ∞) where X might be 0 too, or an error is not known. A Y below 0 by more than its
    error leaves φ = ∞, which is what the rules make of it.

    Args:
        numerator, denominator: X and Y.
        variances: V_X and V_Y, of the estimates (squared standard errors).
        covariance: V_XY.
        quantile: t.

    Example:
        >>> [round(end, 3) for end in fieller(8.0, 2.0, (0.16, 0.04), 0.0, 1.645)]
        [3.357, 4.865]
        >>> [round(end, 3) for end in fieller(8.0, 0.2, (0.16, 0.04), 0.0, 1.645)]
        [15.041, inf]

    References:
        Fieller (1954), "Some problems in interval estimation", Journal of the Royal Statistical
        Society B 16.
    """
    if math.isnan(numerator) or math.isnan(denominator):
        return NO_INTERVAL
    if not all(map(math.isfinite, (quantile, covariance, *variances))):
        return UNKNOWN
    square = quantile * quantile
    a = denominator**2 - square * variances[1]
    b = numerator * denominator - square * covariance
    c = numerator**2 - square * variances[0]
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0 and denominator > 0:
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
    if c <= 0:
        return UNKNOWN
    if a > 0:
        return (math.inf, math.inf) if numerator > 0 else (0.0, 0.0)
    if numerator < 0:
        return UNKNOWN
    return (c / (b + root) if b + root > 0 else math.inf), math.inf


class JointAverages:
    """Moving averages of values measured in the same steps, with the covariances of their errors.

        V_XY = ρ·SE_X·SE_Y,   ρ from the residuals' sums Σ p_i q_i (x_i − X)(y_i − Y) / lost,
        lost = 1 − (Σp²q + Σpq²)/Σpq + Σpq, and the like for x with x and y with y

    so that whichever errors the averages have (of the values, or of residuals), the matrix is one
    of covariances.

    Args:
        averages: they belong to the caller, who reads and saves them.

    Example:
        >>> trace, square = MovingAverage(), MovingAverage()
        >>> joint = JointAverages(trace, square)
        >>> for t, g in ((4.0, 1.0), (5.0, 1.2), (3.0, 1.0), (4.0, 0.8)):
        ...     _ = joint.update((t, 16), (g, 16))
        >>> low, high = joint.ratio_interval(0.9)
        >>> round(trace.average / square.average, 2), round(low, 2), round(high, 2)
        (4.01, 3.13, 5.04)
    """

    def __init__(self, *averages: MovingAverage):
        self.averages = averages
        # Of each pair: Σ w, Σ kw·w, Σ w·lv, Σ w(x − X), Σ w(y − Y), Σ w(x − X)(y − Y), with w the
        # product of both weights and their decays, kw and lv the single ones.
        pairs = itertools.combinations(range(len(averages)), 2)
        self._sums = {pair: [0.0] * 6 for pair in pairs}

    def update(self, *values: Sequence[float]) -> tuple[float, ...]:
        """Take values, each as the arguments of MovingAverage.update; return the averages."""
        averages = self.averages
        before = [(each.average, each.count) for each in averages]
        after = tuple(each.update(*value) for each, value in zip(averages, values, strict=True))
        taken = [each.count > count for each, (_, count) in zip(averages, before, strict=True)]
        moved = [
            now - then if count and took else 0.0
            for now, (then, count), took in zip(after, before, taken, strict=True)
        ]
        decays = [a.smoothing if took else 1.0 for a, took in zip(averages, taken, strict=True)]
        for (first, second), sums in self._sums.items():
            dx, dy = moved[first], moved[second]
            weights, _, _, of_x, of_y, _ = sums
            # About the averages where they have moved to.
            sums[5] += dx * dy * weights - dy * of_x - dx * of_y
            sums[3] -= dx * weights
            sums[4] -= dy * weights
            k, h = decays[first], decays[second]
            both, terms = k * h, [0.0] * 6
            if taken[first] and taken[second]:
                (x, w), (y, v) = values[first][:2], values[second][:2]
                dx, dy = x - after[first], y - after[second]
                terms = [w * v * term for term in (1.0, w, v, dx, dy, dx * dy)]
            each = (both, both * k, both * h, both, both, both)
            for place, (decay, term) in enumerate(zip(each, terms, strict=True)):
                sums[place] = sums[place] * decay + term
        return after

    def covariance(self, first: int = 0, second: int = 1) -> float:
        """V_XY of two averages; NaN where an error is not known."""
        x, y = self.averages[first], self.averages[second]
        errors, residuals = x.std_error() * y.std_error(), x.residual_error() * y.residual_error()
        if math.isnan(errors):
            return math.nan
        weights, by_x, by_y, _, _, products = self._sums[first, second]
        if not residuals > 0 or not weights:
            return 0.0
        both = x.weights * y.weights
        lost = 1 - (by_x / x.weights + by_y / y.weights) / weights + weights / both
        correlation = products / lost / both / residuals if lost > 1e-12 else 0.0
        return min(1.0, max(-1.0, correlation)) * errors

    def ratio_interval(
        self,
        level: float = 0.9,
        *,
        numerator: int = 0,
        denominator: int = 1,
        scale: float = 1.0,
        power: int = 1,
    ) -> tuple[float, float]:
        """`fieller` of scale·X/Y^power, with p·Y^(p−1)·SE_Y for the error of Y^p.

        It has the smaller of the two averages' degrees of freedom.

        Raises:
            ValueError: a level outside (0, 1).
        """
        x, y = self.averages[numerator], self.averages[denominator]
        quantile = student_quantile(level, min(x.freedom, y.freedom))
        if not (x.count and y.count):
            return UNKNOWN
        slope = power * y.average ** (power - 1)
        variances = (scale * x.std_error()) ** 2, (slope * y.std_error()) ** 2
        covariance = self.covariance(*sorted((numerator, denominator)))
        divisor = y.average**power if y.average > 0 else y.average
        return fieller(scale * x.average, divisor, variances, scale * slope * covariance, quantile)

    def state_dict(self) -> dict[str, Any]:
        """The sums of products, as plain numbers; not the averages, which are the caller's."""
        return {"sums": [list(sums) for sums in self._sums.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(), with the averages that belong to it.

        Raises:
            ValueError: the state of another number of averages.
        """
        found, pairs = state["sums"], len(self._sums)
        if len(found) != pairs:
            raise ValueError(
                f"the state holds {len(found)} pairs of averages, these are {pairs}: pass what "
                "JointAverages.state_dict() returned"
            )
        self._sums = {pair: list(sums) for pair, sums in zip(self._sums, found, strict=True)}


def trace_error(moments: GradientMoments) -> tuple[float, float]:
    """(std_error, degrees of freedom) of this step's T̂, for MovingAverage.update.

    (NaN, 0) where inner_products were not measured or samples are too few.

    Example:
        >>> import torch
        >>> trace_error(GradientMoments(4, sq_norms=torch.ones(4), grad_sq_norm=0.5))
        (nan, 0.0)
    """
    try:
        return moments.std_error, moments.n_measured - 1.0
    except ValueError:
        return math.nan, 0.0


def trace_and_signal(moments: GradientMoments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """T̂ with s and its error, and Ĝ² with m: what JointAverages.update takes.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)
        >>> trace_and_signal(moments)
        ((4.0, 2, nan, 0.0), (2.0, 2))
    """
    trace = moments.variance_trace, moments.n_measured, *trace_error(moments)
    return trace, (moments.true_grad_sq_norm, moments.batch_size)
