"""The moving average of controllers and of the history.

Legend: x_i the i-th value, w_i the samples behind it, k_i = μ^(n−i) its decay after n values, μ the smoothing.
"""

from __future__ import annotations

import math


class MovingAverage:
    """Exponential moving average weighted by samples, and its standard error.

        average = Σ k_i w_i x_i / Σ k_i w_i

    The division by the sum of the weights is the bias correction: after one value the average is that value. Weighting by samples matters
    where batches differ in size: of two estimates of a variance, the one from 64 samples is worth sixteen from 4 samples.

    The standard error comes from the residuals around the average, for values whose variance falls as V/w_i:

        S = Σ k_i w_i (x_i − average)²,   V̂ = S / (Σ k_i − Σ k_i² w_i / Σ k_i w_i),   SE² = V̂ Σ k_i² w_i / (Σ k_i w_i)²

    With equal weights it is s²/n_eff, s² the unbiased variance of the values and n_eff = (Σ k_i)²/Σ k_i² the effective number of steps
    (39 for μ = 0.95, not 20). Where the mean itself drifts, the drift is counted as noise, which makes the error too large, not too small.

    Args:
        smoothing: μ, 0 <= μ < 1.

    Raises:
        ValueError: μ outside [0, 1).

    Example:
        >>> average = MovingAverage(0.5)
        >>> average.update(1.0, 16), average.update(4.0, 16)
        (1.0, 3.0)
    """

    __slots__ = ("average", "count", "decays", "smoothing", "square_weights", "squares", "weights")

    def __init__(self, smoothing: float = 0.95):
        check_smoothing(smoothing)
        self.smoothing = smoothing
        self.average = math.nan
        self.count = 0
        self.weights = 0.0
        self.square_weights = 0.0
        self.decays = 0.0
        self.squares = 0.0

    def update(self, value: float, weight: float) -> float:
        """Takes one value with its weight and returns the average. A value that is not finite, or a weight not above 0, changes nothing."""
        if not (math.isfinite(value) and weight > 0):
            return self.average
        decay = self.smoothing
        self.weights = decay * self.weights + weight
        self.square_weights = decay * decay * self.square_weights + weight
        self.decays = decay * self.decays + 1.0
        before = value if self.count == 0 else self.average
        self.average = before + (value - before) * (weight / self.weights)
        # Welford's step: exact for decayed weights too, since a common factor on all of them leaves the mean where it is.
        self.squares = decay * self.squares + weight * (value - before) * (value - self.average)
        self.count += 1
        return self.average

    def std_error(self) -> float:
        """Standard error of the average, in the unit of the values; NaN before the second value, and without smoothing (one value has no spread)."""
        if self.count < 2:
            return math.nan
        freedom = self.decays - self.square_weights / self.weights
        if freedom <= 1e-12:
            return math.nan
        return math.sqrt(self.squares / freedom * self.square_weights) / self.weights

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes the numbers of `state_dict`.

        Raises:
            ValueError: a number is missing.
        """
        missing = [name for name in self.__slots__ if name not in state]
        if missing:
            raise ValueError(f"The state of a moving average lacks {missing}; pass what MovingAverage.state_dict() returned.")
        for name in self.__slots__:
            setattr(self, name, state[name])


def check_smoothing(smoothing: float) -> None:
    """Refuse a decay outside [0, 1).

    Raises:
        ValueError: smoothing out of range.

    Example:
        >>> check_smoothing(0.95)
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing!r}, but must be a number from 0 (no smoothing) to below 1; 0.95 is usual.")
