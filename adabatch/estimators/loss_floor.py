"""LossFloor: where the loss is going, estimated while it is on its way.

Legend: n samples seen since the start (or the last restart), L(n) the loss of a step's batch there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from adabatch._checks import check_version
from adabatch.estimators.averages import half_width

BIN_RATIO = 1.2  # bins of n grow by this factor: late ones, which say most of the floor, hold most of the samples
SMALLEST_SPAN = 30.0
RESTART_BELOW = 0.5  # of the lr at the start of the fit
NORMAL_SPREAD = 0.6095  # E ψ²/E ψ' of a standard normal residual


class LossFloor:
    """F* of L(n) = F* + a·(n + n₀)^(−b) or F* + a·exp(−n/τ), whichever fits better, by a robust least-squares fit of scipy's to the losses binned over log n.

    Refused (NaN) while the n of the bins span less than a factor of 30: on a true floor of 0.5 spans of 3, 30 and 300 gave .18 to .73, .46 to .53 and .49 to
    .51. An lr below half of that at the start begins anew, as the noise's share of the loss falls with it; the old estimate holds until the new one can be
    made. The floor never lies above the smallest loss averaged over a bin minus its standard error, nor below 0 where no loss did.

    What it estimates is where the loss goes at the present lr and schedule, an extrapolation; its error is that of the fit if the form is right.

    Attributes:
        value: F*, NaN before there is one. std_error: of the fit, with `freedom` degrees of freedom.

    Example:
        >>> floor = LossFloor()
        >>> for step in range(1, 2000):
        ...     _ = floor.update(0.5 + 2 * (16 * step) ** -0.5, samples=16, lr=0.1)
        >>> round(floor.value, 2)
        0.5
    """

    _SAVED = ("value", "std_error", "freedom", "samples", "start_lr", "lowest", "any_negative", "positions", "losses", "squares", "weights", "counts")

    def __init__(self):
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
        """Take a step's loss, its number of samples and the lr; give F*. A loss that is not finite is left out."""
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
        """F*, not above the smallest averaged loss minus its error; NaN before there is an estimate."""
        floor = min(self.value, self.lowest) if math.isfinite(self.value) else math.nan
        return floor if self.any_negative else max(floor, 0.0) if floor == floor else math.nan

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
        """Variance of a loss per sample from the scatter inside the bins; then the better of the two forms."""
        position, loss, weight = (np.array(values) for values in (self.positions, self.losses, self.weights))
        centre = np.sqrt(position * np.append(position[1:], self.samples)) / position[0]
        freedom = sum(self.counts) - len(self.counts)
        noise = sum(self.squares) / freedom if freedom > 0 else 0.0
        error = np.sqrt(noise / weight + (1e-4 * np.abs(loss).mean()) ** 2)  # no bin is better than the form is true
        self.lowest = min(self.lowest, float((loss - error).min()))
        found = min((_fitted(form, centre, loss, error) for form in (_power, _exponential)), key=lambda fit: fit.cost)
        covariance = np.linalg.pinv(found.jac.T @ found.jac)
        self.value, self.freedom = float(found.x[0]), max(1, len(loss) - len(found.x))
        self.std_error = math.sqrt(max(0.0, float(covariance[0, 0]) * _spread(found.fun, self.freedom)))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high), value ∓ t·std_error, t of Student's distribution with as many degrees of freedom as there are bins beyond the form's parameters.

        Raises:
            ValueError: a level outside (0, 1).
        """
        half = half_width(level, self.std_error, self.freedom)
        return self.value - half, self.value + half

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists of them, some kilobytes at most: bins are few."""
        state = {name: list(value) if isinstance(value := getattr(self, name), list) else value for name in self._SAVED}
        return {"version": 1, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "LossFloor")
        for name in self._SAVED:
            setattr(self, name, list(state[name]) if isinstance(state[name], list) else state[name])


def _spread(residuals: np.ndarray, freedom: int) -> float:
    """Σψ²/(bins − parameters) / mean ψ', Huber's factor on the inverse of scipy's JᵀJ, which weighs each bin by ψ'; ψ(z) = z/√(1 + z²) is soft_l1's.

    Not below what normal residuals of variance 1 give, 0.3443/0.5649: the noise is known from inside the bins.
    """
    ψ, slope = residuals / np.sqrt(1 + residuals**2), (1 + residuals**2) ** -1.5
    return max(NORMAL_SPREAD, float((ψ**2).sum() / freedom / slope.mean()))


def _power(shape: np.ndarray, n: np.ndarray) -> np.ndarray:
    return ((n + np.exp(shape[1])) / (1 + np.exp(shape[1]))) ** -np.exp(shape[0])


def _exponential(shape: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.exp(-n / n[-1] * np.exp(shape[0]))


def _fitted(form: Any, n: np.ndarray, loss: np.ndarray, error: np.ndarray) -> Any:
    """least_squares with soft_l1 of (F* + a·form − loss)/error, begun where linear fits of F* and a over a grid of shapes are best."""
    rates = np.log(np.geomspace(0.1, 3, 12)) if form is _power else np.log(np.geomspace(1, 300, 12))
    shifts = np.log(n[-1]) * np.linspace(-0.5, 0.9, 5) if form is _power else [None]
    begin, least = None, math.inf
    for rate in rates:
        for shift in shifts:
            shape = np.array([rate] if shift is None else [rate, shift])
            design = np.stack([np.ones_like(n), form(shape, n)], 1) / error[:, None]
            linear = np.linalg.lstsq(design, loss / error, rcond=None)[0]
            cost = np.abs(design @ linear - loss / error).sum()
            if cost < least and linear[1] >= 0:
                begin, least = np.concatenate([linear, shape]), cost
    if begin is None:  # a loss that rises
        begin = np.concatenate([[loss.min(), 0.0], [rates[0]], [] if form is _exponential else [shifts[0]]])
    low, high = [-np.inf, 0.0, rates[0] - 1e-9], [np.inf, np.inf, rates[-1] + 1e-9]
    if form is _power:
        low, high = [*low, -np.log(n[-1])], [*high, np.log(n[-1])]
    residuals = lambda at: (at[0] + at[1] * form(at[2:], n) - loss) / error  # noqa: E731
    return least_squares(residuals, begin, loss="soft_l1", bounds=(low, high), x_scale="jac", max_nfev=100)
