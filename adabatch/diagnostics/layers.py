"""The layer view: which layer makes the noise of the gradient, and which carries its signal.

Legend: K layers (or parameters, or parameter groups), B spans of the run, m samples in a step, s of
them measured; T_k the trace of the covariance of layer k's per-sample gradients, G²_k the squared
norm of its true gradient. Both add up over the layers to the model's T and G².
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from adabatch._checks import check_version
from adabatch._table import aligned, html
from adabatch.diagnostics.record import noise_scale, number, snr
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_RECORDED = (
    "the history holds no layers: nothing was measured yet, or the model was measured as a whole. "
    "Pass estimator=adabatch.PerSample(per_parameter=True) to adabatch.wrap or adabatch.monitor, "
    "or give the optimizer several parameter groups, which are always recorded separately."
)
_MOMENTS = ("share", "snr", "noise_scale", "variance_trace", "true_grad_sq_norm")
KINDS = ("layer", "parameter", "group")
MAX_SPANS, MIN_SPANS = 1024, 64
MAX_CELLS = 1 << 18  # spans × names; 4 MB in total


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One step's unbiased T̂_k and Ĝ²_k of each of K names.

    Attributes:
        names: of the parameters, or "group 0" and so on.
        of: "parameter" or "group".
        traces: T̂_k [K], float64; may be below 0 where inner products are not measured.
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
        """From a step's moments: by parameter, else by parameter group, else None.

        T̂_k = (mean_S ‖g_ik‖² − ‖g_k‖²)/(1 − 1/m_eff), with inner products
        mean_S ‖g_ik − g_k‖²/(1 − 1/m_eff); Ĝ²_k = ‖g_k‖² − T̂_k/m_eff.

        Example:
            >>> norms = torch.tensor([1.0, 3.0])
            >>> part = GradientMoments(batch_size=2, sq_norms=norms, grad_sq_norm=1.0)
            >>> whole = GradientMoments(batch_size=2, sq_norms=2 * norms, grad_sq_norm=2.0,
            ...                         by_group={0: part, 1: part})
            >>> LayerStatistics.of_step(whole).traces
            array([2., 2.])
        """
        size, measured = moments.batch_size, moments.n_measured
        if not moments.by_parameter or not moments.parameter_grad_sq_norms:
            if not moments.by_group:
                return None
            parts = moments.by_group.values()
            traces = np.array([part.variance_trace for part in parts])
            signals = np.array([part.true_grad_sq_norm for part in parts])
            names = tuple(f"group {index}" for index in moments.by_group)
            return cls(names, "group", traces, signals, size, measured)
        names = tuple(moments.by_parameter)
        m_eff = moments.m_eff
        if moments.totals is not None:  # of several processes, whose samples are not all here
            sums = [moments.totals.parameter_terms[name] for name in names]
            norms = [moments.parameter_grad_sq_norms[name] for name in names]
            traces = np.array(sums) / (1 - 1 / m_eff)
            signals = np.array(norms) - traces / m_eff
            return cls(names, "parameter", traces, signals, size, measured)
        # All parameters at once: hundreds of short sums would take milliseconds per step.
        terms = torch.stack([moments.by_parameter[name] for name in names]).double()
        columns = [[moments.parameter_grad_sq_norms[name]] for name in names]
        squares = torch.tensor(columns, dtype=torch.float64, device=terms.device)
        if moments.parameter_inner_products:
            weights = 1.0 if moments.weights is None else moments.weights
            products = [moments.parameter_inner_products[name] for name in names]
            terms -= 2 * weights * torch.stack(products).double()
            terms = (terms + weights**2 * squares).clamp(min=0)
            terms = terms if moments.corrections is None else moments.corrections * terms
        else:
            terms = terms - squares
        trace = terms.mean(1) / (1 - 1 / m_eff)
        signal = squares[:, 0] - trace / m_eff
        return cls(names, "parameter", trace.cpu().numpy(), signal.cpu().numpy(), size, measured)

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite numbers."""
        return bool(np.isfinite(self.traces).all() and np.isfinite(self.signals).all())

    def to_json(self) -> State:
        """{"of", "measured": s, "moments": {name: [T̂_k, Ĝ²_k]}}, to seven digits."""
        pairs = zip(self.names, self.traces, self.signals, strict=True)
        moments = {name: [float(f"{value:.7g}") for value in pair] for name, *pair in pairs}
        return {"of": self.of, "measured": self.n_measured, "moments": moments}

    @classmethod
    def from_json(cls, value: State, batch_size: int) -> LayerStatistics:
        """The inverse of `to_json`.

        Raises:
            ValueError: anything else.
        """
        try:
            values = np.array(list(value["moments"].values()), dtype=float).reshape(-1, 2)
            names, measured = tuple(value["moments"]), int(value["measured"])
            traces, signals = values.T
            return cls(names, str(value["of"]), traces, signals, batch_size, measured)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            expected = '{"of", "measured", "moments": {name: [trace, signal]}}'
            raise ValueError(f"layers must be {expected}, got {value!r:.100}") from error


class LayerHistory:
    """Σ s·T̂_k and Σ m·Ĝ²_k over spans of a run, in bounded memory for any length.

    A span starts as one measured step. When there are more than `max_spans`, neighbours are added
    up and further spans are twice as long: nothing is lost but resolution. Statistics of other
    names than before start a new history.

    Args:
        max_spans: for up to 256 names; more names leave room for fewer spans, at least 64.

    Example:
        >>> history = LayerHistory(max_spans=4)
        >>> for step in range(5):
        ...     ones = LayerStatistics(("a",), "parameter", np.ones(1), np.ones(1), 16, 16)
        ...     history.append(ones, 16 * (step + 1))
        >>> history.view().edges
        array([ 0, 32, 64, 80])
    """

    def __init__(self, max_spans: int = MAX_SPANS):
        self.max_spans = max_spans
        self._begin((), "")

    def _begin(self, names: tuple[str, ...], of: str) -> None:
        self.names, self.of = names, of
        self._stride = 1  # measured steps in a span
        # steps, samples, measured samples, samples seen at the end
        self._counts: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []  # [2, K]
        self._start = 0

    def __len__(self) -> int:
        return len(self._counts)

    def append(self, statistics: LayerStatistics, samples_seen: int) -> None:
        """Add a measured step; samples_seen includes it. Values that are not finite are ignored."""
        if not statistics.is_finite:
            return
        if (statistics.names, statistics.of) != (self.names, self.of):
            self._begin(statistics.names, statistics.of)
        size, measured = statistics.batch_size, statistics.n_measured
        if not self._counts:
            self._start = samples_seen - size
        counts = np.array([1, size, measured, samples_seen])
        sums = np.stack([measured * statistics.traces, size * statistics.signals])
        if self._counts and self._counts[-1][0] < self._stride:
            self._counts[-1] = _joined(self._counts[-1], counts)
            self._sums[-1] = self._sums[-1] + sums
            return
        limit = min(self.max_spans, max(MIN_SPANS, MAX_CELLS // len(self.names)))
        if len(self) >= limit and len(self) % 2 == 0:
            pairs = range(0, len(self), 2)
            self._counts = [_joined(*self._counts[at:at + 2]) for at in pairs]
            self._sums = [self._sums[at] + self._sums[at + 1] for at in pairs]
            self._stride *= 2
        self._counts.append(counts)
        self._sums.append(sums)

    def view(self, by: str | None = None) -> Layers:
        """The history by 'layer' (a module's own parameters together), 'parameter' or 'group'.

        None: layers where parameters were recorded, else groups.

        Raises:
            LookupError: nothing of the kind was recorded; the message says how to record it.
            ValueError: another kind.
        """
        if by not in (None, *KINDS):
            raise ValueError(f"by must be one of {KINDS} or None, got {by!r}")
        if not self._counts:
            raise LookupError(NOT_RECORDED)
        if by is not None and (by == "group") != (self.of == "group"):
            fix = ("measure with PerSample(per_parameter=True)" if self.of == "group" else
                   "measure without per_parameter=True")
            raise LookupError(f"the history holds the moments of each {self.of}, "
                              f"not of each {by}: {fix}")
        names, columns = self.names, list(range(len(self.names)))
        if self.of == "parameter" and by != "parameter":
            owners = [name.rpartition(".")[0] or "(model)" for name in self.names]
            names = tuple(dict.fromkeys(owners))
            columns = [names.index(owner) for owner in owners]
        steps, samples, measured, ends = np.stack(self._counts, axis=1)
        sums = np.zeros((len(self), 2, len(names)))
        spans = np.stack(self._sums)
        for k, column in enumerate(columns):
            sums[:, :, column] += spans[:, :, k]
        traces, signals = sums[:, 0] / measured[:, None], sums[:, 1] / samples[:, None]
        edges = np.insert(ends, 0, self._start)
        return Layers(names, edges, samples / steps, traces, signals, measured, samples)

    def state_dict(self) -> State:
        """The names, and the spans as tensors."""
        counts = np.array(self._counts, dtype=np.int64).reshape(len(self), 4)
        sums = np.array(self._sums, dtype=np.float64).reshape(len(self), 2, len(self.names))
        return {
            "version": 1, "names": list(self.names), "of": self.of,
            "stride": self._stride, "start": self._start,
            "counts": torch.from_numpy(counts), "sums": torch.from_numpy(sums),
        }

    def load_state_dict(self, state: State | None) -> None:
        """Continue from `state_dict`; None, from a run that recorded no layers, empties it.

        Raises:
            ValueError: an unknown version.
        """
        if state is None:
            self._begin((), "")
            return
        check_version(state, 1, "LayerHistory")
        self._begin(tuple(state["names"]), state["of"])
        self._stride, self._start = state["stride"], state["start"]
        self._counts = list(state["counts"].clone().numpy())
        self._sums = list(state["sums"].clone().numpy())


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = first + second
    total[3] = second[3]
    return total


@dataclass(frozen=True)
class LayerRow:
    """One layer over the whole run (ratios of sums, not averages of ratios); sizes in samples.

    Attributes:
        name: of the layer, the parameter, or the group.
        share: part of the model's variance trace, from 0 to 1; share_first and share_last: in the
            first and the last quarter of the spans.
        snr: m·G²/T, signal-to-noise ratio of the batch gradient, at the mean batch size.
        noise_scale: T/G².
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


@dataclass(frozen=True, eq=False, repr=False)
class Layers(Sequence[LayerRow]):
    """What `Diagnostics.layers()` returns: one `LayerRow` per layer, printed as a table.

    T of a span is Σ s·T̂/Σ s over its measured steps, G² is Σ m·Ĝ²/Σ m. A T below 0 counts as 0 in
    the shares, a G² below 0 as 0 in the ratios.

    Attributes:
        names: of the layers, [K].
        edges: samples seen at the start of the first span and at the end of each, [B + 1].
        batch_size: mean size of a step, [B].
        variance_trace, true_grad_sq_norm: T_k and G²_k, [B, K], float64.
        measured, samples: Σ s and Σ m of each span, their weights, [B].

    Example:
        >>> ones = np.ones(2)
        >>> traces = np.array([[3.0, 1.0], [1.0, 1.0]])
        >>> layers = Layers(("a", "b"), np.array([0, 16, 32]), 16 * ones, traces, np.ones((2, 2)),
        ...                 16 * ones, 16 * ones)
        >>> layers
        Layers(2 names, 2 spans to 32 samples; a has 66.7 % of the variance trace)
        >>> print(layers)
        layer   share  first  last  SNR  noise scale
        a      66.7 %   75 %  50 %    8            2
        b      33.3 %   25 %  50 %   16            1
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
        return self._each(snr)

    @property
    def noise_scale(self) -> np.ndarray:
        """T_k/G²_k of each span, in samples, [B, K]."""
        return self._each(lambda m, trace, signal: noise_scale(trace, signal))

    def _moments(self) -> tuple[np.ndarray, ...]:
        """The columns _MOMENTS."""
        return (self.share, self.snr, self.noise_scale, self.variance_trace,
                self.true_grad_sq_norm)

    def _each(self, function: Callable[[float, float, float], float]) -> np.ndarray:
        sizes = np.broadcast_to(self.batch_size[:, None], self.variance_trace.shape)
        each = np.vectorize(function, otypes=[float])
        return each(sizes, self.variance_trace, self.true_grad_sq_norm)

    def merged(self, spans: int) -> Layers:
        """The same in at most `spans` spans, neighbours merged.

        Raises:
            ValueError: spans below 1.
        """
        if spans < 1:
            raise ValueError(f"spans must be at least 1, got {spans!r}")
        width = math.ceil(len(self.samples) / spans)
        if width <= 1:
            return self
        starts = np.arange(0, len(self.samples), width)
        measured, samples, steps = (np.add.reduceat(values, starts) for values in
                                    (self.measured, self.samples, self.samples / self.batch_size))
        traces = self.variance_trace * self.measured[:, None]
        signals = self.true_grad_sq_norm * self.samples[:, None]
        return replace(
            self,
            edges=np.append(self.edges[starts], self.edges[-1]),
            batch_size=samples / steps,
            variance_trace=np.add.reduceat(traces, starts) / measured[:, None],
            true_grad_sq_norm=np.add.reduceat(signals, starts) / samples[:, None],
            measured=measured,
            samples=samples,
        )

    def _rows(self) -> list[LayerRow]:
        whole, quarters = self.merged(1), self.merged(4)
        first, last = quarters.share[0], quarters.share[-1]
        share, *moments = (values[0] for values in whole._moments())
        columns = (column.tolist() for column in (share, first, last, *moments))
        return [LayerRow(*values) for values in zip(self.names, *columns, strict=True)]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> LayerRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerRow]: ...
    def __getitem__(self, index: int | slice) -> LayerRow | list[LayerRow]:
        return self._rows()[index]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows())

    def _table(self) -> list[tuple[str, ...]]:
        cells = [(row.name, f"{100 * row.share:.1f} %", f"{100 * row.share_first:.0f} %",
                  f"{100 * row.share_last:.0f} %", f"{row.snr:.3g}", number(row.noise_scale))
                 for row in self._rows()]
        return [("layer", "share", "first", "last", "SNR", "noise scale"), *cells]

    def __str__(self) -> str:
        return "\n".join(aligned(self._table()))

    def __repr__(self) -> str:
        top = max(self._rows(), key=lambda row: row.share)
        span = f"{len(self.samples)} spans to {self.edges[-1]:,} samples"
        share = f"{top.name} has {100 * top.share:.1f} % of the variance trace"
        return f"Layers({len(self)} names, {span}; {share})"

    def _repr_html_(self) -> str:
        return html(self._table())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per span and layer, with a header line; samples_seen is the span's end."""
        values = self._moments()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["samples_seen", "batch_size", "name", *_MOMENTS])
            for b, (seen, size) in enumerate(zip(self.edges[1:], self.batch_size, strict=True)):
                start = int(seen), float(size)
                writer.writerows([*start, name, *(float(each[b, k]) for each in values)]
                                 for k, name in enumerate(self.names))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the heat map into an image file: see `adabatch.diagnostics.plots.draw_layers`."""
        self.draw().savefig(os.fspath(path), dpi=130)

    def draw(self) -> Figure:
        """The figure that `plot` saves."""
        from adabatch.diagnostics.plots import draw_layers

        return draw_layers(self)
