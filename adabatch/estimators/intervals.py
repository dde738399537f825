"""Intervals of ratios of moving averages: the noise scale, and the proposals of controllers.

Legend: x, y values of the same steps, p_i and q_i their shares in their averages X and Y, φ a ratio.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from adabatch.estimators.averages import MovingAverage, student_quantile
from adabatch.estimators.moments import GradientMoments

UNKNOWN = (0.0, math.inf)
NO_INTERVAL = (math.nan, math.nan)


def fieller(numerator: float, denominator: float, variances: tuple[float, float], covariance: float, quantile: float) -> tuple[float, float]:
    """(low, high): the ratios φ >= 0 with (X − φY)² <= t²·(V_X − 2φ·V_XY + φ²·V_Y), for estimates X and Y of two quantities that are not negative.

    Exact for normal X and Y, where X/Y ∓ its error is not: a ratio is skewed, and has no end where Y might be 0. There, Y² <= t²·V_Y, it is [low, ∞); [0, ∞)
    where X might be 0 too, or an error is not known. A Y below 0 by more than its error leaves φ = ∞, which is what the rules make of it.

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
        Fieller (1954), "Some problems in interval estimation", Journal of the Royal Statistical Society B 16.
    """
    if math.isnan(numerator) or math.isnan(denominator):
        return NO_INTERVAL
    if not math.isfinite(quantile) or not all(math.isfinite(value) for value in (*variances, covariance)):
        return UNKNOWN
    square = quantile * quantile
    a, b, c = denominator**2 - square * variances[1], numerator * denominator - square * covariance, numerator**2 - square * variances[0]
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

        V_XY = ρ·SE_X·SE_Y,   ρ from the residuals' Σ p_i q_i (x_i − X)(y_i − Y) / (1 − (Σp²q + Σpq²)/Σpq + Σpq) and the like for x with x and y with y

    so that whatever errors the averages have (of the values, or of residuals), the matrix is one of covariances.

    Args:
        averages: they stay the caller's own: to read, and to save.

    Example:
        >>> trace, square = MovingAverage(), MovingAverage()
        >>> joint = JointAverages(trace, square)
        >>> for t, g in ((4.0, 1.0), (5.0, 1.2), (3.0, 1.0), (4.0, 0.8)):
        ...     _ = joint.update((t, 16), (g, 16))
        >>> round(trace.average / square.average, 2), [round(end, 2) for end in joint.ratio_interval(0.9)]
        (4.01, [3.13, 5.04])
    """

    def __init__(self, *averages: MovingAverage):
        self.averages = averages
        # Σ w, Σ kw·w, Σ w·lv, Σ w(x − X), Σ w(y − Y), Σ w(x − X)(y − Y), with w the product of both weights and their decays, kw and lv the single ones.
        self._sums = {pair: [0.0] * 6 for pair in itertools.combinations(range(len(averages)), 2)}

    def update(self, *values: tuple[float, ...]) -> tuple[float, ...]:
        """Take the step's values, each with its weight and, where it is known, its error: the arguments of MovingAverage.update; give the averages."""
        before = [(average.average, average.count) for average in self.averages]
        after = tuple(average.update(*value) for average, value in zip(self.averages, values, strict=True))
        taken = [average.count > count for average, (_, count) in zip(self.averages, before, strict=True)]
        moved = [now - then if count and took else 0.0 for now, (then, count), took in zip(after, before, taken, strict=True)]
        for (first, second), sums in self._sums.items():
            decays = [self.averages[index].smoothing if taken[index] else 1.0 for index in (first, second)]
            _shift(sums, moved[first], moved[second])
            both = decays[0] * decays[1]
            for place, decay in enumerate((both, both * decays[0], both * decays[1], both, both, both)):
                sums[place] *= decay
            if taken[first] and taken[second]:
                (x, w, *_), (y, v, *_) = values[first], values[second]
                dx, dy = x - after[first], y - after[second]
                for place, term in enumerate((1.0, w, v, dx, dy, dx * dy)):
                    sums[place] += w * v * term
        return after

    def covariance(self, first: int = 0, second: int = 1) -> float:
        """V_XY of the two averages; NaN where an error is not known."""
        x, y = self.averages[first], self.averages[second]
        errors, residuals = x.std_error() * y.std_error(), x.residual_error() * y.residual_error()
        if math.isnan(errors):
            return math.nan
        if not residuals > 0:
            return 0.0
        weights, by_first, by_second, _, _, products = self._sums[first, second]
        lost = 1 - (by_first / x.weights + by_second / y.weights) / weights + weights / (x.weights * y.weights) if weights else 0.0
        correlation = products / lost / (x.weights * y.weights) / residuals if lost > 1e-12 else 0.0
        return min(1.0, max(-1.0, correlation)) * errors

    def ratio_interval(self, level: float = 0.9, *, numerator: int = 0, denominator: int = 1, scale: float = 1.0, power: int = 1) -> tuple[float, float]:
        """`fieller` of scale·X/Y^power, with the smaller of the two averages' degrees of freedom, and p·Y^(p−1)·SE_Y for the error of Y^p.

        Raises:
            ValueError: a level outside (0, 1).
        """
        x, y = self.averages[numerator], self.averages[denominator]
        quantile = student_quantile(level, min(x.freedom, y.freedom))
        if not (x.count and y.count):
            return UNKNOWN
        slope = power * y.average ** (power - 1)
        variances = (scale * x.std_error()) ** 2, (slope * y.std_error()) ** 2
        covariance = scale * slope * self.covariance(*sorted((numerator, denominator)))
        return fieller(scale * x.average, y.average**power if y.average > 0 else y.average, variances, covariance, quantile)

    def state_dict(self) -> dict[str, Any]:
        """The sums of products, as plain numbers; not the averages, which are the caller's."""
        return {"sums": [list(sums) for sums in self._sums.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(), with the averages that belong to it.

        Raises:
            ValueError: the state of another number of averages.
        """
        if len(state["sums"]) != len(self._sums):
            raise ValueError(f"the state holds {len(state['sums'])} pairs of averages, these are {len(self._sums)}: pass what state_dict() gave")
        self._sums = {pair: list(sums) for pair, sums in zip(self._sums, state["sums"], strict=True)}


def trace_error(moments: GradientMoments) -> tuple[float, float]:
    """(std_error, degrees of freedom) of this step's T̂, for MovingAverage.update; (NaN, 0) where inner_products were not measured or samples are too few.

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
        >>> trace_and_signal(GradientMoments(2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0))
        ((4.0, 2, nan, 0.0), (2.0, 2))
    """
    return (moments.variance_trace, moments.n_measured, *trace_error(moments)), (moments.true_grad_sq_norm, moments.batch_size)


def _shift(sums: list[float], dx: float, dy: float) -> None:
    """Take the sums about the averages X + dx and Y + dy."""
    weights, _, _, x, y, _ = sums
    sums[5] += dx * dy * weights - dy * x - dx * y
    sums[3] -= dx * weights
    sums[4] -= dy * weights
