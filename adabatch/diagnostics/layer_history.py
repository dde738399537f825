"""The layers' moments over a run of any length in bounded memory: sums over spans of the run, which double in length as the run goes on.

Legend: K names, B spans, m samples in a step, s of them measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from adabatch._checks import check_version
from adabatch.diagnostics.layers import NOT_RECORDED, Layers, LayerStatistics

MAX_SPANS, FEWEST_SPANS = 1024, 64
CELLS = 1 << 18  # numbers of a kind that are kept; 4 MB in all
KINDS = ("layer", "parameter", "group")


class LayerHistory:
    """Sums of s·T̂_k and m·Ĝ²_k over spans of equally many measured steps.

    A span starts as one measured step. When there are more than `max_spans`, neighbours are added up and all further spans are twice as long: nothing is
    left out, only the resolution falls. Statistics of other names than before begin the history anew.

    Args:
        max_spans: spans kept for up to 256 names; more names leave room for fewer, at least 64.

    Example:
        >>> history = LayerHistory(max_spans=4)
        >>> for step in range(5):
        ...     history.append(LayerStatistics(("a",), "parameter", np.ones(1), np.ones(1), 16, 16), 16 * (step + 1))
        >>> history.view().edges
        array([ 0, 32, 64, 80])
    """

    def __init__(self, max_spans: int = MAX_SPANS):
        self.max_spans = max_spans
        self._begin((), "")

    def _begin(self, names: tuple[str, ...], of: str) -> None:
        self.names, self.of = names, of
        self._stride = 1  # measured steps in a span
        self._counts: list[np.ndarray] = []  # steps, samples, measured, samples seen at the end
        self._sums: list[np.ndarray] = []  # [2, K]
        self._start = 0

    def __len__(self) -> int:
        return len(self._counts)

    def append(self, statistics: LayerStatistics, samples_seen: int) -> None:
        """Adds one measured step; samples_seen includes it. Moments that are not finite are left out."""
        if not statistics.is_finite:
            return
        if (statistics.names, statistics.of) != (self.names, self.of):
            self._begin(statistics.names, statistics.of)
        if not self._counts:
            self._start = samples_seen - statistics.batch_size
        size, measured = statistics.batch_size, statistics.n_measured
        counts, sums = np.array([1, size, measured, samples_seen]), np.stack([measured * statistics.traces, size * statistics.signals])
        if self._counts and self._counts[-1][0] < self._stride:
            self._counts[-1], self._sums[-1] = _joined(self._counts[-1], counts), self._sums[-1] + sums
            return
        if len(self) >= self._limit and len(self) % 2 == 0:
            self._halve()
        self._counts.append(counts)
        self._sums.append(sums)

    @property
    def _limit(self) -> int:
        return min(self.max_spans, max(FEWEST_SPANS, CELLS // len(self.names)))

    def _halve(self) -> None:
        self._counts = [_joined(*self._counts[at : at + 2]) for at in range(0, len(self), 2)]
        self._sums = [self._sums[at] + self._sums[at + 1] for at in range(0, len(self._sums), 2)]
        self._stride *= 2

    def view(self, by: str | None = None) -> Layers:
        """The history by 'layer' (a module's own parameters together), 'parameter' or 'group'; None: layers where parameters were recorded, else groups.

        Raises:
            LookupError: nothing of the kind was recorded; the message says how to have it recorded.
            ValueError: another kind.
        """
        if by not in (None, *KINDS):
            raise ValueError(f"by must be one of {KINDS} or None, got {by!r}")
        if not self._counts:
            raise LookupError(NOT_RECORDED)
        if by is not None and (by == "group") != (self.of == "group"):
            cure = "pass per_parameter=True to adabatch.wrap" if self.of == "group" else "measure without per_parameter=True"
            raise LookupError(f"the history holds the moments of each {self.of}, not of each {by}: {cure}")
        names, column = self.names, range(len(self.names))
        if self.of == "parameter" and by != "parameter":
            owners = [name.rpartition(".")[0] or "(model)" for name in self.names]
            names = tuple(dict.fromkeys(owners))
            column = [names.index(owner) for owner in owners]
        steps, samples, measured, ends = np.stack(self._counts, axis=1)
        sums = np.zeros((len(self), 2, len(names)))
        np.add.at(sums, (slice(None), slice(None), np.array(column)), np.stack(self._sums))
        traces, signals = sums[:, 0] / measured[:, None], sums[:, 1] / samples[:, None]
        return Layers(names, np.insert(ends, 0, self._start), samples / steps, traces, signals, measured, samples)

    def state_dict(self) -> dict[str, Any]:
        """The names, and the spans as tensors."""
        counts = torch.from_numpy(np.stack(self._counts)) if self._counts else torch.zeros(0, 4, dtype=torch.int64)
        sums = torch.from_numpy(np.stack(self._sums)) if self._sums else torch.zeros(0, 2, len(self.names), dtype=torch.float64)
        return {"version": 1, "names": list(self.names), "of": self.of, "stride": self._stride, "start": self._start, "counts": counts, "sums": sums}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on from `state_dict`; None, from a run that recorded no layers, empties it.

        Raises:
            ValueError: an unknown version.
        """
        if state is None:
            self._begin((), "")
            return
        check_version(state, 1, "LayerHistory")
        self._begin(tuple(state["names"]), state["of"])
        self._stride, self._start = state["stride"], state["start"]
        self._counts, self._sums = list(state["counts"].clone().numpy()), list(state["sums"].clone().numpy())


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = first + second
    total[3] = second[3]
    return total
