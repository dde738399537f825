"""The layer view as a figure. Needs matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from adabatch.diagnostics.layers import Layers

SPANS, SNR_SPANS = 120, 30  # columns at most: a signal takes more steps than a share to rise out of the noise of single ones
MOST_LABELS = 60


def draw_layers(layers: Layers) -> Figure:
    """Two maps, layers downwards in the model's order, samples seen to the right: each layer's share of the variance trace, and its signal-to-noise ratio.

    Shares are coloured on a linear scale from 0, ratios on a logarithmic one over the middle 96 % of them; where there is no signal above 0 the cell is left
    grey. No backend is chosen and pyplot stays untouched.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from adabatch.diagnostics.layers import Layers
        >>> one = np.ones(1)
        >>> draw_layers(Layers(("a",), np.array([0, 16]), 16 * one, np.ones((1, 1)), np.ones((1, 1)), 16 * one, 16 * one)).axes[0].get_title()
        'share of the variance trace'
    """
    try:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing the layers needs matplotlib, which is not installed: pip install 'adabatch[examples]'.") from error
    layers, coarse = layers.merged(SPANS), layers.merged(SNR_SPANS)
    figure = Figure(figsize=(11.0, min(16.0, 2.2 + 0.2 * len(layers.names))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    share, ratio = layers.share, coarse.snr
    ratio = np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.nan)
    finite = ratio[np.isfinite(ratio)]
    low, high = np.quantile(finite, [0.02, 0.98]) if finite.size else (0.1, 10.0)
    most = float(np.nanmax(share)) if np.isfinite(share).any() else 1.0
    _map(left, layers, share, "viridis", Normalize(0, most), "share of the variance trace")
    _map(right, coarse, ratio, "magma", LogNorm(low / 1.01, high * 1.01), "signal-to-noise ratio of the batch gradient")
    shown = np.arange(0, len(layers.names), -(-len(layers.names) // MOST_LABELS))
    left.set_yticks(shown + 0.5, [layers.names[k] for k in shown], fontsize=7.5)
    left.invert_yaxis()
    return figure


def _map(panel: Axes, layers: Layers, values: np.ndarray, colours: str, norm: Any, title: str) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_facecolor("0.8")
    mesh = panel.pcolormesh(layers.edges, np.arange(len(layers.names) + 1), np.ma.masked_invalid(values.T), cmap=colours, norm=norm)
    panel.figure.colorbar(mesh, ax=panel, pad=0.01)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("samples seen", fontsize=9)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.tick_params(axis="x", labelsize=8)
