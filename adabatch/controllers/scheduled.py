"""Scheduled: an open-loop schedule in a controller's place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from adabatch._checks import check_controller
from adabatch.estimators.moments import GradientMoments
from adabatch.schedules import BSScheduler, RampBS, VirtualBatchSize, stepwise_ramp
from adabatch.schedules.arguments import choice, integer

UNITS = ("step", "epoch", "samples")


class Scheduled:
    """Wishes what a schedule says, whatever the gradients: nothing need be measured, and the proposal has no error and no interval. Bounds, lr coupling, state
    and diagnostics are the scheduler's.

    A schedule of `adabatch.schedules` is built over a size that is only remembered, `VirtualBatchSize(n)`, whose loader is None. It is stepped with
    `metrics=` the mean loss of the samples since it was last stepped (NaN and infinite losses left out) and `samples=` their number.

    A function count -> batch size, or a ramp as a string, is asked with the count itself.

    Args:
        schedule: a schedule over VirtualBatchSize; a ramp such as "0:64 100K:128"; or a function of the count, as `schedules.doubling_ramp` makes them.
        unit: what is counted: 'step' (optimizer steps), 'epoch' (epochs that have ended) or 'samples' (samples seen).
        every: units to one step of the schedule; default 1. With unit='samples' it must be given, except for a RampBS, which is told the samples themselves.

    Raises:
        TypeError: no schedule, string or function; every is no integer.
        ValueError: a schedule over a loader, which only the BatchSizeScheduler may write to; an unknown unit; every missing, below 1, or out of place.

    Example:
        >>> from adabatch.schedules import StepBS
        >>> controller = Scheduled(StepBS(None, step_size=2, batch_size_manager=VirtualBatchSize(64)))
        >>> controller.first_batch_size
        64
        >>> for _ in range(4):
        ...     controller.advance(samples=64, epoch=0)
        ...     print(controller.propose(None, loss=1.0, lr=0.1))
        64.0
        128.0
        128.0
        256.0
    """

    needs_moments = False
    version = 1

    def __init__(self, schedule: BSScheduler | str | Callable[[int], float], unit: str = "step", every: int | None = None):
        self.unit = choice("unit", unit, UNITS)
        self.schedule = _checked(schedule)
        self.every = _checked_interval(self.schedule, unit, every)
        self._counts = dict.fromkeys(UNITS, 0)
        self._steps_taken = 0
        self._loss_sum, self._loss_samples, self._samples, self._latest = 0.0, 0, 0, 0

    @property
    def first_batch_size(self) -> float:
        """The size to start with, in samples: the schedule's own, or the function's at the count 0."""
        return self.schedule.batch_size if isinstance(self.schedule, BSScheduler) else self.schedule(0)

    @property
    def finished(self) -> bool:
        """Whether the schedule will change nothing any more; a function never says so."""
        return isinstance(self.schedule, BSScheduler) and self.schedule.finished

    def advance(self, *, samples: int, epoch: int) -> None:
        """Called by the scheduler at every step, before propose.

        Args:
            samples: of the batch just stepped.
            epoch: how many epochs have ended.
        """
        self._counts["step"] += 1
        self._counts["epoch"] = epoch
        self._counts["samples"] += samples
        self._latest = samples
        self._samples += samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The size of the schedule at the present count, in samples."""
        count = self._counts[self.unit]
        if not isinstance(self.schedule, BSScheduler):
            return float(self.schedule(count // self.every))
        if math.isfinite(loss):
            self._loss_sum += loss * self._latest
            self._loss_samples += self._latest
        due = count // self.every - self._steps_taken
        if due > 0:
            self._step(1 if self.unit == "samples" and isinstance(self.schedule, RampBS) else due)
            self._steps_taken += due
        return float(self.schedule.batch_size)

    def _step(self, times: int) -> None:
        mean = self._loss_sum / self._loss_samples if self._loss_samples else math.nan
        for _ in range(times):
            self.schedule.step(metrics=mean, samples=self._samples)
            self._samples = 0
        self._loss_sum, self._loss_samples = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the schedule's own state."""
        schedule = self.schedule.state_dict() if isinstance(self.schedule, BSScheduler) else None
        pending = [self._loss_sum, self._loss_samples, self._samples]
        counted = {"counts": dict(self._counts), "steps_taken": self._steps_taken, "pending": pending}
        return {"version": self.version, "controller": type(self).__name__, **counted, "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version, or the state of another controller or schedule.
        """
        check_controller(state, self.version, type(self).__name__)
        if "schedule" not in state:
            raise ValueError(f"the state of {type(self).__name__} lacks ['schedule']: pass what state_dict() of such a controller returned")
        if isinstance(self.schedule, BSScheduler) != (state["schedule"] is not None):
            raise ValueError("the state is of a function where this is a schedule, or the other way round: build the controller that was saved")
        if isinstance(self.schedule, BSScheduler):
            self.schedule.load_state_dict(state["schedule"])
        self._counts = dict(state["counts"])
        self._steps_taken = state["steps_taken"]
        self._loss_sum, self._loss_samples, self._samples = state["pending"]

    def __repr__(self) -> str:
        name = type(self.schedule).__name__ if isinstance(self.schedule, BSScheduler) else getattr(self.schedule, "__name__", "a function")
        return f"Scheduled({name}, unit={self.unit!r}, every={self.every})"


def _checked(schedule: Any) -> BSScheduler | Callable[[int], float]:
    if isinstance(schedule, str):
        return stepwise_ramp(schedule)
    if isinstance(schedule, BSScheduler):
        if not isinstance(schedule.batch_size_manager, VirtualBatchSize):
            kind, manager = type(schedule).__name__, type(schedule.batch_size_manager).__name__
            raise ValueError(
                f"the schedule writes to a loader ({manager}), which only the BatchSizeScheduler may: build it over a size that is only remembered, "
                f"{kind}(None, ..., batch_size_manager=VirtualBatchSize({schedule.batch_size}))"
            )
        return schedule
    if not callable(schedule):
        raise TypeError(f"schedule must be a schedule over VirtualBatchSize, a ramp as a string, or a function of the count, got {schedule!r}")
    return schedule


def _checked_interval(schedule: Any, unit: str, every: int | None) -> int:
    if every is not None:
        every = integer("every", every, at_least=1)
        if unit == "samples" and isinstance(schedule, RampBS) and every != 1:
            raise ValueError(f"a RampBS is told the samples themselves: leave out every, got {every}")
        return every
    if unit == "samples" and isinstance(schedule, BSScheduler) and not isinstance(schedule, RampBS):
        raise ValueError(f"unit='samples' needs every=, the samples to one step of {type(schedule).__name__}")
    return 1
