"""The layer view: which layer makes the noise of the gradient, and which carries its signal, over the samples seen.

Legend: K layers (or parameters, or parameter groups), B spans of the run, m samples in a step, s of them measured; T_k the trace of the covariance of layer
k's per-sample gradients, G²_k the squared norm of its true gradient. Both add up over layers to the model's T and G².
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adabatch.diagnostics.record import noise_scale, snr
from adabatch.estimators.moments import GradientMoments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_RECORDED = (
    "the history holds no layers: nothing was measured yet, or the model was measured as a whole. Pass per_parameter=True to adabatch.wrap (or to "
    "GradSampleHooks), or give the optimizer several parameter groups, which are recorded by themselves."
)
COLUMNS = ("samples_seen", "batch_size", "name", "share", "snr", "noise_scale", "variance_trace", "true_grad_sq_norm")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One step's T̂_k and Ĝ²_k, unbiased, of each of K names.

    Attributes:
        names: of the parameters, or "group 0" and so on.
        of: "parameter" or "group".
        traces: T̂_k [K], float64; below 0 at times where measured without inner_products.
        signals: Ĝ²_k [K], float64.
        batch_size: m.
        n_measured: s.
    """

    names: tuple[str, ...]
    of: str
    traces: np.ndarray
    signals: np.ndarray
    batch_size: int
    n_measured: int

    @classmethod
    def of_step(cls, moments: GradientMoments) -> LayerStatistics | None:
        """From a step's moments: its parameters where they were measured apart, else its parameter groups, else None.

        T̂_k = (mean_S ‖g_ik‖² − ‖g_k‖²)/(1 − 1/m_eff), with inner_products mean_S ‖g_ik − g_k‖²/(1 − 1/m_eff); Ĝ²_k = ‖g_k‖² − T̂_k/m_eff.

        Example:
            >>> part = GradientMoments(batch_size=2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
            >>> whole = GradientMoments(batch_size=2, sq_norms=torch.tensor([2.0, 6.0]), grad_sq_norm=2.0, by_group={0: part, 1: part})
            >>> LayerStatistics.of_step(whole).traces
            array([2., 2.])
        """
        sizes = {"batch_size": moments.batch_size, "n_measured": moments.n_measured}
        if not moments.by_parameter or not moments.parameter_grad_sq_norms:
            if not moments.by_group:
                return None
            parts = moments.by_group.values()
            traces, signals = (np.array([getattr(part, name) for part in parts]) for name in ("variance_trace", "true_grad_sq_norm"))
            return cls(tuple(f"group {index}" for index in moments.by_group), "group", traces, signals, **sizes)
        names = tuple(moments.by_parameter)
        m_eff = moments.batch_size if moments.effective_batch_size is None else moments.effective_batch_size
        if moments.totals is not None:  # of many processes, whose samples are not all here
            traces = np.array([moments.totals.parameter_terms[name] for name in names]) / (1 - 1 / m_eff)
            signals = np.array([moments.parameter_grad_sq_norms[name] for name in names]) - traces / m_eff
            return cls(names, "parameter", traces, signals, **sizes)
        # All parameters at once: a step of a large model would else spend milliseconds on hundreds of short sums.
        terms = torch.stack([moments.by_parameter[name] for name in names]).double()
        squares = torch.tensor([[moments.parameter_grad_sq_norms[name]] for name in names], dtype=torch.float64, device=terms.device)
        if moments.parameter_inner_products:
            weights = 1.0 if moments.weights is None else moments.weights
            inner_products = torch.stack([moments.parameter_inner_products[name] for name in names]).double()
            terms = (terms - 2 * weights * inner_products + weights**2 * squares).clamp(min=0)
            terms = terms if moments.corrections is None else moments.corrections * terms
        else:
            terms = terms - squares
        trace = terms.mean(1) / (1 - 1 / m_eff)
        return cls(names, "parameter", trace.cpu().numpy(), (squares[:, 0] - trace / m_eff).cpu().numpy(), **sizes)

    @property
    def is_finite(self) -> bool:
        """Whether all of it are finite numbers."""
        return bool(np.isfinite(self.traces).all() and np.isfinite(self.signals).all())

    def to_json(self) -> dict[str, Any]:
        """{"of", "measured": s, "moments": {name: [T̂_k, Ĝ²_k]}}, to seven digits, as a line of the history's file holds it."""
        pairs = zip(self.names, self.traces, self.signals, strict=True)
        moments = {name: [float(f"{trace:.7g}"), float(f"{signal:.7g}")] for name, trace, signal in pairs}
        return {"of": self.of, "measured": self.n_measured, "moments": moments}

    @classmethod
    def from_json(cls, value: Any, batch_size: int) -> LayerStatistics:
        """From what `to_json` gave.

        Raises:
            ValueError: anything else.
        """
        try:
            values = np.array(list(value["moments"].values()), dtype=float).reshape(-1, 2)
            return cls(tuple(value["moments"]), str(value["of"]), values[:, 0], values[:, 1], batch_size, int(value["measured"]))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError('layers must be {"of", "measured", "moments": {name: [trace, signal]}}, got ' + f"{value!r:.100}") from error


@dataclass(frozen=True)
class LayerRow:
    """One layer over the whole run (ratios of sums, never averages of ratios); sizes in samples.

    Attributes:
        name: of the layer, the parameter, or the group.
        share: of the model's variance trace, from 0 to 1; share_first and share_last: in the first and the last quarter of the spans.
        snr: m·G²/T, signal-to-noise ratio of the batch gradient, at the mean batch size; noise_scale: T/G².
        variance_trace, true_grad_sq_norm: T and G², averages over the samples.
    """

    name: str
    share: float
    share_first: float
    share_last: float
    snr: float
    noise_scale: float
    variance_trace: float
    true_grad_sq_norm: float


@dataclass(frozen=True, eq=False)
class Layers(Sequence[LayerRow]):
    """What `Diagnostics.layers()` gives: a sequence of one `LayerRow` a layer, which prints as a table, and the run behind it in B spans.

    T of a span is Σ s·T̂/Σ s over its measured steps, G² is Σ m·Ĝ²/Σ m. A T that is still below 0 counts as 0 in the shares; so does a G² in the ratios.

    Attributes:
        names: of the layers, [K].
        edges: samples seen at the start of the first span and at the end of each, [B + 1].
        batch_size: mean size of a step, [B].
        variance_trace, true_grad_sq_norm: T_k and G²_k, [B, K], float64.
        measured, samples: Σ s and Σ m of each span, their weights, [B].

    Example:
        >>> ones = np.ones(2)
        >>> layers = Layers(("a", "b"), np.array([0, 16, 32]), 16 * ones, np.array([[3.0, 1.0], [1.0, 1.0]]), np.ones((2, 2)), 16 * ones, 16 * ones)
        >>> layers.share
        array([[0.75, 0.25],
               [0.5 , 0.5 ]])
        >>> print(layers)
        layer   share  first   last        SNR  noise scale
        a      66.7 %   75 %   50 %          8            2
        b      33.3 %   25 %   50 %         16            1
    """

    names: tuple[str, ...]
    edges: np.ndarray
    batch_size: np.ndarray
    variance_trace: np.ndarray
    true_grad_sq_norm: np.ndarray
    measured: np.ndarray
    samples: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """T_k/Σ_k T_k of each span, [B, K]; NaN where there is no noise at all."""
        positive = self.variance_trace.clip(min=0)
        with np.errstate(invalid="ignore"):
            return positive / positive.sum(1, keepdims=True)

    @property
    def snr(self) -> np.ndarray:
        """m·G²_k/T_k of each span, m its mean batch size, [B, K]."""
        return self._each(lambda m, trace, signal: snr(m, trace, signal))

    @property
    def noise_scale(self) -> np.ndarray:
        """T_k/G²_k of each span, in samples, [B, K]."""
        return self._each(lambda m, trace, signal: noise_scale(trace, signal))

    def _each(self, function) -> np.ndarray:
        sizes = np.broadcast_to(self.batch_size[:, None], self.variance_trace.shape)
        return np.vectorize(function, otypes=[float])(sizes, self.variance_trace, self.true_grad_sq_norm)

    def merged(self, spans: int) -> Layers:
        """The same in at most so many spans, neighbours taken together.

        Raises:
            ValueError: spans below 1.
        """
        if spans < 1:
            raise ValueError(f"spans must be at least 1, got {spans!r}")
        width = math.ceil(len(self.samples) / spans)
        if width <= 1:
            return self
        starts = np.arange(0, len(self.samples), width)
        measured, samples, steps = (np.add.reduceat(values, starts) for values in (self.measured, self.samples, self.samples / self.batch_size))
        return replace(
            self,
            edges=np.append(self.edges[starts], self.edges[-1]),
            batch_size=samples / steps,
            variance_trace=np.add.reduceat(self.variance_trace * self.measured[:, None], starts) / measured[:, None],
            true_grad_sq_norm=np.add.reduceat(self.true_grad_sq_norm * self.samples[:, None], starts) / samples[:, None],
            measured=measured,
            samples=samples,
        )

    def _rows(self) -> list[LayerRow]:
        whole, quarters = self.merged(1), self.merged(4)
        return [
            LayerRow(name, *(float(values[at, k]) for values, at in (
                (whole.share, 0), (quarters.share, 0), (quarters.share, -1), (whole.snr, 0), (whole.noise_scale, 0),
                (whole.variance_trace, 0), (whole.true_grad_sq_norm, 0),
            )))
            for k, name in enumerate(self.names)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        return self._rows()[index]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows())

    def __str__(self) -> str:
        width = max(len("layer"), *map(len, self.names))
        lines = [f"{'layer':<{width}}  {'share':>6} {'first':>6} {'last':>6} {'SNR':>10} {'noise scale':>12}"]
        for row in self._rows():
            shares = f"{100 * row.share:>4.1f} % {100 * row.share_first:>4.0f} % {100 * row.share_last:>4.0f} %"
            lines.append(f"{row.name:<{width}}  {shares} {row.snr:>10.3g} {row.noise_scale:>12.4g}")
        return "\n".join(lines)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line a span and layer, with a header line; samples_seen is the span's end."""
        shares, ratios, scales = self.share, self.snr, self.noise_scale
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for b, (seen, size) in enumerate(zip(self.edges[1:], self.batch_size, strict=True)):
                for k, name in enumerate(self.names):
                    values = (values[b, k] for values in (shares, ratios, scales, self.variance_trace, self.true_grad_sq_norm))
                    writer.writerow([int(seen), float(size), name, *map(float, values)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the heat map into an image file: see `adabatch.diagnostics.heat_map.draw_layers`."""
        self.draw().savefig(os.fspath(path), dpi=130)

    def draw(self) -> Figure:
        """The figure that `plot` saves."""
        from adabatch.diagnostics.heat_map import draw_layers

        return draw_layers(self)
