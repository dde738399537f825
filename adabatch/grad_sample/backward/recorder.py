"""What taps report while a backward pass runs, kept for its end.

In eager mode to the BackwardRecorder: autograd carries only a signal to a leaf, which says that the
pass accumulates gradients. In a compiled graph autograd adds the reports up in a Probe's leaves.

Legend: N samples in the batch, S rows measured, K probe rows (one, or one for each parameter group
or parameter).
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch.estimators.gradients import running_backward
from adabatch._transfers import is_remote, to_device
from adabatch.grad_sample.backward.verify import GradientSumCheck
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.factors.merge import merge_factors
from adabatch.grad_sample.rows import RowSampler
from adabatch.interfaces import Statistic

INITIAL_CAPACITY = 1024
Report = Sequence[float]  # (calls, samples of all calls together) of a layer
Rows = list["Tensor | None"]  # [K]

# -- eager mode


@functools.lru_cache(maxsize=64)
def _zero(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), device=device, dtype=dtype)


def signal_gradient(signal: Tensor) -> Tensor:
    """The gradient that the first tap of a pass gives the signal; its value is unused."""
    return _zero(signal.device, signal.dtype)


@dataclass
class ParameterUse:
    """One use of a parameter in a backward pass: its name, and its factor over measured rows."""

    parameter: str
    factor: Factor


@dataclass
class BackwardRecord:
    """What the taps of one backward pass reported.

    Attributes:
        uses: of parameters, to be finished when all of them are known.
        rows: {per-sample statistic: {probe row: values [S] of the layers that report to it}}.
        norms: {probe row: norms [S] that are still to be squared}.
        values: {other statistic: {parameter: value}}.
        counts: {layer: [calls, samples of all calls together]}.
        unequal: layers whose calls had different numbers of samples.
        noted: parameters whose values operations have reported.
    """

    uses: list[ParameterUse] = field(default_factory=list)
    rows: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)
    unequal: set[int] = field(default_factory=set)
    noted: set[str] = field(default_factory=set)

    def add_rows(self, totals: dict[str, Rows], n_rows: int,
                 to_result_device: Callable[[Tensor], Tensor]) -> None:
        """Add what was recorded to {statistic: [K rows]}."""
        for row, norms in self.norms.items():
            values = [to_result_device(value) for value in norms]
            whole = torch.linalg.vector_norm(torch.stack(values), dim=0)
            add_to_row(totals, "sq_norms", n_rows, row, whole * whole)
        for name, rows in self.rows.items():
            for row, recorded in rows.items():
                values = [to_result_device(value) for value in recorded]
                whole = values[0] if len(values) == 1 else torch.stack(values).sum(0)
                add_to_row(totals, name, n_rows, row, whole)

    def reports(self, n_layers: int) -> list[Report]:
        """(calls, samples) of each layer."""
        return [self.counts.get(index, (0, 0)) for index in range(n_layers)]

    def merged(self) -> dict[str, tuple[Factor, int]]:
        """{parameter: (one factor for all its uses, their number)} of the deferred uses."""
        grouped: dict[str, list[Factor]] = {}
        for use in self.uses:
            grouped.setdefault(use.parameter, []).append(use.factor)
        return {name: (merge_factors(factors), len(factors)) for name, factors in grouped.items()}


def add_to_row(totals: dict[str, Rows], name: str, n_rows: int, row: int, value: Tensor) -> None:
    """Add a value [S] to a probe row of a statistic."""
    rows = totals.setdefault(name, [None] * n_rows)
    present = rows[row]
    rows[row] = value if present is None else present + value


class BackwardRecorder:
    """The record of the backward pass that runs.

    Attributes:
        defers: whether a statistic needs the finished gradient, so that all factors are kept.
        fuses, fuses_subset: whether layers may compute both gradients at once, with all samples
            measured or some.
        discards: the pass that runs is not measured, and layers are not run again.
        sum_check: compares the sum of the contributions with the gradient.
        norm_weights: {parameter: the factor by which its norms count here} of a model that several
            processes hold in parts; None of one that is whole.
    """

    def __init__(self, statistics: Sequence[Statistic], parameters: Mapping[str, Tensor]):
        self._record, self._task = BackwardRecord(), -1
        self._lock = threading.Lock()
        self.sum_check = GradientSumCheck(parameters)
        self.discards = False
        self.norm_weights: Mapping[str, float] | None = None
        self.defers = any(each.needs_gradient for each in statistics)
        self.statistics = tuple(each for each in statistics if not each.needs_gradient)
        self.fuses = all(each.can_fuse for each in self.statistics)
        self.needs_second_moment = any(each.needs_second_moment for each in self.statistics)
        self.fuses_subset = self.fuses and not self.needs_second_moment

    def _now(self) -> BackwardRecord:
        task = running_backward()
        if task != self._task:  # what another pass left is not wanted: it failed, or was partial
            self._record, self._task = BackwardRecord(), task
        return self._record

    def defer(self, uses: list[ParameterUse]) -> None:
        """Keep uses under the running backward pass."""
        with self._lock:  # the engine runs one thread per device
            self._now().uses.extend(uses)

    def note(self, parameters: Iterable[str]) -> None:
        """Operations have reported these parameters' values."""
        with self._lock:
            self._now().noted.update(parameters)

    def record_call(
        self, layer: int, n_samples: int, norms: Iterable[tuple[int, Tensor]] = ()
    ) -> bool:
        """A call of the layer with N samples; whether it is the first report of the pass. `norms`:
        (probe row, norms [S]), squared for all layers together: fewer kinds of operations, each of
        which costs far more the first time in a step than it does again."""
        with self._lock:
            record = self._now()
            is_first = not record.counts
            count = record.counts.setdefault(layer, [0, 0])
            if count[1] != count[0] * n_samples:
                record.unequal.add(layer)
            count[0] += 1
            count[1] += n_samples
            for row, value in norms:
                record.norms.setdefault(row, []).append(value)
            return is_first

    def add(self, statistic: str, row: int, value: Tensor) -> None:
        """Values [S] of a layer, for a probe row of a per-sample statistic."""
        with self._lock:
            rows = self._now().rows.setdefault(statistic, {})
            rows.setdefault(row, []).append(value)

    def put(self, statistic: str, parameter: str, value: Tensor | None) -> None:
        """The value of another statistic, of a parameter with a single use in the pass."""
        if value is not None:
            with self._lock:
                self._now().values.setdefault(statistic, {})[parameter] = value

    def clear(self) -> None:
        """Drop the record."""
        self._record, self._task = BackwardRecord(), -1
        self.sum_check.running = False

    def drain(self, task: int) -> BackwardRecord:
        """The record of that backward pass, which has ended, without what a failed one left."""
        with self._lock:
            record = self._record if self._task == task else BackwardRecord()
            self.clear()
        return record


# -- compiled graphs


class Probe:
    """Zero leaves that require grad, on one device, whose gradients are what compiled taps report:
    row k's is Σ over its layers of ‖G_n‖², that of `reports` [n_layers, 2] (calls, samples), that
    of `sums` what GradientSumCheck.observe_compiled() reads.

    Every leaf is persistent (one made inside a forward hook breaks fullgraph) and as long as the
    largest batch, `capacity`.
    """

    def __init__(
        self, n_rows: int, n_layers: int, sums: int, capacity: int, dtype: torch.dtype,
        device: torch.device,
    ):
        self.dtype, self.device = dtype, device
        self._task_of: dict[int, int] = {}
        self.signal = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        self.reports, self.sums = self._leaf(n_layers, 2), self._leaf(n_layers, sums)
        self._values: dict[tuple[str, str], Tensor] = {}
        self.capacity = max(INITIAL_CAPACITY, 1 << math.ceil(math.log2(capacity)))
        self._rows = [self._leaf(self.capacity) for _ in range(n_rows)]

    def _leaf(self, *shape: int) -> Tensor:
        leaf = torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
        return self._watched(leaf)

    def _watched(self, leaf: Tensor) -> Tensor:
        """The leaf, which forgets what a failed pass left in it and knows whose its gradient is."""
        reference, task_of = weakref.ref(leaf), self._task_of

        def before_accumulation(grad: Tensor) -> None:
            held = reference()
            if held is not None:
                held.grad = None
                task_of[id(held)] = running_backward()

        leaf.register_hook(before_accumulation)
        return leaf

    def check_room(self, n_samples: int) -> None:
        """Raise a RuntimeError for a batch larger than the capacity."""
        if n_samples > self.capacity:
            raise RuntimeError(
                f"a batch is larger than the {self.capacity} samples this compiled model is "
                "prepared for: pass capacity= with the largest size"
            )

    def report(self, layer: int) -> Tensor:
        """What a tap reports to: its line of the reports; in eager mode the signal."""
        return self.reports[layer] if torch.compiler.is_compiling() else self.signal

    def row(self, index: int, length: int) -> Tensor:
        """The first `length` entries of a row."""
        return self._rows[index][:length]

    def value(self, statistic: str, parameter: str, shape: tuple[int, ...]) -> Tensor:
        """The leaf, without memory of its own (stride 0), for a statistic of a parameter."""
        key = (statistic, parameter)
        if key not in self._values:
            leaf = torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
            self._values[key] = self._watched(leaf.requires_grad_())
        return self._values[key]

    def drain(
        self, task: int
    ) -> tuple[Rows, Tensor | None, Tensor | None, dict[tuple[str, str], Tensor]]:
        """Hand over one pass's gradients of rows, reports, sums and values, and clear all."""
        self.signal.grad = None
        if not self._task_of:
            return [], None, None, {}
        rows = [self._take(leaf, task) for leaf in self._rows]
        taken = {key: self._take(leaf, task) for key, leaf in self._values.items()}
        reports, sums = self._take(self.reports, task), self._take(self.sums, task)
        self._task_of.clear()
        values = {key: value for key, value in taken.items() if value is not None}
        return rows, reports, sums, values

    def _take(self, leaf: Tensor, task: int) -> Tensor | None:
        grad, leaf.grad = leaf.grad, None
        return grad if self._task_of.get(id(leaf)) == task else None


class ProbeSet:
    """The probes of a model, one per device, made when first requested.

    Args:
        row_sampler: its keys are kept on every device.
        on_complete: called in backward when all layers have reported to a probe.

    Attributes:
        remote: whether reading results makes the host wait for an accelerator.
    """

    def __init__(
        self, n_rows: int, n_layers: int, sums: int, capacity: int, dtype: torch.dtype,
        row_sampler: RowSampler, on_complete: Callable[[Tensor], None],
    ):
        self._make = functools.partial(Probe, n_rows, n_layers, sums, capacity, dtype)
        self.n_rows, self._capacity, self._dtype = n_rows, capacity, dtype
        self._row_sampler, self._on_complete = row_sampler, on_complete
        self._probes: dict[torch.device, Probe] = {}
        self.remote = False

    def on(self, device: torch.device) -> Probe:
        """The device's probe."""
        if device not in self._probes:
            probe = self._probes[device] = self._make(device)
            self.remote |= is_remote(device)
            self._row_sampler.reserve(self._capacity, device)
            for leaf in (probe.signal, probe.reports):
                leaf.register_post_accumulate_grad_hook(self._on_complete)
        return self._probes[device]

    def __iter__(self) -> Iterator[Probe]:
        return iter(self._probes.values())

    @property
    def result_device(self) -> torch.device:
        """Where results are gathered: the device of the first probe."""
        return next(iter(self._probes))

    def to_result_device(self, values: Tensor) -> Tensor:
        """The values in the probes' type, where results are gathered."""
        there = values.dtype is self._dtype and len(self._probes) == 1
        return values if there else values.to(self.result_device, self._dtype)

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that taps report to."""
        return [leaf for probe in self for leaf in (probe.signal, probe.reports)]

    def reserve_keys(self) -> None:
        """Make sure that the row sampler's keys lie on every device."""
        for device in self._probes:
            self._row_sampler.reserve(self._capacity, device)

    def drain(
        self, task: int, recorded: list[Report], n_samples: int | None = None
    ) -> tuple[dict[str, Rows], list[Report] | Tensor, list[Tensor | None],
               dict[tuple[str, str], Tensor]]:
        """Hand over a pass: rows, reports [n_layers, 2] with those `recorded` outside compiled
        graphs, sums (one for each device that has compiled layers) and values of compiled graphs.
        Without n_samples N is read from the reports, which on an accelerator waits; with it they
        stay there, as a tensor."""
        totals: dict[str, Rows] = {}
        here = torch.device("cpu") if n_samples is None else self.result_device
        reports: Tensor | None = None
        all_sums: list[Tensor | None] = []
        values: dict[tuple[str, str], Tensor] = {}
        for probe in self._probes.values():
            rows, seen, sums, leaves = probe.drain(task)
            values.update(leaves)
            if seen is None:
                continue
            all_sums.append(sums)
            samples = self._row_sampler.samples
            length = (rows_measured(seen, samples) if n_samples is None
                      else min(n_samples, samples or n_samples))
            reports = seen.to(here) if reports is None else reports + seen.to(here)
            for index, row in enumerate(rows):
                if row is not None:
                    value = row[:length].to(self.result_device)
                    add_to_row(totals, "sq_norms", self.n_rows, index, value)
        if reports is None:
            return totals, recorded, [], values
        reports = reports + to_device(torch.tensor(recorded, dtype=reports.dtype), here)
        settled = reports if n_samples is not None else reports.tolist()
        return totals, settled, all_sums, values

    def forget(self) -> None:
        """Drop what a backward pass left."""
        for probe in self._probes.values():
            probe.drain(-1)

    def clear(self) -> None:
        """Release all leaves."""
        self._probes.clear()


def rows_measured(reports: Tensor, samples: int | None) -> int:
    """The length of the probe rows in use, from the layers' reports."""
    sizes = (round(total / calls) for calls, total in reports.tolist() if calls > 0)
    n_samples = max(sizes, default=0)
    return n_samples if samples is None else min(samples, n_samples)
