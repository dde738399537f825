"""The probe: leaf tensors that take no part in the model, but whose gradients are what the taps report.

Every leaf is persistent (one made inside a forward hook breaks torch.compile's fullgraph) and as long as the largest batch.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adabatch._engine import running_backward
from adabatch._transfers import to_device
from adabatch.grad_sample.rows import RowSampler

INITIAL_CAPACITY = 1024


class ProbeSet:
    """The probes of a model, one per device, made when first asked for.

    Args:
        n_rows, n_layers, capacity, dtype: of each probe.
        row_sampler: told of every device, so that its keys lie there too.
        on_complete: called in backward with a probe's reports, when all layers have reported to it.
    """

    def __init__(self, n_rows: int, n_layers: int, capacity: int, dtype: torch.dtype, row_sampler: RowSampler, on_complete: Callable[[Tensor], None]):
        self._make = functools.partial(Probe, n_rows, n_layers, capacity, dtype)
        self._n_rows, self._n_layers, self._capacity, self._dtype = n_rows, n_layers, capacity, dtype
        self._row_sampler, self._on_complete = row_sampler, on_complete
        self._probes: dict[torch.device, Probe] = {}

    def on(self, device: torch.device) -> Probe:
        """The device's probe."""
        if device not in self._probes:
            probe = self._probes[device] = self._make(device)
            self._row_sampler.reserve(self._capacity, device)
            for leaf in (probe.signal, probe.reports):
                leaf.register_post_accumulate_grad_hook(self._on_complete)
        return self._probes[device]

    def __iter__(self) -> Iterator[Probe]:
        return iter(self._probes.values())

    @property
    def home(self) -> torch.device:
        """The device on which results are gathered: that of the first probe."""
        return next(iter(self._probes))

    def to_result_device(self, values: Tensor) -> Tensor:
        """The values in the probes' type, where results are gathered."""
        at_home = values.dtype is self._dtype and len(self._probes) == 1
        return values if at_home else values.to(self.home, self._dtype)

    @property
    def reports(self) -> list[Tensor]:
        """The leaves that taps report to."""
        return [leaf for probe in self for leaf in (probe.signal, probe.reports)]

    def reserve_keys(self) -> None:
        """Make sure that the row sampler's keys lie on every device."""
        for device in self._probes:
            self._row_sampler.reserve(self._capacity, device)

    def drain(
        self, task: int, noted: list[Sequence[float]], n_samples: int | None = None
    ) -> tuple[list[Tensor | None], list[Sequence[float]] | Tensor, dict[str, Tensor]]:
        """Hand over one backward pass: row norms [s] or None per row, reports [n_layers, 2], second moments by name.

        Args:
            task: the pass.
            noted: what was reported outside compiled graphs, [n_layers, 2].
            n_samples: N; without it it is read from the reports of compiled graphs: on an accelerator that waits. With it they stay there, as a tensor.
        """
        norms: list[Tensor | None] = [None] * self._n_rows
        here = torch.device("cpu") if n_samples is None else self.home
        reports, moments = None, {}
        for probe in self._probes.values():
            rows, seen, second = probe.drain(task)
            moments.update(second)
            if seen is None:
                continue
            samples = self._row_sampler.samples
            length = rows_measured(seen, samples) if n_samples is None else min(n_samples, samples or n_samples)
            reports = seen.to(here) if reports is None else reports + seen.to(here)
            for index, row in enumerate(rows):
                if row is not None:
                    value = row[:length].to(self.home)
                    norms[index] = value if norms[index] is None else norms[index] + value
        if reports is not None:
            reports = reports + to_device(torch.tensor(noted, dtype=reports.dtype), here)
        return norms, noted if reports is None else reports if n_samples is not None else reports.tolist(), moments

    def forget(self) -> None:
        """Drop what a backward pass left."""
        for probe in self._probes.values():
            probe.drain(-1)

    def clear(self) -> None:
        """Give all leaves up."""
        self._probes.clear()


def rows_measured(reports: Tensor, samples: int | None) -> int:
    """The length of the probe rows in use: the batch size that the layers report, or the number of samples asked for."""
    n_samples = max((round(total / uses) for uses, total in reports.tolist() if uses > 0), default=0)
    return n_samples if samples is None else min(samples, n_samples)


class Probe:
    """Zero leaves that require grad, on one device.

    Args:
        n_rows: probe rows (one, or one per parameter group or parameter).
        n_layers: measured layers.
        capacity: the largest number of samples of a batch to be measured.
        dtype: float32, or float64 if any measured parameter is.

    After a backward pass, row k's gradient is Σ over the compiled layers that report to it of ‖contribution of sample i‖², and `reports` [n_layers, 2] has
    (uses, sum of the rows seen) per layer. Layers outside compiled graphs put these aside (BackwardRecorder); they give `signal` a gradient, of no meaning but that
    the pass is one that accumulates gradients.
    """

    def __init__(self, n_rows: int, n_layers: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._task_of: dict[int, int] = {}
        self.signal = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        self.reports = self._leaf(n_layers, 2)
        self.second_moments: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.capacity = max(INITIAL_CAPACITY, 1 << math.ceil(math.log2(capacity)))
        self.rows = [self._leaf(self.capacity) for _ in range(n_rows)]

    def _leaf(self, *shape: int) -> Tensor:
        return self._watched(torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True))

    def _watched(self, leaf: Tensor) -> Tensor:
        """The leaf, made to forget what a backward pass that failed half way left in it, and to remember which pass its gradient is from."""
        reference, task_of = weakref.ref(leaf), self._task_of

        def before_accumulation(grad: Tensor) -> None:
            reference().grad = None
            task_of[id(reference())] = running_backward()

        leaf.register_hook(before_accumulation)
        return leaf

    def check_room(self, n_samples: int) -> None:
        """Refuse a batch that has no room in a compiled graph; elsewhere norms do not lie in the probe.

        Raises:
            RuntimeError: a batch larger than the capacity.
        """
        if n_samples > self.capacity:
            raise RuntimeError(f"a batch is larger than the {self.capacity} samples this compiled model is prepared for: pass capacity= with the largest size")

    def row(self, index: int, length: int) -> Tensor:
        """The first `length` entries of a row, as an input of a compiled tap."""
        return self.rows[index][:length]

    def report(self, layer: int) -> Tensor:
        """What a tap reports to: the layer's line of the reports; in eager mode the signal, for then the report itself goes to the stash."""
        return self.reports[layer] if torch.compiler.is_compiling() else self.signal

    def second_moment(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A leaf without memory of its own (stride 0) whose gradient is the parameter's second moment, or, with shape (), its weighed sum."""
        key = (name, tuple(shape))
        if key not in self.second_moments:
            leaf = torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
            self.second_moments[key] = self._watched(leaf.requires_grad_())
        return self.second_moments[key]

    def drain(self, task: int) -> tuple[list[Tensor | None], Tensor | None, dict[str, Tensor]]:
        """Hand over the gradients of one backward pass (row norms, reports, second moments) and clear them, with what other passes left."""
        self.signal.grad = None
        if not self._task_of:
            return [], None, {}
        rows = [self._take(leaf, task) for leaf in self.rows]
        moments = [(name, self._take(leaf, task)) for (name, _), leaf in self.second_moments.items()]
        reports = self._take(self.reports, task)
        self._task_of.clear()
        return rows, reports, {name: moment for name, moment in moments if moment is not None}

    def _take(self, leaf: Tensor, task: int) -> Tensor | None:
        grad, leaf.grad = leaf.grad, None
        return grad if self._task_of.get(id(leaf)) == task else None
