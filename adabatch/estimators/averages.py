"""The moving averages of controllers and of the diagnostics, and intervals of their ratios: the
noise scale, and the proposals of controllers.

Legend: x_i the i-th value, w_i the samples behind it, k_i = μ^(n−i) its decay after n values, μ the
smoothing, p_i = k_i w_i / Σ k w its weight; X and Y averages, q_i the weights of Y, φ a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from adabatch._checks import smoothing as checked_smoothing
from adabatch.interfaces import NO_INTERVAL

UNKNOWN = (0.0, math.inf)
LEAST_VALUES = 10  # in the horizon of an average of values that are some steps apart


class MovingAverage:
    """Exponential moving average weighted by samples, and its standard error.

        average = Σ k_i w_i x_i / Σ k_i w_i = Σ p_i x_i

    The division by the sum of the weights is the bias correction: after one value the average is
    that value. Weighting by samples matters where batches differ in size: of two estimates of a
    variance, the one from 64 samples is worth sixteen from 4 samples.

    The standard error, where every value came with one: SE² = Σ p_i² SE_i², with
    ν = (Σ p_i² SE_i²)²/Σ (p_i⁴ SE_i⁴/ν_i) degrees of freedom. Otherwise from the residuals around
    the average, each value with its own variance:

        SE² = Σ p_i² (x_i − average)² / (1 − 2 Σp³/Σp² + Σp²),   ν = (Σ p²/w)²/Σ (p²/w)² − 1

    unbiased for values of equal variance, and consistent for any variances: those of ‖g‖² − T̂/m
    fall as 1/m or as 1/m², as signal or noise prevails, and one law for all (V/w_i) gave intervals
    1.7 times too long for batches of 4 and 64. The average is worth n_eff = 1/Σp² values of equal
    variance: 39 steps for μ = 0.95 and equal weights, not 20; its error is known as well as that of
    ν + 1 of them, 20. ν is that of variances V/w_i.

    Where the mean itself drifts, the average is of the mean over the window, and residuals count
    the drift as noise: such an error is too large, not too small. Errors of the values leave the
    drift out.

    Args:
        smoothing: μ, 0 <= μ < 1.

    Raises:
        ValueError: μ outside [0, 1).

    Example:
        >>> average = MovingAverage(0.5)
        >>> average.update(1.0, 16), average.update(4.0, 16)
        (1.0, 3.0)
        >>> round(average.std_error(), 9), round(average.effective_steps, 9)
        (1.58113883, 1.8)
    """

    _STATE = (
        *("average", "count", "smoothing", "weights", "square_weights", "cubes", "offsets"),
        *("squares", "vary", "vary_squares", "known", "known_fourths", "unknown"),
    )
    __slots__ = (*_STATE, "decay")

    def __init__(self, smoothing: float = 0.95):
        checked_smoothing(smoothing)
        self.smoothing = self.decay = smoothing
        self.average = math.nan
        self.count = self.unknown = 0
        self.weights = self.square_weights = self.cubes = 0.0  # Σ kw, Σ (kw)², Σ (kw)³
        self.vary = self.vary_squares = 0.0  # Σ k²w, Σ k⁴w²
        self.offsets = self.squares = 0.0  # Σ (kw)² (x − average), Σ (kw)² (x − average)²
        self.known = self.known_fourths = 0.0  # Σ (kw)² SE², Σ (kw)⁴ SE⁴/ν

    def space(self, steps: int) -> None:
        """The values to come are `steps` steps apart: the average goes back as many steps as one of
        values of every step, 1/(1 − μ), but over LEAST_VALUES values if that is fewer.

        Example:
            >>> sparse = MovingAverage(0.95)
            >>> sparse.space(2), round(sparse.decay, 4), sparse.space(20), sparse.decay
            (None, 0.9025, None, 0.9)
        """
        least = min(self.smoothing, 1 - 1 / LEAST_VALUES)
        self.decay = max(self.smoothing**steps, least)

    def update(
        self, value: float, weight: float, std_error: float = math.nan, freedom: float = math.inf
    ) -> float:
        """Take one value with its weight and return the average.

        A value that is not finite, or a weight that is not positive, changes nothing.

        Args:
            value, weight: x_i and w_i.
            std_error, freedom: SE_i and its degrees of freedom ν_i; NaN where they are not known.
                One value without them makes all errors come from residuals.
        """
        if not (math.isfinite(value) and weight > 0):
            return self.average
        decay = self.decay
        self.weights = decay * self.weights + weight
        before = value if self.count == 0 else self.average
        moved = (value - before) * (weight / self.weights)
        self.average = before + moved
        # The sums are about the average and follow it as it moves: exact, and no difference of
        # large numbers.
        self.squares += moved * (moved * self.square_weights - 2 * self.offsets)
        self.offsets -= moved * self.square_weights
        residual, square = value - self.average, weight * weight
        decay_2, decay_4 = decay**2, decay**4
        self.squares = decay_2 * max(0.0, self.squares) + square * residual * residual
        self.offsets = decay_2 * self.offsets + square * residual
        self.square_weights = decay_2 * self.square_weights + square
        self.cubes = decay**3 * self.cubes + square * weight
        self.vary = decay_2 * self.vary + weight
        self.vary_squares = decay_4 * self.vary_squares + square
        has_error = math.isfinite(std_error) and freedom > 0
        self.unknown += not has_error
        known = square * std_error * std_error if has_error else 0.0
        self.known = decay_2 * self.known + known
        fourth = known * known / freedom if has_error else 0.0
        self.known_fourths = decay_4 * self.known_fourths + fourth
        self.count += 1
        return self.average

    def std_error(self) -> float:
        """Standard error of the average, in the unit of the values.

        From residuals it is NaN before the second value, and without smoothing (no spread).
        """
        if self.count and not self.unknown:
            return math.sqrt(self.known) / self.weights
        return self.residual_error()

    def residual_error(self) -> float:
        """The standard error by the residuals, also where errors of the values are known."""
        if self.count < 2:
            return math.nan
        squares = self.square_weights / self.weights**2
        lost = 1 - 2 * self.cubes / (self.weights * self.square_weights) + squares
        return math.sqrt(self.squares / lost) / self.weights if lost > 1e-12 else math.nan

    @property
    def effective_steps(self) -> float:
        """n_eff = (Σ k_i w_i)²/Σ k_i² w_i² = 1/Σp²; 0 before the first value."""
        return self.weights**2 / self.square_weights if self.count else 0.0

    @property
    def freedom(self) -> float:
        """ν, the degrees of freedom of the standard error."""
        if not self.count:
            return 0.0
        if self.unknown:
            return self.vary**2 / self.vary_squares - 1
        return self.known**2 / self.known_fourths if self.known_fourths else math.inf

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) = average ∓ t·std_error, t of Student's distribution with ν degrees
        of freedom. Infinitely long where there is no error yet.

        Raises:
            ValueError: a level outside (0, 1).
        """
        half = half_width(level, self.std_error(), self.freedom)
        return self.average - half, self.average + half

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: a number is missing.
        """
        missing = [name for name in self._STATE if name not in state]
        if missing:
            raise ValueError(
                f"the state of a moving average lacks {missing}: pass what "
                "MovingAverage.state_dict() returned"
            )
        for name in self._STATE:
            setattr(self, name, state[name])
        self.decay = self.smoothing


def student_quantile(level: float, freedom: float) -> float:
    """t with P(|t_ν| <= t) = level; of the normal distribution for ν = ∞, ∞ unless ν > 0.

    Raises:
        ValueError: a level outside (0, 1).

    Example:
        >>> [round(student_quantile(0.9, freedom), 3) for freedom in (1, 37, float("inf"))]
        [6.314, 1.687, 1.645]
    """
    from scipy.special import ndtri, stdtrit

    if not 0 < level < 1:
        raise ValueError(
            f"level must lie between 0 and 1, both excluded, got {level!r}; 0.9 is usual"
        )
    if not freedom > 0:
        return math.inf
    at = (1 + level) / 2
    quantile = float(ndtri(at) if math.isinf(freedom) else stdtrit(freedom, at))
    return quantile if math.isfinite(quantile) else math.inf


def half_width(level: float, std_error: float, freedom: float) -> float:
    """t·std_error; infinite where the error is not known.

    Example:
        >>> round(half_width(0.9, 2.0, 37), 2), half_width(0.9, math.nan, 37)
        (3.37, inf)
    """
    half = student_quantile(level, freedom) * std_error
    return half if math.isfinite(half) else math.inf


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


class Ratio(NamedTuple):
    """What the interval of X/Y is worked out from, when it is read.

    Attributes:
        numerator, denominator: X and Y.
        variances: V_X and V_Y, of the estimates.
        covariance: V_XY.
        freedom: degrees of freedom of both errors, the smaller one.

    Example:
        >>> [round(end, 2) for end in Ratio(8.0, 2.0, (0.16, 0.04), 0.0, 37).interval(0.9)]
        [3.34, 4.89]
    """

    numerator: float
    denominator: float
    variances: tuple[float, float]
    covariance: float
    freedom: float

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """`fieller`'s; ValueError: a level outside (0, 1)."""
        quantile = student_quantile(level, self.freedom)
        return fieller(
            self.numerator, self.denominator, self.variances, self.covariance, quantile)


class JointAverages:
    """Two moving averages of values measured in the same steps; the covariance of their errors.

        V_XY = ρ·SE_X·SE_Y,   ρ from the residuals' sums Σ p_i q_i (x_i − X)(y_i − Y) / lost,
        lost = 1 − (Σp²q + Σpq²)/Σpq + Σpq, and the like for x with x and y with y

    so that whichever errors the averages have (of the values, or of residuals), the matrix is one
    of covariances.

    Args:
        x, y: they belong to the caller, who reads and saves them.

    Example:
        >>> trace, square = MovingAverage(), MovingAverage()
        >>> joint = JointAverages(trace, square)
        >>> for t, g in ((4.0, 1.0), (5.0, 1.2), (3.0, 1.0), (4.0, 0.8)):
        ...     _ = joint.update((t, 16), (g, 16))
        >>> low, high = joint.ratio_interval(0.9)
        >>> round(trace.average / square.average, 2), round(low, 2), round(high, 2)
        (4.01, 3.13, 5.04)
    """

    def __init__(self, x: MovingAverage, y: MovingAverage):
        self.averages = x, y
        # Σ w, Σ kw·w, Σ w·lv, Σ w(x − X), Σ w(y − Y), Σ w(x − X)(y − Y), with w the product of both
        # weights and their decays, kw and lv the single ones.
        self._sums = [0.0] * 6

    def update(self, of_x: Sequence[float], of_y: Sequence[float]) -> tuple[float, float]:
        """Take two values, each as the arguments of MovingAverage.update; return the averages."""
        x, y = self.averages
        before_x, count_x, before_y, count_y = x.average, x.count, y.average, y.count
        now_x, now_y = x.update(*of_x), y.update(*of_y)
        took_x, took_y = x.count > count_x, y.count > count_y
        dx = now_x - before_x if count_x and took_x else 0.0
        dy = now_y - before_y if count_y and took_y else 0.0
        weights, by_x, by_y, offset_x, offset_y, products = self._sums
        # About the averages where they have moved to.
        products += dx * dy * weights - dy * offset_x - dx * offset_y
        offset_x -= dx * weights
        offset_y -= dy * weights
        k, h = x.decay if took_x else 1.0, y.decay if took_y else 1.0
        both, w, v, dx, dy = k * h, 0.0, 0.0, 0.0, 0.0
        if took_x and took_y:
            w, v, dx, dy = of_x[1], of_y[1], of_x[0] - now_x, of_y[0] - now_y
        pair = w * v
        self._sums = [
            weights * both + pair, by_x * (both * k) + pair * w, by_y * (both * h) + pair * v,
            offset_x * both + pair * dx, offset_y * both + pair * dy,
            products * both + pair * (dx * dy)]
        return now_x, now_y

    def errors(self) -> tuple[float, float, float]:
        """Standard errors of both averages, and V_XY; NaN where an error is not known."""
        x, y = self.averages
        of_x, of_y = x.residual_error(), y.residual_error()
        error_x = of_x if x.unknown else x.std_error()
        error_y = of_y if y.unknown else y.std_error()
        errors, residuals = error_x * error_y, of_x * of_y
        if math.isnan(errors):
            return error_x, error_y, math.nan
        weights, by_x, by_y, _, _, products = self._sums
        if not residuals > 0 or not weights:
            return error_x, error_y, 0.0
        both = x.weights * y.weights
        lost = 1 - (by_x / x.weights + by_y / y.weights) / weights + weights / both
        correlation = products / lost / both / residuals if lost > 1e-12 else 0.0
        return error_x, error_y, min(1.0, max(-1.0, correlation)) * errors

    def covariance(self) -> float:
        """V_XY; NaN where an error is not known."""
        return self.errors()[2]

    def ratio(self, scale: float = 1.0) -> Ratio:
        """scale·X/Y."""
        (x, y), (error_x, error_y, covariance) = self.averages, self.errors()
        return Ratio(scale * x.average, y.average, ((scale * error_x) ** 2, error_y ** 2),
                     scale * covariance, min(x.freedom, y.freedom))

    def ratio_interval(self, level: float = 0.9, *, scale: float = 1.0) -> tuple[float, float]:
        """`fieller` of scale·X/Y, with the smaller of the averages' degrees of freedom.

        Raises:
            ValueError: a level outside (0, 1).
        """
        found, (x, y) = self.ratio(scale).interval(level), self.averages
        return found if x.count and y.count else UNKNOWN

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The sums of products, as plain numbers; not the averages, which are the caller's."""
        return {"sums": [list(self._sums)]}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Continue from a state_dict(), with the averages that belong to it.

        Raises:
            ValueError: the state of another number of averages.
        """
        found = state["sums"]
        if len(found) != 1:
            raise ValueError(
                f"the state holds {len(found)} pairs of averages, these are 1: pass what "
                "JointAverages.state_dict() returned"
            )
        self._sums = list(found[0])
