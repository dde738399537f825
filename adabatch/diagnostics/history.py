"""The history of a run: one record a step, in memory and, on request, in a file that grows as the run goes."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, overload

import numpy as np

from adabatch.diagnostics import jsonl
from adabatch.diagnostics.layer_history import LayerHistory
from adabatch.diagnostics.layers import Layers, LayerStatistics
from adabatch.diagnostics.plot import plot as plot_history
from adabatch.diagnostics.record import FIELDS, INDEX, Record
from adabatch.diagnostics.smoothed import Smoothed
from adabatch.diagnostics.summary import summary

_STATE_VERSION = 1
_STEP, _SEEN, _MEASURED, _DROPPED = (INDEX[name] for name in ("step", "samples_seen", "measured", "dropped"))
_NUMPY_TYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_, "str": np.str_}


class Diagnostics:
    """A sequence of `Record`, filled by the scheduler, read by everyone else.

    The caller of `append` gives what a step was and what it measured; the averages, the noise scale, the signal-to-noise ratio and the speed
    are worked out here, with their errors. Averages: Σ μ^(n−i) m_i x_i / Σ μ^(n−i) m_i over the steps that have the value, m_i the step's batch
    size, for T̂ the samples measured (`MovingAverage`); they are for display, a controller keeps its own.

    Args:
        smoothing: μ of the averages, 0 <= μ < 1.
        max_records: keep at most so many records in memory, the latest ones (about 1 kB each); None keeps all. Counts go over the whole run.

    Raises:
        ValueError: smoothing outside [0, 1), or max_records below 1.

    Example:
        >>> history = Diagnostics()
        >>> for step, trace in enumerate([8.0, 4.0]):
        ...     history.append(step=step, samples_seen=16 * (step + 1), batch_size=16, next_batch_size=16, lr=0.1, loss=2.0,
        ...                    variance_trace=trace, grad_sq_norm=0.75, true_grad_sq_norm=0.5, measured=True)
        >>> history.latest.noise_scale, round(history.latest.variance_trace_ema, 3)
        (8.0, 5.949)
        >>> history.column("variance_trace")
        array([8., 4.])
    """

    def __init__(self, smoothing: float = 0.95, max_records: int | None = None):
        if max_records is not None and max_records < 1:
            raise ValueError(f"max_records is {max_records!r}, but must be at least 1, or None to keep all records.")
        self._smoothed = Smoothed(smoothing)
        self._rows: deque[tuple] = deque(maxlen=max_records)
        self._last_step: int | None = None
        self._steps = 0
        self._measured = 0
        self._dropped: Counter[str] = Counter()
        self._writer: jsonl.JsonlWriter | None = None
        self._layers = LayerHistory()

    def append(
        self,
        *,
        step: int,
        samples_seen: int,
        batch_size: int,
        next_batch_size: int,
        lr: float,
        loss: float = math.nan,
        proposed_batch_size: float = math.nan,
        variance_trace: float = math.nan,
        grad_sq_norm: float = math.nan,
        true_grad_sq_norm: float = math.nan,
        n_measured: int = 0,
        variance_trace_step_error: float = math.nan,
        proposed_low: float = math.nan,
        proposed_high: float = math.nan,
        f_star: float = math.nan,
        f_star_std_error: float = math.nan,
        preconditioned_trace_ema: float = math.nan,
        preconditioned_trace_std_error: float = math.nan,
        seconds: float = math.nan,
        measured: bool = False,
        dropped: str = "",
        layers: LayerStatistics | None = None,
    ) -> None:
        """Adds one step; arguments as the fields of `Record`.

        n_measured 0 says that all samples were measured. Where `measured` is False or `dropped` gives a reason, the moments are recorded as NaN and enter no
        average. Values that are not finite enter no average either. layers: the step's moments by layer, where they were measured apart.
        """
        measured = bool(measured) and not dropped
        size, loss, seconds, nothing = int(batch_size), float(loss), float(seconds), math.nan
        trace, square, signal = (float(variance_trace), float(grad_sq_norm), float(true_grad_sq_norm)) if measured else (nothing, nothing, nothing)
        samples, error = (int(n_measured) or size, float(variance_trace_step_error)) if measured else (0, nothing)
        now = self._smoothed.update(size, samples, loss, trace, square, signal, error)
        row = (
            int(step), int(samples_seen), size, float(proposed_batch_size), float(proposed_low), float(proposed_high), int(next_batch_size), float(lr),
            loss, now["loss_ema"], now["loss_std_error"], float(f_star), float(f_star_std_error),
            samples, trace, error, now["variance_trace_ema"], now["variance_trace_std_error"],
            square, now["grad_sq_norm_ema"], signal, now["true_grad_sq_norm_ema"], now["true_grad_sq_norm_std_error"],
            now["noise_scale"], now["noise_scale_ema"], now["noise_scale_low"], now["noise_scale_high"], now["snr"], now["snr_ema"],
            float(preconditioned_trace_ema), float(preconditioned_trace_std_error),
            seconds, size / seconds if seconds > 0 else nothing, measured, str(dropped),
        )  # fmt: skip
        layers = layers if measured and layers is not None and layers.is_finite else None
        self._keep(row, layers)
        if self._writer is not None:
            self._write(row, layers)

    def _keep(self, row: tuple, layers: LayerStatistics | None) -> None:
        self._rows.append(row)
        if layers is not None:
            self._layers.append(layers, row[_SEEN])
        self._last_step = row[_STEP]
        self._steps += 1
        self._measured += row[_MEASURED]
        if row[_DROPPED]:
            self._dropped[row[_DROPPED]] += 1

    def _write(self, row: tuple, layers: LayerStatistics | None) -> None:
        try:
            self._writer.write([row], layers)
        except OSError as error:
            # A full disk must not end a training run; the records stay in memory.
            message = f"The history is no longer written to {self._writer.path}: {error}. Free the disk and call to_jsonl again."
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            self.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        return (Record(*row) for row in self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self._rows))
            if stride < 0:
                return [Record(*self._rows[position]) for position in range(start, stop, stride)]
            return [Record(*row) for row in islice(self._rows, start, stop, stride)]
        return Record(*self._rows[index])

    def __repr__(self) -> str:
        return f"Diagnostics({self._steps} steps, {self._measured} measured, {self.n_dropped} dropped)"

    @property
    def latest(self) -> Record:
        """The last step's record.

        Raises:
            LookupError: no step has been recorded yet.
        """
        if not self._rows:
            raise LookupError("The history has no record yet: it gets one at each scheduler.step(). Test len(diagnostics) first.")
        return Record(*self._rows[-1])

    @property
    def n_steps(self) -> int:
        """Steps recorded over the whole run, also those no longer in memory or from before a resume."""
        return self._steps

    @property
    def n_measured(self) -> int:
        """Steps of the whole run whose measurement was used."""
        return self._measured

    @property
    def n_dropped(self) -> int:
        """Measurements of the whole run that were thrown away."""
        return sum(self._dropped.values())

    @property
    def dropped(self) -> Counter[str]:
        """How many measurements were thrown away, by reason; a copy."""
        return Counter(self._dropped)

    def column(self, name: str) -> np.ndarray:
        """One field over the records in memory, [len(self)], as float64, int64, bool or str.

        Raises:
            ValueError: no such field.
        """
        if name not in FIELDS:
            raise ValueError(f"A record has no field {name!r}; it has {', '.join(FIELDS)}.")
        position = INDEX[name]
        return np.array([row[position] for row in self._rows], dtype=_NUMPY_TYPES[FIELDS[name]])

    def layers(self, by: str | None = None) -> Layers:
        """Each layer's share of the variance trace and its signal-to-noise ratio over the samples seen; print it, or see `Layers.plot` and `to_csv`.

        Recorded where the model is measured by parameter (wrap(..., per_parameter=True)) or the optimizer has several parameter groups, in memory of a fixed
        size whatever the length of the run, and in the lines of to_jsonl from its call on. For `by` and the errors see `LayerHistory.view`.
        """
        return self._layers.view(by)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the records in memory as a table with a header line; NaN and the infinities as nan, inf, -inf."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            writer.writerows(self._rows)

    def to_jsonl(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        """Writes the records in memory as JSON lines, then each new one as it comes, until `close` or the next `to_jsonl`.

        Every line is handed to the operating system at once, so the file can be read at any moment, also after a kill. NaN is written as
        null, the infinities as "inf" and "-inf": each line is valid JSON.

        Args:
            path: the file; its folder must exist.
            append: continue the file of an earlier run instead of replacing it, as after a resume. `from_jsonl` then lets the steps done
                again replace the ones that were lost.

        Raises:
            ValueError: append, and the file is no history of this version.
            OSError: the file cannot be written.
        """
        self.close()
        self._writer = jsonl.JsonlWriter(path, self._smoothed.smoothing, append)
        self._writer.write(self._rows)

    def close(self) -> None:
        """Ends the writing begun by `to_jsonl`; the records in memory stay."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> Diagnostics:
        """The history in a file, with its counts and averages, so that it can be read, drawn, or appended to.

        A last line torn by a kill is left out; a record whose step is not above the one before it (a run resumed at an earlier checkpoint) replaces
        the records from its step on.

        Raises:
            ValueError: the file is no history of this version, or a line other than the torn last one is malformed; the line is named.
            OSError: the file cannot be read.
        """
        header, rows, layers = jsonl.read(path)
        history = cls(header.get("smoothing", 0.95))
        for row, apart in zip(rows, layers, strict=True):
            history._keep(row, apart)
            history._smoothed.take_row(row)
        return history

    def summary(self) -> str:
        """A table to print: see `adabatch.diagnostics.summary.summary`."""
        return summary(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the history into an image file: see `adabatch.diagnostics.plot.plot`."""
        plot_history(self, path)

    def state_dict(self) -> dict[str, Any]:
        """The averages and counts, plain numbers, a few hundred bytes; the layers' history; not the records, which `to_jsonl` keeps."""
        return {
            "version": _STATE_VERSION,
            "last_step": self._last_step,
            "steps": self._steps,
            "measured": self._measured,
            "dropped": dict(self._dropped),
            **self._smoothed.state_dict(),
            "layers": self._layers.state_dict() if len(self._layers) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; records in memory from after that state are removed.

        Raises:
            ValueError: an unknown version, or averages that do not fit.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"The diagnostics' state has version {state.get('version')!r}, but this adabatch reads version {_STATE_VERSION}; update adabatch.")
        self._smoothed.load_state_dict(state)
        self._layers.load_state_dict(state.get("layers"))
        self._last_step = state["last_step"]
        self._steps, self._measured, self._dropped = state["steps"], state["measured"], Counter(state["dropped"])
        while self._rows and (self._last_step is None or self._rows[-1][_STEP] > self._last_step):
            self._rows.pop()
