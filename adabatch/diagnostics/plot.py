"""The history as a figure. Needs matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from adabatch.diagnostics.history import Diagnostics

_COLOURS = {
    "size": "#1f5a99",
    "proposal": "#e08a2e",
    "lr": "#7a4fa3",
    "loss": "#b5432e",
    "trace": "#1d7a5f",
    "centre": "#0b3f31",
    "scale": "#a8741a",
    "dropped": "#c01f3a",
    "quiet": "#8a93a0",
}


def plot(history: Diagnostics, path: str | os.PathLike[str]) -> None:
    """Draws the history into an image file; the ending of its name says the format (.png, .pdf, .svg).

    Example:
        >>> import os, tempfile
        >>> from adabatch.diagnostics import Diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot(Diagnostics(), os.path.join(folder, "run.png"))

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw(history).savefig(os.fspath(path), dpi=130)


def draw(history: Diagnostics) -> Figure:
    """The figure that `plot` saves: batch size, learning rate, loss, variance trace and noise scale over the samples seen.

    Light lines are single steps, dark ones the averages weighted by samples. Bands: the averages of loss and variance trace ± their standard error, and
    the intervals (90 % unless `confidence` says otherwise) of proposal and noise scale, up to the top of the panel where they have no upper end; the dashed line
    is the floor of the loss, f_star, ± its standard error. Ticks at the foot of the variance panel are dropped measurements. Values that an axis cannot show
    (NaN, inf, negative on a logarithmic axis) leave gaps.
    No backend is chosen and pyplot stays untouched, so that it works without a display and beside a user's own figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, NullLocator
    except ImportError as error:
        raise ImportError("Drawing the history needs matplotlib, which is not installed: pip install 'adabatch[examples]'.") from error
    figure = Figure(figsize=(8.0, 9.2), layout="constrained")
    panels = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": [1.25, 0.7, 1.25, 1.25, 1.25]})
    samples = history.column("samples_seen")
    for panel, fill in zip(panels, (_batch_size, _lr, _loss, _variance_trace, _noise_scale), strict=True):
        fill(panel, samples, history)
        _dress(panel)
    panels[-1].set_xlabel("samples seen")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if samples.size:
        first = int(samples[0] - history[0].batch_size)
        panels[-1].set_xlim(first, max(int(samples[-1]), first + 1))
    else:
        panels[-1].xaxis.set_major_locator(NullLocator())
    dropped = f" · {history.n_dropped:,} dropped" if history.n_dropped else ""
    figure.suptitle(f"{history.n_steps:,} steps · {history.n_measured:,} measured{dropped}", fontsize=10, x=0.99, ha="right")
    figure.align_ylabels(panels)
    return figure


def _batch_size(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    sizes = history.column("batch_size").astype(float)
    proposal = _positive(history.column("proposed_batch_size"))
    panel.set_ylabel("batch size\n(samples)")
    if sizes.size:
        panel.step(samples, sizes, where="pre", color=_COLOURS["size"], linewidth=1.6, label="used")
        # Between measuring steps there is no proposal: single points with gaps around them would draw nothing.
        made = np.isfinite(proposal)
        panel.plot(samples[made], proposal[made], color=_COLOURS["proposal"], linewidth=0.6, label="proposal for the next")
        low, high = sizes.min(), sizes.max()
        # A proposal far outside the bounds must not flatten the sizes that were used.
        shown = np.clip(proposal[made], low / 4, high * 4)
        _log_axis(panel, [low, high, *shown], base=2)
        _interval(panel, samples[made], *(history.column(name)[made] for name in ("proposed_low", "proposed_high")), _COLOURS["proposal"])
        _legend(panel)


def _lr(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    lr = history.column("lr")
    panel.set_ylabel("learning rate")
    panel.plot(samples, _finite(lr), color=_COLOURS["lr"], linewidth=1.4)
    _log_if_wide(panel, lr)


def _loss(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    loss, average, error = (history.column(name) for name in ("loss", "loss_ema", "loss_std_error"))
    floor, floor_error = history.column("f_star"), history.column("f_star_std_error")
    panel.set_ylabel("loss\n(mean per sample)")
    panel.plot(samples, _finite(loss), color=_COLOURS["loss"], linewidth=0.6, alpha=0.35, label="step")
    panel.plot(samples, _finite(average), color=_COLOURS["loss"], linewidth=1.5, label="smoothed")
    panel.fill_between(samples, _finite(average - error), _finite(average + error), color=_COLOURS["loss"], alpha=0.3, linewidth=0)
    # A floor of 0 that was given is no finding.
    if np.isfinite(floor).any() and (np.nan_to_num(floor) != 0).any():
        panel.plot(samples, _finite(floor), color=_COLOURS["quiet"], linewidth=1.0, linestyle="--", label="f_star")
        panel.fill_between(samples, _finite(floor - floor_error), _finite(floor + floor_error), color=_COLOURS["quiet"], alpha=0.3, linewidth=0)
    _log_if_wide(panel, loss)
    _legend(panel)


def _variance_trace(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    trace, average, error = (history.column(name) for name in ("variance_trace", "variance_trace_ema", "variance_trace_std_error"))
    panel.set_ylabel("variance trace\n(gradient², per sample)")
    colour = _COLOURS["trace"]
    measured = history.column("measured")
    if np.isfinite(_positive(trace)).any():
        trace, average = _positive(trace), _positive(average)
        _log_axis(panel, [*_bulk(trace, 0.002), *_bulk(average, 0.002)])
    panel.plot(samples[measured], _finite(trace)[measured], color=colour, linewidth=0.6, alpha=0.35, label="step")
    panel.fill_between(samples, _finite(average - error), _finite(average + error), color=colour, alpha=0.55, linewidth=0, zorder=2.5, label="± standard error")
    panel.plot(samples, _finite(average), color=_COLOURS["centre"], linewidth=0.9, label="smoothed")
    dropped = history.column("dropped") != ""
    if dropped.any():
        foot = panel.get_xaxis_transform()
        panel.plot(samples[dropped], np.full(dropped.sum(), 0.04), "|", color=_COLOURS["dropped"], markersize=7, transform=foot, label="dropped")
    _legend(panel)


def _noise_scale(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    scale, average, measured = _positive(history.column("noise_scale")), _positive(history.column("noise_scale_ema")), history.column("measured")
    panel.set_ylabel("noise scale T/G²\n(samples)")
    if np.isfinite(scale).any() or np.isfinite(average).any():
        # A single ratio may have a divisor near zero: the axis holds the middle of them and all of the smoothed ones.
        low, high = history.column("noise_scale_low"), history.column("noise_scale_high")
        _log_axis(panel, [*_bulk(scale, 0.1), *_bulk(average, 0.0), *_bulk(_positive(low), 0.1), *_bulk(_positive(high), 0.25)])
        _interval(panel, samples, low, high, _COLOURS["scale"])
    panel.plot(samples[measured], scale[measured], color=_COLOURS["scale"], linewidth=0.6, alpha=0.3, label="step")
    panel.plot(samples, average, color=_COLOURS["scale"], linewidth=1.5, label="ratio of smoothed")
    _legend(panel)


def _interval(panel: Axes, samples: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """A band from low to high, cut off at the panel's ends, which are set; none where nothing is known."""
    bottom, top = panel.get_ylim()
    known = ~np.isnan(low) & ((low > 0) | np.isfinite(high))
    low, high = (np.where(known, np.clip(np.nan_to_num(end, nan=bottom, posinf=top), bottom, top), np.nan) for end in (low, high))
    panel.fill_between(samples, low, high, color=colour, alpha=0.22, linewidth=0, label="interval" if known.any() else None)
    panel.set_ylim(bottom, top)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _bulk(values: np.ndarray, tail: float) -> list[float]:
    """The quantiles `tail` and 1 − `tail` of the finite values; empty where there are none."""
    values = values[np.isfinite(values)]
    return [float(value) for value in np.quantile(values, [tail, 1 - tail])] if values.size else []


def _log_axis(panel: Axes, values: list[float], base: int = 10) -> None:
    """A logarithmic axis over the values, which are above zero, with a margin and plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(values) / 1.4, max(values) * 1.4
    # The limits come first: an axis that scales itself overflows on a proposal of 1e300.
    panel.set_ylim(low, high)
    panel.set_yscale("log", base=base)
    narrow = base == 10 and high < 100 * low
    panel.yaxis.set_major_locator(LogLocator(base=base, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    if base == 2:
        panel.yaxis.set_minor_locator(NullLocator())


def _log_if_wide(panel: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 20 * values.min():
        _log_axis(panel, [float(values.min()), float(values.max())])
    elif values.size and values.min() >= 0 and values.max() > 0:
        panel.set_ylim(0, 1.08 * values.max())


def _legend(panel: Axes) -> None:
    lines: list[Any] = panel.get_legend_handles_labels()[0]
    if lines:
        panel.legend(loc="best", fontsize=7.5, frameon=False, ncols=len(lines), handlelength=1.6)


def _dress(panel: Axes) -> None:
    from matplotlib.ticker import NullLocator

    panel.grid(True, which="major", color="#d9dde3", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.yaxis.label.set_size(9)
    if not any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in panel.lines):
        panel.text(0.5, 0.5, "nothing recorded", transform=panel.transAxes, ha="center", va="center", color=_COLOURS["quiet"], fontsize=9)
        panel.yaxis.set_major_locator(NullLocator())
        panel.grid(False)
        if panel.get_legend() is not None:
            panel.get_legend().remove()
