"""The history and the layer view as figures. Needs matplotlib, imported when something is drawn.

No backend is chosen and pyplot stays untouched: drawing needs no display and does not disturb a
user's own figures. Values that an axis cannot show (NaN, inf, negative on a logarithmic axis) leave
gaps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adabatch._types import Argument, Kwargs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from adabatch.diagnostics.history import Diagnostics
    from adabatch.diagnostics.layers import Layers

_COLOURS = {
    "size": "#1f5a99", "proposal": "#e08a2e", "lr": "#7a4fa3", "loss": "#b5432e",
    "trace": "#1d7a5f", "centre": "#0b3f31", "scale": "#a8741a", "dropped": "#c01f3a",
    "quiet": "#8a93a0",
}
_MISSING = "Drawing needs matplotlib, which is not installed: pip install matplotlib."
# Columns at most: a signal takes more steps than a share to rise out of the noise.
SPANS, SNR_SPANS = 120, 30
MAX_LABELS = 60


def plot(history: Diagnostics, path: str | os.PathLike[str]) -> None:
    """Draw the history into an image file; the ending of its name is the format (.png, .pdf, .svg).

    Example:
        >>> import tempfile
        >>> from adabatch.diagnostics import Diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot(Diagnostics(), os.path.join(folder, "run.png"))

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw(history).savefig(os.fspath(path), dpi=130)


def draw(history: Diagnostics) -> Figure:
    """The figure that `plot` saves: sizes, lr, loss, variance trace, noise scale over samples.

    Light lines are single steps, dark ones the averages. Bands: the averages of loss and variance
    trace ± their standard error, and the intervals of proposal and noise scale, up to the top of
    the panel where they have no upper end. The dashed line is f_star ± its standard error. Ticks at
    the foot of the variance panel are dropped measurements.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, NullLocator
    except ImportError as error:
        raise ImportError(_MISSING) from error
    figure = Figure(figsize=(8.0, 9.2), layout="constrained")
    heights = {"height_ratios": [1.25, 0.7, 1.25, 1.25, 1.25]}
    panels = figure.subplots(5, 1, sharex=True, gridspec_kw=heights)
    samples = history.column("samples_seen")
    fills = (_batch_size, _lr, _loss, _variance_trace, _noise_scale)
    for panel, fill in zip(panels, fills, strict=True):
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
    title = f"{history.n_steps:,} steps · {history.n_measured:,} measured{dropped}"
    figure.suptitle(title, fontsize=10, x=0.99, ha="right")
    figure.align_ylabels(panels)
    return figure


def draw_layers(layers: Layers) -> Figure:
    """Two heat maps, layers downwards, samples seen to the right: shares of the trace, and SNR.

    Shares are on a linear scale from 0, ratios on a logarithmic one over the middle 96 % of them;
    cells without a signal above 0 are grey.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from adabatch.diagnostics.layers import Layers
        >>> one = np.ones(1)
        >>> trace = signal = np.ones((1, 1))
        >>> layers = Layers(("a",), np.array([0, 16]), 16 * one, trace, signal, 16 * one, 16 * one)
        >>> draw_layers(layers).axes[0].get_title()
        'share of the variance trace'
    """
    try:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    layers, coarse = layers.merged(SPANS), layers.merged(SNR_SPANS)
    figure = Figure(figsize=(11.0, min(16.0, 2.2 + 0.2 * len(layers.names))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    share, ratio = layers.share, _positive(coarse.snr)
    finite = ratio[np.isfinite(ratio)]
    low, high = np.quantile(finite, [0.02, 0.98]) if finite.size else (0.1, 10.0)
    most = float(np.nanmax(share)) if np.isfinite(share).any() else 1.0
    _map(left, layers, share, "viridis", Normalize(0, most), "share of the variance trace")
    title, norm = "signal-to-noise ratio of the batch gradient", LogNorm(low / 1.01, high * 1.01)
    _map(right, coarse, ratio, "magma", norm, title)
    labelled = np.arange(0, len(layers.names), -(-len(layers.names) // MAX_LABELS))
    left.set_yticks(labelled + 0.5, [layers.names[k] for k in labelled], fontsize=7.5)
    left.invert_yaxis()
    return figure


def _map(
    panel: Axes, layers: Layers, values: np.ndarray, colours: str, norm: Normalize, title: str
) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_facecolor("0.8")
    cells, rows = np.ma.masked_invalid(values.T), np.arange(len(layers.names) + 1)
    mesh = panel.pcolormesh(layers.edges, rows, cells, cmap=colours, norm=norm)
    panel.figure.colorbar(mesh, ax=panel, pad=0.01)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("samples seen", fontsize=9)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.tick_params(axis="x", labelsize=8)


def _batch_size(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    sizes = history.column("batch_size").astype(float)
    proposal = _positive(history.column("proposed_batch_size"))
    panel.set_ylabel("batch size\n(samples)")
    if sizes.size:
        panel.step(samples, sizes, where="pre", color=_COLOURS["size"], linewidth=1.6, label="used")
        # Between measuring steps there is no proposal: points between gaps would draw nothing.
        made = np.isfinite(proposal)
        _line(panel, samples[made], proposal[made], "proposal", "proposal for the next", 0.6)
        low, high = sizes.min(), sizes.max()
        # A proposal far outside the bounds must not flatten the sizes that were used.
        _log_axis(panel, [low, high, *np.clip(proposal[made], low / 4, high * 4)], base=2)
        low, high = (history.column(name)[made] for name in ("proposed_low", "proposed_high"))
        _interval(panel, samples[made], low, high, _COLOURS["proposal"])
        _legend(panel)


def _lr(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    lr = history.column("lr")
    panel.set_ylabel("learning rate")
    _line(panel, samples, lr, "lr", "", 1.4)
    _log_if_wide(panel, lr)


def _loss(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    loss, average, error = (history.column(name) for name in ("loss", "loss_ema", "loss_std_error"))
    floor, floor_error = history.column("f_star"), history.column("f_star_std_error")
    panel.set_ylabel("loss\n(mean per sample)")
    _line(panel, samples, loss, "loss", "step", 0.6, alpha=0.35)
    _line(panel, samples, average, "loss", "smoothed", 1.5)
    _band(panel, samples, average, error, "loss", 0.3)
    # A floor of 0 that was passed by the user is not an estimate.
    if np.isfinite(floor).any() and (np.nan_to_num(floor) != 0).any():
        _line(panel, samples, floor, "quiet", "f_star", 1.0, linestyle="--")
        _band(panel, samples, floor, floor_error, "quiet", 0.3)
    _log_if_wide(panel, loss)
    _legend(panel)


def _variance_trace(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    names = ("variance_trace", "variance_trace_ema", "variance_trace_std_error", "measured")
    trace, average, error, measured = (history.column(name) for name in names)
    panel.set_ylabel("variance trace\n(gradient², per sample)")
    if np.isfinite(_positive(trace)).any():
        trace, average = _positive(trace), _positive(average)
        _log_axis(panel, [*_bulk(trace, 0.002), *_bulk(average, 0.002)])
    _line(panel, samples[measured], trace[measured], "trace", "step", 0.6, alpha=0.35)
    _band(panel, samples, average, error, "trace", 0.55, zorder=2.5, label="± standard error")
    _line(panel, samples, average, "centre", "smoothed", 0.9)
    dropped = history.column("dropped") != ""
    if dropped.any():
        at, foot = samples[dropped], panel.get_xaxis_transform()
        panel.plot(at, np.full(len(at), 0.04), "|", color=_COLOURS["dropped"], markersize=7,
                   transform=foot, label="dropped")
    _legend(panel)


def _noise_scale(panel: Axes, samples: np.ndarray, history: Diagnostics) -> None:
    scale = _positive(history.column("noise_scale"))
    average = _positive(history.column("noise_scale_ema"))
    measured = history.column("measured")
    panel.set_ylabel("noise scale T/G²\n(samples)")
    if np.isfinite(scale).any() or np.isfinite(average).any():
        # A single ratio may have a divisor near zero: the axis holds the middle of them.
        low, high = history.column("noise_scale_low"), history.column("noise_scale_high")
        ends = [*_bulk(_positive(low), 0.1), *_bulk(_positive(high), 0.25)]
        _log_axis(panel, [*_bulk(scale, 0.1), *_bulk(average, 0.0), *ends])
        _interval(panel, samples, low, high, _COLOURS["scale"])
    _line(panel, samples[measured], scale[measured], "scale", "step", 0.6, alpha=0.3)
    _line(panel, samples, average, "scale", "ratio of smoothed", 1.5)
    _legend(panel)


def _line(
    panel: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str, width: float,
    **style: Argument,
) -> None:
    line = {"color": _COLOURS[colour], "linewidth": width, "label": label or None, **style}
    panel.plot(x, _finite(y), **line)


def _band(
    panel: Axes, x: np.ndarray, y: np.ndarray, error: np.ndarray, colour: str, alpha: float,
    **style: Argument,
) -> None:
    low, high = _finite(y - error), _finite(y + error)
    panel.fill_between(x, low, high, color=_COLOURS[colour], alpha=alpha, linewidth=0, **style)


def _interval(
    panel: Axes, samples: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str
) -> None:
    """A band from low to high, cut off at the ends of the panel; none where nothing is known."""
    bottom, top = panel.get_ylim()
    known = ~np.isnan(low) & ((low > 0) | np.isfinite(high))
    ends = (np.nan_to_num(end, nan=bottom, posinf=top) for end in (low, high))
    low, high = (np.where(known, np.clip(end, bottom, top), np.nan) for end in ends)
    label = "interval" if known.any() else None
    panel.fill_between(samples, low, high, color=colour, alpha=0.22, linewidth=0, label=label)
    panel.set_ylim(bottom, top)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _bulk(values: np.ndarray, tail: float) -> list[float]:
    """The quantiles `tail` and 1 − `tail` of the finite values; empty where there are none."""
    values = values[np.isfinite(values)]
    return [float(value) for value in np.quantile(values, [tail, 1 - tail])] if values.size else []


def _log_axis(panel: Axes, values: Sequence[float], base: int = 10) -> None:
    """A logarithmic axis over positive values, with a margin and plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(values) / 1.4, max(values) * 1.4
    # The limits come first: an axis that scales itself overflows on a proposal of 1e300.
    panel.set_ylim(low, high)
    panel.set_yscale("log", base=base)
    subs = (1.0, 2.0, 5.0) if base == 10 and high < 100 * low else (1.0,)
    panel.yaxis.set_major_locator(LogLocator(base=base, subs=subs, numticks=8))
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
    lines = panel.get_legend_handles_labels()[0]
    if lines:
        panel.legend(loc="best", fontsize=7.5, frameon=False, ncols=len(lines), handlelength=1.6)


def _dress(panel: Axes) -> None:
    from matplotlib.ticker import NullLocator

    panel.grid(True, which="major", color="#d9dde3", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.yaxis.label.set_fontsize(9)
    drawn = (np.asarray(line.get_ydata(), dtype=float) for line in panel.lines)
    if not any(np.isfinite(values).any() for values in drawn):
        centre: Kwargs = {"transform": panel.transAxes, "ha": "center", "va": "center"}
        panel.text(0.5, 0.5, "nothing recorded", color=_COLOURS["quiet"], fontsize=9, **centre)
        panel.yaxis.set_major_locator(NullLocator())
        panel.grid(False)
        legend = panel.get_legend()
        if legend is not None:
            legend.remove()
