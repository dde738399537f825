"""What a step leaves behind for the decision on the next size, and the queue in which it waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adabatch._transfers import HostCopies
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import PendingMoments


@dataclass
class StepRecord:
    """All that must be taken while the step is at hand. Later stages may replace `loss` and
    `moments`.

    Attributes:
        step: number of the step.
        loss: pooled over the micro-batches, a number or a scalar tensor; the sum over the samples
            for loss_reduction="sum".
        moments: of the step, None where nothing was measured.
        delivered: samples the loader delivered for the step; 0 if that is not known.
        batch_size: the size in force, in samples.
        lrs: effective lr of each param group.
        base_lr: the lr of the last optimizer step without any factor; None before one.
        epoch: how many epochs have ended.
        seconds: since the step before; NaN for the first one.
        pending: the moments while their numbers are on their way; None once settled.
        copies: of the loss, under way.

    Example:
        >>> seen = StepRecord(0, 0.5, None, delivered=0, batch_size=16, lrs=[0.1], base_lr=None,
        ...                   epoch=0, seconds=0.01)
        >>> seen.settle()
        >>> seen.measured, seen.samples
        (False, 16)
    """

    step: int
    loss: Tensor | float
    moments: GradientMoments | None
    delivered: int
    batch_size: int
    lrs: list[float]
    base_lr: float | None
    epoch: int
    seconds: float
    pending: PendingMoments | None = None
    copies: HostCopies | None = None

    def settle(self) -> None:
        """Turn loss and moments into numbers; where they are on their way from an accelerator, this
        waits for them."""
        if self.copies is not None:
            self.copies.wait()
            self.copies = None
        self.loss = float(self.loss)
        if self.pending is not None:
            self.moments, self.pending = self.pending.moments(), None

    @property
    def measured(self) -> bool:
        """Whether the step was measured."""
        return self.moments is not None or self.pending is not None

    @property
    def samples(self) -> int:
        """Samples of the step: those the layers saw, else those delivered, else those requested."""
        seen = self.moments
        return self.delivered or self.batch_size if seen is None else seen.batch_size


class Stage(Protocol):
    """One station of the pipeline."""

    def start(self, record: StepRecord) -> bool:
        """The record arrives. True: it waits here for the next step; False: it continues at once,
        without finish()."""

    def finish(self, record: StepRecord) -> None:
        """The step after: what was started is done, or is waited for now."""

    def remove(self) -> None:
        """Undo what the stage did to the model."""


class HostTransferStage:
    """The first stage: the numbers of a step on an accelerator arrive on the host while the next
    step runs; others are there at once.

    Example:
        >>> seen = StepRecord(0, 0.5, None, delivered=0, batch_size=16, lrs=[0.1], base_lr=None,
        ...                   epoch=0, seconds=0.01)
        >>> HostTransferStage().start(seen)
        False
    """

    def start(self, record: StepRecord) -> bool:
        """Begin the copies; whether they are to be waited for."""
        if isinstance(record.loss, Tensor):
            record.copies = HostCopies()
            record.loss = record.copies.add(record.loss)
            if record.copies.under_way:
                return True
        if record.pending is not None and record.pending.lags:
            return True
        record.settle()
        return False

    def finish(self, record: StepRecord) -> None:
        """Read them."""
        record.settle()

    def remove(self) -> None:
        """Nothing was done to the model."""


class Pipeline:
    """The stages that a record passes before it is decided on, in the order of the steps.

    Args:
        stages: may be appended to before the first step.

    Example:
        >>> class Wait:
        ...     def start(self, record):
        ...         return True
        ...     def finish(self, record):
        ...         pass
        >>> pipeline = Pipeline([Wait()])
        >>> [list(pipeline.push(name)) for name in ("first", "second")], list(pipeline.flush())
        ([[], ['first']], ['second'])
    """

    def __init__(self, stages: list[Stage] | None = None):
        self.stages: list[Stage] = [] if stages is None else stages
        self._waiting: list[tuple[StepRecord, int]] = []  # with the stage of each, oldest first

    def push(self, record: StepRecord) -> Iterator[StepRecord]:
        """Take this step's record; those that have reached the end, oldest first."""
        self._advance()
        self._enter(record, 0)
        return self._finished()

    def flush(self) -> Iterator[StepRecord]:
        """Wait for all that are under way."""
        while self._waiting:
            yield from self._finished()
            self._advance()

    def clear(self) -> None:
        """Drop all that are under way."""
        self._waiting.clear()

    def _advance(self) -> None:
        waiting, self._waiting = self._waiting, []
        for record, at in waiting:
            if at < len(self.stages):
                self.stages[at].finish(record)
            self._enter(record, at + 1)

    def _enter(self, record: StepRecord, at: int) -> None:
        while at < len(self.stages) and not self.stages[at].start(record):
            at += 1
        self._waiting.append((record, at))

    def _finished(self) -> Iterator[StepRecord]:
        while self._waiting and self._waiting[0][1] >= len(self.stages):
            yield self._waiting.pop(0)[0]
