"""What taps put aside while a backward pass runs, for the end of it.

In eager mode a tap reports here: autograd carries only a signal to a leaf, which tells that the pass is one that accumulates gradients. Inside a compiled
graph, where nothing can be put aside, autograd adds the reports up in the probe's leaves.

Legend: N samples in the batch, S rows measured.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adabatch._engine import running_backward
from adabatch.grad_sample.backward.verify import GradientSumCheck
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.statistics.preconditioned import SecondMoments


@functools.lru_cache(maxsize=64)
def _signal_gradient(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), device=device, dtype=dtype)


def signal_gradient(signal: Tensor) -> Tensor:
    """What the first tap of a backward pass gives the signal as its gradient: of no meaning but that the pass is one that accumulates gradients.

    Example:
        >>> signal_gradient(torch.zeros((), requires_grad=True))
        tensor(0.)
    """
    return _signal_gradient(signal.device, signal.dtype)


@dataclass
class ParameterUse:
    """One use of a parameter in a backward pass, kept until the pass ends: the parameter's name in the model and its factor over the measured rows."""

    parameter: str
    factor: Factor


@dataclass
class BackwardRecord:
    """What the taps of one backward pass put aside.

    Attributes:
        uses: of parameters that can only be finished when all their uses are known.
        norms: {probe row: squared norms [S] of the layers that report to it}.
        roots: the same, norms not squared yet.
        counts: {layer: [uses, samples of all uses together]}.
    """

    uses: list[ParameterUse] = field(default_factory=list)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    roots: dict[int, list[Tensor]] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)

    def add_norms(self, norms: list[Tensor | None], to_result_device: Callable[[Tensor], Tensor]) -> None:
        """Add what was noted of each probe row to its squared norms."""
        wholes = []
        for row, noted in self.roots.items():
            whole = torch.linalg.vector_norm(torch.stack([to_result_device(value) for value in noted]), dim=0)
            wholes.append((row, whole * whole))  # squaring by square() would be one more kind of operation
        for row, noted in self.norms.items():
            values = [to_result_device(value) for value in noted]
            wholes.append((row, values[0] if len(values) == 1 else torch.stack(values).sum(0)))
        for row, whole in wholes:
            norms[row] = whole if norms[row] is None else norms[row] + whole

    def reports(self, n_layers: int) -> list[Sequence[float]]:
        """(uses, samples) of each layer."""
        return [self.counts.get(index, (0, 0)) for index in range(n_layers)]


class BackwardRecorder:
    """The notes of the backward pass that runs.

    Attributes:
        witness: hears of every use until a first pass could be compared with the gradient; None afterwards.
        second_moments: what the taps report of Σ g_i²; None for nothing.
        shares: {parameter: the factor by which its norms count here} of a model that several processes hold in parts; None of one that is whole.
    """

    def __init__(self):
        self._notes, self._task = BackwardRecord(), -1
        self._lock = threading.Lock()
        self.witness: GradientSumCheck | None = None
        self.second_moments: SecondMoments | None = None
        self.shares: dict[str, float] | None = None

    def _now(self) -> BackwardRecord:
        task = running_backward()
        if task != self._task:  # what is left of another pass is never asked for: it failed, or was not a backward() to the leaves
            self._notes, self._task = BackwardRecord(), task
        return self._notes

    def add(self, uses: list[ParameterUse]) -> None:
        """Keep uses under the running backward pass."""
        with self._lock:  # the engine runs one thread per device
            self._now().uses.extend(uses)

    def report(self, layer: int, n_samples: int, roots: Iterable[tuple[int, Tensor]] = ()) -> bool:
        """A use of the layer that many samples passed; whether it is the first of the pass.

        Args:
            layer, n_samples: the use.
            roots: (probe row, norms [S] of the layer that are still to be squared): squaring and adding them up for all layers at once takes fewer kinds of
                operations, each of which costs far more the first time in a step than it does again.
        """
        with self._lock:
            notes = self._now()
            is_first = not notes.counts
            count = notes.counts.setdefault(layer, [0, 0])
            count[0] += 1
            count[1] += n_samples
            for row, norms in roots:
                notes.roots.setdefault(row, []).append(norms)
            return is_first

    def add_norms(self, row: int, sq_norms: Tensor) -> None:
        """Squared norms [S] of a layer, for that probe row."""
        with self._lock:
            self._now().norms.setdefault(row, []).append(sq_norms)

    def clear(self) -> None:
        """Drop all notes."""
        self._notes, self._task = BackwardRecord(), -1

    def drain(self, task: int) -> BackwardRecord:
        """The notes of that backward pass, which has ended; what a failed pass left behind is dropped.

        Raises:
            RuntimeError: the first pass's contributions do not add up to the gradient.
        """
        with self._lock:
            notes = self._notes if self._task == task else BackwardRecord()
            self.clear()
        if self.witness is not None and self.witness.compare(task):
            self.witness = None
        return notes
