"""LossFloor: the value that the loss approaches, estimated during training.

Legend: n samples seen since the start (or the last restart), L(n) the loss of a step's batch there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from adabatch._checks import check_version
from adabatch.estimators.averages import half_width
from adabatch.interfaces import State

BIN_RATIO = 1.2  # bins of n grow by this: late ones, which say most of the floor, have most samples
SMALLEST_SPAN = 30.0
RESTART_BELOW = 0.5  # of the lr at the start of the fit
NORMAL_SPREAD = 0.6095  # E ψ²/E ψ' of a standard normal residual
Form = Callable[[np.ndarray, np.ndarray], np.ndarray]


class LossFloor:
    """F* of L(n) = F* + a·(n + n₀)^(−b) or F* + a·exp(−n/τ), whichever fits better.

    The fit is scipy's robust least squares of the losses binned over log n. Refused (NaN) while the
    n of the bins span less than a factor of 30: on a true floor of 0.5 spans of 3, 30 and 300 gave
    .18 to .73, .46 to .53 and .49 to .51. An lr below half of that at the start restarts the fit,
    as the noise's part of the loss falls with it; the old estimate holds until there is a new one.
    The floor never lies above the smallest loss averaged over a bin minus its standard error, nor
    below 0 where no loss did.

    It estimates where the loss goes at the present lr and schedule, an extrapolation; its error is
    that of the fit, if the form is right.

    Attributes:
        value: F*, NaN before there is one.
        std_error: of the fit, with `freedom` degrees of freedom.

    Example:
        >>> floor = LossFloor()
        >>> for step in range(1, 2000):
        ...     _ = floor.update(0.5 + 2 * (16 * step) ** -0.5, samples=16, lr=0.1)
        >>> round(floor.value, 2)
        0.5
    """

    _SAVED = (
        *("value", "std_error", "freedom", "samples", "start_lr", "lowest", "any_negative"),
        *("positions", "losses", "squares", "weights", "counts"),
    )

    def __init__(self) -> None:
        self.value, self.std_error, self.freedom = math.nan, math.nan, 0
        self.lowest, self.any_negative = math.inf, False
        self._restart(math.nan)

    def _restart(self, lr: float) -> None:
        self.samples, self.start_lr = 0, lr
        self.positions: list[float] = []
        self.losses: list[float] = []
        self.squares: list[float] = []
        self.weights: list[float] = []
        self.counts: list[int] = []

    def update(self, loss: float, samples: int, lr: float) -> float:
        """Take a step's loss, its number of samples and the lr; return F*.

        A loss that is not finite is left out.
        """
        if not (math.isfinite(loss) and samples > 0):
            return self.bounded
        if not lr >= RESTART_BELOW * self.start_lr:
            self._restart(lr)
        self.start_lr = max(self.start_lr, lr) if self.samples else lr
        self.any_negative |= loss < 0
        self.samples += samples
        self._add(loss, samples)
        return self.bounded

    @property
    def bounded(self) -> float:
        """F*, not above the smallest averaged loss minus its error; NaN before an estimate."""
        if not math.isfinite(self.value):
            return math.nan
        floor = min(self.value, self.lowest)
        return floor if self.any_negative else max(floor, 0.0)

    @property
    def span(self) -> float:
        """The factor between the largest and the smallest n of the bins; 0 without bins."""
        return self.positions[-1] / self.positions[0] if self.positions else 0.0

    def _add(self, loss: float, samples: int) -> None:
        position = float(self.samples)
        if not self.positions or position > BIN_RATIO * self.positions[-1]:
            if self.span >= SMALLEST_SPAN:
                self._fit()
            for values in (self.losses, self.squares, self.weights):
                values.append(0.0)
            self.positions.append(position)
            self.counts.append(0)
        weight = self.weights[-1] + samples
        before, self.weights[-1] = self.losses[-1], float(weight)
        self.losses[-1] += (loss - before) * samples / weight
        self.squares[-1] += samples * (loss - before) * (loss - self.losses[-1])
        self.counts[-1] += 1

    def _fit(self) -> None:
        """Variance of a loss per sample from the scatter within bins; then the better form."""
        positions, loss = np.array(self.positions), np.array(self.losses)
        centre = np.sqrt(positions * np.append(positions[1:], self.samples)) / positions[0]
        freedom = sum(self.counts) - len(self.counts)
        noise = sum(self.squares) / freedom if freedom > 0 else 0.0
        # No bin is better than the form is true.
        error = np.sqrt(noise / np.array(self.weights) + (1e-4 * np.abs(loss).mean()) ** 2)
        self.lowest = min(self.lowest, float((loss - error).min()))
        fits = [_fitted(form, centre, loss, error) for form in (_power, _exponential)]
        found = min(fits, key=lambda fit: fit.cost)
        covariance = np.linalg.pinv(found.jac.T @ found.jac)
        self.value, self.freedom = float(found.x[0]), max(1, len(loss) - len(found.x))
        variance = float(covariance[0, 0]) * _spread(found.fun, self.freedom)
        self.std_error = math.sqrt(max(0.0, variance))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) = value ∓ t·std_error, t of Student's distribution.

        Its degrees of freedom are the number of bins minus that of the form's parameters.

        Raises:
            ValueError: a level outside (0, 1).
        """
        half = half_width(level, self.std_error, self.freedom)
        return self.value - half, self.value + half

    def state_dict(self) -> State:
        """Plain numbers and lists of them, some kilobytes at most: bins are few."""
        return {"version": 1} | {name: _copied(getattr(self, name)) for name in self._SAVED}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "LossFloor")
        for name in self._SAVED:
            setattr(self, name, _copied(state[name]))


def _copied(value: object) -> object:
    return list(value) if isinstance(value, list) else value


def _spread(residuals: np.ndarray, freedom: int) -> float:
    """Σψ²/(bins − parameters) / mean ψ', with soft_l1's ψ(z) = z/√(1 + z²).

    It is Huber's factor on the inverse of scipy's JᵀJ, in which each bin is weighted by ψ'. Not
    below what normal residuals of variance 1 give, 0.3443/0.5649: the noise is known from within
    the bins.
    """
    ψ, slope = residuals / np.sqrt(1 + residuals**2), (1 + residuals**2) ** -1.5
    return max(NORMAL_SPREAD, float((ψ**2).sum() / freedom / slope.mean()))


def _power(shape: np.ndarray, n: np.ndarray) -> np.ndarray:
    return ((n + np.exp(shape[1])) / (1 + np.exp(shape[1]))) ** -np.exp(shape[0])


def _exponential(shape: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.exp(-n / n[-1] * np.exp(shape[0]))


def _fitted(form: Form, n: np.ndarray, loss: np.ndarray, error: np.ndarray) -> Any:
    """scipy's least_squares with soft_l1 of (F* + a·form − loss)/error.

    It starts where linear fits of F* and a over a grid of shapes are best.
    """
    from scipy.optimize import least_squares

    power, span = form is _power, np.log(n[-1])
    rates = np.log(np.geomspace(0.1, 3, 12) if power else np.geomspace(1, 300, 12))
    shifts = span * np.linspace(-0.5, 0.9, 5)
    shapes = [np.array([rate, shift]) for rate in rates for shift in shifts]
    shapes = shapes if power else [np.array([rate]) for rate in rates]
    start, least = np.array([loss.min(), 0.0, *shapes[0]]), math.inf  # for a loss that rises
    for shape in shapes:
        design = np.stack([np.ones_like(n), form(shape, n)], 1) / error[:, None]
        linear = np.linalg.lstsq(design, loss / error, rcond=None)[0]
        cost = np.abs(design @ linear - loss / error).sum()
        if cost < least and linear[1] >= 0:
            start, least = np.concatenate([linear, shape]), cost
    bounds = [-np.inf, 0.0, rates[0] - 1e-9], [np.inf, np.inf, rates[-1] + 1e-9]
    for ends, end in zip(bounds, (-span, span), strict=True):
        ends += [end] if power else []

    def residuals(at: np.ndarray) -> np.ndarray:
        return (at[0] + at[1] * form(at[2:], n) - loss) / error

    options = {"loss": "soft_l1", "x_scale": "jac", "max_nfev": 100}
    return least_squares(residuals, start, bounds=bounds, **options)
