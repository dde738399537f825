"""What a step leaves behind for the decision on the next size, and the line in which it waits for its decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adabatch._transfers import HostCopies
from adabatch.scheduler.arguments import scalar_loss


@dataclass
class StepRecord:
    """All that must be taken while the step is at hand. Later stages may replace `loss` and `moments`.

    Attributes:
        step: number of the step.
        loss: as it was pooled over the micro-batches, a number or a scalar tensor; the sum over the samples for loss_reduction='sum'.
        moments: of the step, at once or as something with a moments() that works them out; None where nothing was measured.
        delivered: samples the loader delivered for the step; 0 if that is not known.
        batch_size: the size in force, in samples.
        lrs: effective lr of each param group.
        base_lr: the lr of the last optimizer step without any factor; None before one.
        epoch: how many epochs have ended.
        seconds: since the step before; NaN for the first one.
        copies: of the loss, under way.

    Example:
        >>> seen = StepRecord(step=0, loss=0.5, moments=None, delivered=0, batch_size=16, lrs=[0.1], base_lr=None, epoch=0, seconds=0.01)
        >>> seen.settle()
        >>> seen.measured, seen.samples
        (False, 16)
    """

    step: int
    loss: Tensor | float
    moments: Any
    delivered: int
    batch_size: int
    lrs: list[float]
    base_lr: float | None
    epoch: int
    seconds: float
    copies: HostCopies | None = None

    def settle(self) -> None:
        """Turn loss and moments into numbers; where they are on their way from an accelerator, this waits for them."""
        if self.copies is not None:
            self.copies.wait()
            self.copies = None
        self.loss = scalar_loss(self.loss)
        if hasattr(self.moments, "moments"):
            self.moments = self.moments.moments()

    @property
    def measured(self) -> bool:
        """Whether the step was measured."""
        return self.moments is not None

    @property
    def samples(self) -> int:
        """Samples of the step: those the layers saw, or else those delivered, or else those asked for."""
        return self.delivered or self.batch_size if self.moments is None else self.moments.batch_size


class HostTransferStage:
    """The pipeline's first stage: the numbers of a step on an accelerator arrive on the host while the next step runs; others are there at once.

    Example:
        >>> seen = StepRecord(step=0, loss=0.5, moments=None, delivered=0, batch_size=16, lrs=[0.1], base_lr=None, epoch=0, seconds=0.01)
        >>> HostTransferStage().start(seen)
        False
    """

    def start(self, observation: StepRecord) -> bool:
        """Begin the copies; whether they are to be waited for."""
        copies = observation.copies = HostCopies()
        observation.loss = copies.add(observation.loss)
        if copies.under_way or getattr(observation.moments, "lags", False):
            return True
        observation.settle()
        return False

    def finish(self, observation: StepRecord) -> None:
        """Read them."""
        observation.settle()


class Stage(Protocol):
    """One station of the pipeline."""

    def start(self, observation: StepRecord) -> bool:
        """The observation arrives. True: it waits here for the next step; False: it goes on at once, without finish()."""

    def finish(self, observation: StepRecord) -> None:
        """The step after: what was started is done, or is waited for now."""


class Pipeline:
    """The stages that an observation passes before it is decided on, in the order of the steps. Without stages it is decided at once.

    Args:
        stages: may be appended to before the first step.

    Example:
        >>> class Wait:
        ...     def start(self, observation):
        ...         return True
        ...     def finish(self, observation):
        ...         pass
        >>> pipeline = Pipeline([Wait()])
        >>> [list(pipeline.push(name)) for name in ("first", "second")], list(pipeline.flush())
        ([[], ['first']], ['second'])
    """

    def __init__(self, stages: list[Stage] | None = None):
        self.stages: list[Stage] = [] if stages is None else stages
        self._waiting: list[tuple[Any, int]] = []  # with the stage at which each waits, oldest first

    def push(self, observation: Any) -> Iterator[Any]:
        """Take this step's observation; those that have come to the end, oldest first."""
        self._advance()
        self._enter(observation, 0)
        return self._finished()

    def flush(self) -> Iterator[Any]:
        """Wait for all that are under way."""
        while self._waiting:
            yield from self._finished()
            self._advance()

    def clear(self) -> None:
        """Drop all that are under way."""
        self._waiting.clear()

    def _advance(self) -> None:
        waiting, self._waiting = self._waiting, []
        for observation, at in waiting:
            if at < len(self.stages):
                self.stages[at].finish(observation)
            self._enter(observation, at + 1)

    def _enter(self, observation: Any, at: int) -> None:
        while at < len(self.stages) and not self.stages[at].start(observation):
            at += 1
        self._waiting.append((observation, at))

    def _finished(self) -> Iterator[Any]:
        while self._waiting and self._waiting[0][1] >= len(self.stages):
            yield self._waiting.pop(0)[0]
