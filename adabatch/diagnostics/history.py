"""The history of a run: one record per step, in memory and, on request, in a growing file."""

from __future__ import annotations

import csv
import math
import operator
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np

from adabatch._checks import check_version
from adabatch._table import html
from adabatch.diagnostics import files, plots
from adabatch.diagnostics import summary as text
from adabatch.diagnostics.layers import LayerHistory, Layers, LayerStatistics
from adabatch.diagnostics.record import (
    FIELDS, NO_METRICS, Averages, Record, Row, brief, field_value, row_of)
from adabatch.interfaces import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATE_VERSION = 2
_TYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_, "str": np.str_}
_MAX_PENDING = 256


class Diagnostics:
    """A sequence of `Record`, filled by the scheduler or the monitor.

    `append` takes what a step was and what it measured. Averages, the noise scale, the
    signal-to-noise ratio and their errors are worked out when they are read. The average of x is
    Σ μ^(n−i) m_i x_i / Σ μ^(n−i) m_i over the steps that have x, m_i the step's batch size, for T̂
    the samples measured (`MovingAverage`); controllers keep their own.

    Args:
        smoothing: μ of the averages, 0 <= μ < 1.
        max_records: keep the latest max_records in memory (about 1 kB each); None keeps all.
            Counts and averages are over the whole run.

    Raises:
        ValueError: smoothing outside [0, 1), or max_records below 1.

    Example:
        >>> history = Diagnostics()
        >>> for step, trace in enumerate([8.0, 4.0]):
        ...     history.append(step=step, samples_seen=16 * (step + 1), batch_size=16, lr=0.1,
        ...                    loss=2.0, variance_trace=trace, grad_sq_norm=0.75,
        ...                    true_grad_sq_norm=0.5, measured=True)
        >>> history.latest.noise_scale, round(history.latest.variance_trace_ema, 3)
        (8.0, 5.949)
        >>> history.column("variance_trace")
        array([8., 4.])
    """

    def __init__(self, smoothing: float = 0.95, max_records: int | None = None):
        if max_records is not None and (
            not isinstance(max_records, SupportsIndex) or operator.index(max_records) < 1
        ):
            raise ValueError("max_records must be an integer of at least 1, or None to keep all "
                             f"records, got {max_records!r}")
        self._max_records = max_records
        self._averages, self._before = Averages(smoothing), Averages(smoothing)
        self._records: deque[Record] = deque()  # worked out; the averages are those after the last
        self._pending: list[Row] = []  # appended since
        self._last_step: int | None = None
        self._steps = self._measured = 0
        self._dropped: Counter[str] = Counter()
        self._writer: files.JsonlWriter | None = None
        self._layers = LayerHistory()

    def append(
        self,
        *,
        step: int,
        samples_seen: int,
        batch_size: int,
        next_batch_size: int | None = None,
        lr: float = math.nan,
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
        metrics: Mapping[str, float] = NO_METRICS,
    ) -> None:
        """Add one step; arguments as the fields of `Record`.

        Args:
            n_measured: 0 means that all samples of a measured step were measured.
            measured, dropped: where `measured` is False or `dropped` gives a reason, the moments
                are recorded as NaN. Values that are not finite enter no average.
            layers: the step's moments by layer, where they were measured separately.
        """
        measured = bool(measured) and not dropped
        size, nan = int(batch_size), math.nan
        self.add(Row(
            int(step), int(samples_seen), size,
            float(proposed_batch_size), float(proposed_low), float(proposed_high),
            None if next_batch_size is None else int(next_batch_size), float(lr),
            float(loss), float(f_star), float(f_star_std_error),
            int(n_measured) or size if measured else 0,
            float(variance_trace) if measured else nan,
            float(variance_trace_step_error) if measured else nan,
            float(grad_sq_norm) if measured else nan,
            float(true_grad_sq_norm) if measured else nan,
            float(preconditioned_trace_ema), float(preconditioned_trace_std_error),
            float(seconds), measured, str(dropped),
            {name: float(value) for name, value in metrics.items()},
        ), layers)

    def add(self, row: Row, layers: LayerStatistics | None = None) -> None:
        """Add one step as it is stored."""
        self._pending.append(row)
        self._last_step = row.step
        self._steps += 1
        self._measured += row.measured
        if row.dropped:
            self._dropped[row.dropped] += 1
        if layers is not None:
            if row.measured and layers.is_finite:
                self._layers.append(layers, row.samples_seen)
            else:
                layers = None
        limit = self._max_records
        if limit is not None and len(self._pending) >= max(_MAX_PENDING, limit):
            self._all()
        if self._writer is not None:
            self._write(lambda writer: writer.write([row], layers))

    def flush(self) -> None:
        """Write the records that wait for it to the file of `to_jsonl`; state_dict() calls it."""
        self._write(files.JsonlWriter.flush)

    def _write(self, write: Callable[[files.JsonlWriter], None]) -> None:
        writer = self._writer
        if writer is None:
            return
        try:
            write(writer)
        except OSError as error:  # a full disk must not end a training run
            message = (f"the history is no longer written to {writer.path}: {error}. The records "
                       "stay in memory; free the disk and call to_jsonl again.")
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            self._writer = None
            writer.close()

    def _all(self) -> deque[Record]:
        """The records in memory, worked out."""
        self._records.extend(map(self._averages.record, self._pending))
        self._pending.clear()
        while self._max_records is not None and len(self._records) > self._max_records:
            self._before.take(self._records.popleft())
        return self._records

    def __len__(self) -> int:
        count = len(self._records) + len(self._pending)
        return count if self._max_records is None else min(count, self._max_records)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._all()))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return list(self._all())[index]
        if isinstance(index, str):
            raise TypeError(f"a history is a sequence of records: read a field over the run by "
                            f"column({index!r}), and of one record as an attribute")
        if not -len(self) <= index < len(self):
            raise IndexError(f"the history has {len(self)} records in memory, got index {index}")
        return self._all()[index]

    def __repr__(self) -> str:
        latest = f"; {brief(self.latest)}" if len(self) else ""
        measured = f"{self._measured} measured, {self.n_dropped} dropped"
        return f"Diagnostics({self._steps} steps, {measured}{latest})"

    def _repr_html_(self) -> str:
        return html(text.table(self), text.heading(self))

    @property
    def latest(self) -> Record:
        """The last step's record.

        Raises:
            LookupError: no step has been recorded yet.
        """
        if not len(self):
            raise LookupError("the history has no record yet: each scheduler.step(), under "
                              "monitor each optimizer.step(), adds one; test len(diagnostics) "
                              "first")
        return self._all()[-1]

    @property
    def n_steps(self) -> int:
        """Steps of the whole run, also those no longer in memory or from before a resume."""
        return self._steps

    @property
    def n_measured(self) -> int:
        """Steps of the whole run whose measurement was used."""
        return self._measured

    @property
    def n_dropped(self) -> int:
        """Dropped measurements of the whole run."""
        return sum(self._dropped.values())

    @property
    def dropped(self) -> Counter[str]:
        """{reason: dropped measurements}, a copy."""
        return Counter(self._dropped)

    def column(self, name: str) -> np.ndarray:
        """One field over the records in memory, [len(self)], float64, int64, bool or str.

        A `next_batch_size` that some records do not have makes its column float64 with NaN. The
        names in `Record.metrics` are columns, too, NaN in records without.

        Raises:
            ValueError: no such field.
        """
        if name not in FIELDS:
            known = self._metrics()
            if name not in known:
                raise ValueError(
                    f"a record has no field {name!r}; it has {', '.join([*FIELDS, *known])}")
            return np.array([record.metrics.get(name, math.nan) for record in self._all()])
        values = [field_value(record, name) for record in self._all()]
        if FIELDS[name] in _TYPES:
            return np.array(values, dtype=_TYPES[FIELDS[name]])
        return np.array([math.nan if value is None else value for value in values],
                        dtype=np.float64 if None in values else np.int64)

    def _metrics(self) -> list[str]:
        """The names in the records' metrics that are no fields, in the order of their coming."""
        found = dict.fromkeys(name for record in self._all() for name in record.metrics)
        return [name for name in found if name not in FIELDS]

    def layers(self, by: str | None = None) -> Layers:
        """Each layer's part of the variance trace and its signal-to-noise ratio over the run.

        Recorded where the model is measured by parameter or the optimizer has several parameter
        groups, in memory of a fixed size, and in the file of `to_jsonl` from its call on. For `by`
        and the errors see `LayerHistory.view`.
        """
        return self._layers.view(by)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the records in memory as a table with a header line; nan, inf, -inf as such."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer, metrics = csv.writer(file), self._metrics()
            writer.writerow([*FIELDS, *metrics])
            for record in self:
                writer.writerow([*(field_value(record, name) for name in FIELDS),
                                 *(record.metrics.get(name, math.nan) for name in metrics)])

    def to_jsonl(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        """Write the records in memory as JSON lines, then new ones, until `close`.

        New ones are written together: at the first step a second after the last time, at
        state_dict(), so that a checkpoint is never ahead of the file, at `flush` and `close`, and
        when the process ends, unless it is killed. The file can be read at any moment. Format:
        `adabatch.diagnostics.files`.

        Args:
            path: the file; its folder must exist.
            append: continue the file of an earlier run instead of replacing it, as after a resume:
                `from_jsonl` lets steps done again replace those that were lost.

        Raises:
            ValueError: append, and the file is not a history of this version.
            OSError: the file cannot be written.
        """
        self.close()
        rows = list(map(row_of, self))
        self._writer = files.JsonlWriter(path, self._before, append)
        self._writer.write(rows)
        self._writer.flush()

    def close(self) -> None:
        """End the writing that `to_jsonl` began; the records in memory stay."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> Diagnostics:
        """The history in a file, with its counts and averages, to read, draw or append to.

        A last line torn by a kill is left out; a record whose step is not above the one before it
        (a run resumed at an earlier checkpoint) replaces the records from its step on.

        Raises:
            ValueError: not a history of this version, or a malformed line, which is named.
            OSError: the file cannot be read.
        """
        content = files.read(path)
        history = cls(content.before.smoothing)
        for averages in (history._averages, history._before):
            averages.load_state_dict(content.before.state_dict())
        for row, layers in content.records:
            history.add(row, layers)
        return history

    def summary(self) -> str:
        """A table to print: see `adabatch.diagnostics.summary`."""
        return text.summary(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the history into an image file: see `adabatch.diagnostics.plots`."""
        plots.plot(self, path)

    def draw(self) -> Figure:
        """The figure that `plot` saves, as for a notebook."""
        return plots.draw(self)

    def state_dict(self) -> State:
        """Averages, counts and layers, plain numbers and tensors; not the records."""
        self._all()
        self.flush()
        return {
            "version": _STATE_VERSION, "last_step": self._last_step,
            "steps": self._steps, "measured": self._measured, "dropped": dict(self._dropped),
            "averages": self._averages.state_dict(),
            "layers": self._layers.state_dict() if len(self._layers) else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; records in memory from after that state are removed.

        Raises:
            ValueError: another version, or averages that do not fit.
        """
        check_version(state, _STATE_VERSION, "Diagnostics")
        records = self._all()
        self._averages.load_state_dict(state["averages"])
        self._layers.load_state_dict(state["layers"])
        self._last_step = state["last_step"]
        self._steps, self._measured = state["steps"], state["measured"]
        self._dropped = Counter(state["dropped"])
        while records and (self._last_step is None or records[-1].step > self._last_step):
            records.pop()
        if not records:
            self._before.load_state_dict(state["averages"])
