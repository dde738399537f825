"""The history as a table of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from adabatch.diagnostics.history import Diagnostics

_NOW = {
    "loss": ("loss_ema", "loss_std_error"),
    "variance trace": ("variance_trace_ema", "variance_trace_std_error"),
    "true gradient norm²": ("true_grad_sq_norm_ema", "true_grad_sq_norm_std_error"),
    "tr(PΣ)": ("preconditioned_trace_ema", "preconditioned_trace_std_error"),
    "f_star": ("f_star", "f_star_std_error"),
}
_NOW_WITHIN = {
    "noise scale": ("noise_scale_ema", "noise_scale_low", "noise_scale_high"),
    "proposed size": ("proposed_batch_size", "proposed_low", "proposed_high"),
}
_HEAD = ("", "first", "last", "min", "mean", "max")
_BY_STEP = {"batch size": "batch_size", "proposed size": "proposed_batch_size", "lr": "lr"}
_BY_SAMPLES = {
    "loss": "loss",
    "loss, smoothed": "loss_ema",
    "variance trace": "variance_trace",
    "gradient norm²": "grad_sq_norm",
    "true gradient norm²": "true_grad_sq_norm",
}


def summary(history: Diagnostics) -> str:
    """First, last, smallest, mean and largest value of the main columns over the records in memory, with the counts of the whole run.

    The third line says how sure the latest averages are: ± their standard error, and for ratios the interval in which they lie, 90 % unless the scheduler's
    `confidence` says otherwise for the proposed size.

    Values that are not finite are left out. Means of sizes and lr are over steps; of the loss and the gradient's statistics over samples; the mean
    noise scale is Σ m T̂ / Σ m Ĝ² and the mean speed is samples over seconds: ratios of sums, since an average of ratios misleads.

    Example:
        >>> from adabatch.diagnostics import Diagnostics
        >>> history = Diagnostics()
        >>> history.append(step=1, samples_seen=16, batch_size=16, next_batch_size=32, lr=0.1, loss=2.5)
        >>> print(history.summary().splitlines()[0])
        1 step, 16 samples
        >>> for step, trace, square in ((2, 8.0, 2.0), (3, 6.0, 2.2), (4, 7.0, 1.9)):
        ...     history.append(step=step, samples_seen=16 * step, batch_size=16, next_batch_size=32, lr=0.1, loss=2.5, variance_trace=trace,
        ...                    grad_sq_norm=square + trace / 16, true_grad_sq_norm=square, measured=True)
        >>> print(history.summary().splitlines()[2])
        now: variance trace 6.983 ± 0.563, true gradient norm² 2.032 ± 0.0899, noise scale 3.437 (2.39 to 4.74)
    """
    if not len(history):
        return "\n".join([_steps_line(history), _measured_line(history), "no record in memory"])
    sizes = history.column("batch_size").astype(float)
    rows = [_row(label, history.column(name), np.ones_like(sizes)) for label, name in _BY_STEP.items()]
    rows += [_row(label, history.column(name), sizes) for label, name in _BY_SAMPLES.items()]
    trace, signal = _weighted(history.column("variance_trace"), sizes), _weighted(history.column("true_grad_sq_norm"), sizes)
    scale = max(trace, 0.0) / signal if signal > 0 else math.nan
    rows.append(_row("noise scale, smoothed", history.column("noise_scale_ema"), sizes, mean=scale))
    speed, seconds = history.column("samples_per_second"), history.column("seconds")
    timed = np.isfinite(speed)
    rows.append(_row("samples per second", speed, sizes, mean=sizes[timed].sum() / seconds[timed].sum() if timed.any() else math.nan))
    return "\n".join([_steps_line(history), _measured_line(history), *_now_line(history), "", *_align([_HEAD, *rows])])


def _steps_line(history: Diagnostics) -> str:
    line = f"{history.n_steps:,} step{'s' * (history.n_steps != 1)}"
    if len(history):
        line += f", {history.latest.samples_seen:,} samples"
        seconds = float(np.nansum(history.column("seconds")))
        line += f", {seconds:,.1f} s" if seconds > 0 else ""
    return line if len(history) == history.n_steps else f"{line} (the table is of the {len(history):,} in memory)"


def _measured_line(history: Diagnostics) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in history.dropped.most_common())
    return f"measured {history.n_measured:,}, dropped {history.n_dropped:,}" + (f": {reasons}" if reasons else "")


def _now_line(history: Diagnostics) -> list[str]:
    """How sure the latest numbers are; nothing where none has an error."""
    latest, parts = history.latest, []
    for label, (name, error) in _NOW.items():
        if 0 < getattr(latest, error) < math.inf:
            parts.append(f"{label} {_number(getattr(latest, name))} ± {getattr(latest, error):.3g}")
    for label, (name, low, high) in _NOW_WITHIN.items():
        if not math.isnan(getattr(latest, low)):
            ends = f"above {getattr(latest, low):.3g}" if math.isinf(getattr(latest, high)) else f"{getattr(latest, low):.3g} to {getattr(latest, high):.3g}"
            parts.append(f"{label} {_number(getattr(latest, name))} ({ends})")
    return [f"now: {', '.join(parts)}"] if parts else []


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    finite = np.isfinite(values)
    return float(np.average(values[finite], weights=weights[finite])) if finite.any() else math.nan


def _row(label: str, values: np.ndarray, weights: np.ndarray, mean: float | None = None) -> tuple[str, ...]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (label, *["-"] * 5)
    mean = _weighted(values, weights) if mean is None else mean
    return (label, *(_number(float(value)) for value in (finite[0], finite[-1], finite.min(), mean, finite.max())))


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e9 else f"{value:.4g}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
