"""The moving average of controllers and of the diagnostics.

Legend: x_i the i-th value, w_i the samples behind it, k_i = μ^(n−i) its decay after n values, μ the
smoothing, p_i = k_i w_i / Σ k w its weight.
"""

from __future__ import annotations

import math

from adabatch._checks import smoothing as checked_smoothing


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

    __slots__ = (
        *("average", "count", "smoothing", "weights", "square_weights", "cubes", "offsets"),
        *("squares", "vary", "vary_squares", "known", "known_fourths", "unknown"),
    )

    def __init__(self, smoothing: float = 0.95):
        checked_smoothing(smoothing)
        self.smoothing = smoothing
        self.average = math.nan
        self.count = self.unknown = 0
        self.weights = self.square_weights = self.cubes = 0.0  # Σ kw, Σ (kw)², Σ (kw)³
        self.vary = self.vary_squares = 0.0  # Σ k²w, Σ k⁴w²
        self.offsets = self.squares = 0.0  # Σ (kw)² (x − average), Σ (kw)² (x − average)²
        self.known = self.known_fourths = 0.0  # Σ (kw)² SE², Σ (kw)⁴ SE⁴/ν

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
        decay = self.smoothing
        self.weights = decay * self.weights + weight
        before = value if self.count == 0 else self.average
        moved = (value - before) * (weight / self.weights)
        self.average = before + moved
        # The sums are about the average and follow it as it moves: exact, and no difference of
        # large numbers.
        self.squares += moved * (moved * self.square_weights - 2 * self.offsets)
        self.offsets -= moved * self.square_weights
        residual, square = value - self.average, weight * weight
        self.squares = decay**2 * max(0.0, self.squares) + square * residual * residual
        self.offsets = decay**2 * self.offsets + square * residual
        self.square_weights = decay**2 * self.square_weights + square
        self.cubes = decay**3 * self.cubes + square * weight
        self.vary = decay**2 * self.vary + weight
        self.vary_squares = decay**4 * self.vary_squares + square
        has_error = math.isfinite(std_error) and freedom > 0
        self.unknown += not has_error
        known = square * std_error * std_error if has_error else 0.0
        self.known = decay**2 * self.known + known
        fourth = known * known / freedom if has_error else 0.0
        self.known_fourths = decay**4 * self.known_fourths + fourth
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
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: a number is missing.
        """
        missing = [name for name in self.__slots__ if name not in state]
        if missing:
            raise ValueError(
                f"the state of a moving average lacks {missing}: pass what "
                "MovingAverage.state_dict() returned"
            )
        for name in self.__slots__:
            setattr(self, name, state[name])


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
