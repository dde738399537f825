"""The history's own averages, and how sure they are."""

from __future__ import annotations

import math
from typing import Any

from adabatch.diagnostics.record import INDEX, noise_scale, snr
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import JointAverages

LEVEL = 0.9
AVERAGED = ("loss", "variance_trace", "grad_sq_norm", "true_grad_sq_norm")
_INPUTS = tuple(INDEX[name] for name in ("batch_size", "n_measured", *AVERAGED, "variance_trace_step_error"))


class Smoothed:
    """Averages of the loss and the moments, weighted by samples; T̂ by those of its step that were measured.

    Args:
        smoothing: μ, 0 <= μ < 1.

    Raises:
        ValueError: smoothing outside [0, 1).

    Example:
        >>> smoothed = Smoothed()
        >>> fields = smoothed.update(16, 16, 2.0, 8.0, 0.75, 0.5, 1.5)
        >>> fields["noise_scale_ema"], fields["variance_trace_std_error"], fields["noise_scale_low"], fields["noise_scale_high"]
        (16.0, 1.5, 0.0, inf)
    """

    def __init__(self, smoothing: float = 0.95):
        self.averages = {name: MovingAverage(smoothing) for name in AVERAGED}
        self._joint = JointAverages(self.averages["variance_trace"], self.averages["true_grad_sq_norm"])

    @property
    def smoothing(self) -> float:
        """μ."""
        return self.averages["loss"].smoothing

    def update(self, size: int, n_measured: int, loss: float, trace: float, square: float, signal: float, trace_error: float) -> dict[str, float]:
        """Take one step, NaN for what was not measured; give the record's averages, their errors, and the ratios.

        Args:
            size: m. n_measured: s; 0 counts as m.
            loss, trace, square, signal: of the step: F, T̂, ‖g‖², Ĝ².
            trace_error: standard error of this step's T̂, NaN where it is not known.
        """
        measured = n_measured or size
        trace_ema, signal_ema = self._joint.update((trace, measured, trace_error, measured - 1), (signal, size))
        means, before = self.averages, self.averages["variance_trace"].count == 0
        low, high = (math.nan, math.nan) if before else self._joint.ratio_interval(LEVEL)
        return {
            "loss_ema": means["loss"].update(loss, size),
            "loss_std_error": means["loss"].std_error(),
            "variance_trace_ema": trace_ema,
            "variance_trace_std_error": means["variance_trace"].std_error(),
            "grad_sq_norm_ema": means["grad_sq_norm"].update(square, size),
            "true_grad_sq_norm_ema": signal_ema,
            "true_grad_sq_norm_std_error": means["true_grad_sq_norm"].std_error(),
            "noise_scale": noise_scale(trace, signal),
            "noise_scale_ema": noise_scale(trace_ema, signal_ema),
            "noise_scale_low": low,
            "noise_scale_high": high,
            "snr": snr(size, trace, signal),
            "snr_ema": snr(size, trace_ema, signal_ema),
        }

    def take_row(self, row: tuple) -> None:
        """Go on by one record of a file."""
        self.update(*(row[place] for place in _INPUTS))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"averages": {name: average.state_dict() for name, average in self.averages.items()}, "joint": self._joint.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: averages that do not fit.
        """
        missing = self.averages.keys() - state["averages"].keys()
        if missing:
            raise ValueError(f"The diagnostics' state lacks the averages {sorted(missing)}; pass what Diagnostics.state_dict() returned.")
        fresh = Smoothed()
        for name, average in fresh.averages.items():
            average.load_state_dict(state["averages"][name])
        fresh._joint.load_state_dict(state["joint"])
        self.averages, self._joint = fresh.averages, fresh._joint
