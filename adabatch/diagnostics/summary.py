"""The history as a table of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from adabatch._table import aligned
from adabatch.diagnostics.record import has_error, number, shown

if TYPE_CHECKING:
    from adabatch.diagnostics.history import Diagnostics

_NOW = {
    "loss": "loss_ema", "variance trace": "variance_trace_ema",
    "true gradient norm²": "true_grad_sq_norm_ema", "tr(PΣ)": "preconditioned_trace_ema",
    "f_star": "f_star", "noise scale": "noise_scale_ema", "proposed size": "proposed_batch_size",
}
_BY_STEP = {
    "batch size": "batch_size", "proposed size": "proposed_batch_size", "lr, effective": "lr",
}
_BY_SAMPLES = {
    "loss": "loss", "loss, smoothed": "loss_ema", "variance trace": "variance_trace",
    "gradient norm²": "grad_sq_norm", "true gradient norm²": "true_grad_sq_norm",
}


def summary(history: Diagnostics) -> str:
    """Counts of the run, the latest averages with their errors, and a table over the records.

    The table has the first, last, smallest, mean and largest value of the main columns over the
    records in memory; values that are not finite are left out, and so are rows of nothing else.
    The lr is `Record.lr`, with momentum's factor where the controller needs it. Means of sizes and
    lr are over steps, those of the loss and the moments over samples; the mean noise scale is
    Σ m T̂ / Σ m Ĝ² and the mean speed samples over seconds: ratios of sums, not averages of ratios.

    Example:
        >>> from adabatch.diagnostics import Diagnostics
        >>> history = Diagnostics()
        >>> for step, trace in enumerate((9.0, 8.0, 6.0, 7.0), start=1):
        ...     history.append(step=step, samples_seen=16 * step, batch_size=16, measured=True,
        ...                    variance_trace=trace, grad_sq_norm=trace)
        >>> print(*history.summary().splitlines()[:3], sep="\\n")
        4 steps, 64 samples
        measured 4, dropped 0
        now: variance trace 7.449 ± 0.632
    """
    if not len(history):
        return "\n".join([*heading(history), "no record in memory"])
    return "\n".join([*heading(history), "", *aligned(table(history))])


def heading(history: Diagnostics) -> list[str]:
    """The lines above the table: steps, measurements, and the latest averages that have errors."""
    line = f"{history.n_steps:,} step{'s' * (history.n_steps != 1)}"
    if len(history):
        line += f", {history.latest.samples_seen:,} samples"
        seconds = float(np.nansum(history.column("seconds")))
        line += f", {seconds:,.1f} s" if seconds > 0 else ""
    if len(history) != history.n_steps:
        line += f" (the table is of the {len(history):,} in memory)"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in history.dropped.most_common())
    counts = f"measured {history.n_measured:,}, dropped {history.n_dropped:,}"
    lines = [line, f"{counts}: {reasons}" if reasons else counts]
    if len(history):
        latest = history.latest
        now = [f"{label} {shown(latest, name)}" for label, name in _NOW.items()
               if has_error(latest, name)]
        lines += [f"now: {', '.join(now)}"] if now else []
    return lines


def table(history: Diagnostics) -> list[tuple[str, ...]]:
    """The cells of the table, with a heading row."""
    sizes = history.column("batch_size").astype(float)
    by_step = {label: history.column(name) for label, name in _BY_STEP.items()}
    rows = [_row(label, values, np.ones_like(sizes)) for label, values in by_step.items()]
    rows += [_row(label, history.column(name), sizes) for label, name in _BY_SAMPLES.items()]
    trace = _mean(history.column("variance_trace"), sizes)
    signal = _mean(history.column("true_grad_sq_norm"), sizes)
    ratio = max(trace, 0.0) / signal if signal > 0 else math.nan
    rows.append(_row("noise scale, smoothed", history.column("noise_scale_ema"), sizes, ratio))
    speed, seconds = history.column("samples_per_second"), history.column("seconds")
    timed = np.isfinite(speed)
    mean = sizes[timed].sum() / seconds[timed].sum() if timed.any() else math.nan
    rows.append(_row("samples per second", speed, sizes, mean))
    return [("", "first", "last", "min", "mean", "max"), *filter(None, rows)]


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    finite = np.isfinite(values)
    return float(np.average(values[finite], weights=weights[finite])) if finite.any() else math.nan


def _row(
    label: str, values: np.ndarray, weights: np.ndarray, mean: float | None = None
) -> tuple[str, ...]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ()
    mean = _mean(values, weights) if mean is None else mean
    cells = (finite[0], finite[-1], finite.min(), mean, finite.max())
    return (label, *(number(float(value)) for value in cells))
