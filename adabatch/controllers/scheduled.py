"""Scheduled: an open-loop schedule in a controller's place."""

from __future__ import annotations

import math
from collections.abc import Callable

from adabatch._checks import choice, integer, returned
from adabatch.controllers.base import Controller
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import NO_INTERVAL
from adabatch.schedules import BSScheduler, RampBS, VirtualBatchSize, stepwise_ramp
from adabatch.schedules.base import described

UNITS = ("step", "epoch", "samples")


class Scheduled(Controller):
    """Proposes what a schedule says, whatever the gradients: nothing need be measured. Bounds,
    coupling, state and diagnostics are the scheduler's.

    A schedule of `adabatch.schedules` is built over `VirtualBatchSize(n)`, with None for its
    loader. It is stepped with `metrics=` the mean loss of the samples since its last step (losses
    that are not finite are skipped) and `samples=` their number. A function count -> batch size, or
    a ramp as a string, is called with the count itself.

    Args:
        schedule: a schedule over VirtualBatchSize; a ramp such as "0:64 100K:128"; or a function of
            the count, as `schedules.doubling_ramp` makes them.
        unit: what is counted: 'step' (optimizer steps), 'epoch' (epochs that have ended) or
            'samples' (samples seen).
        every: units to one step of the schedule; default 1. With unit='samples' it must be given,
            except for a RampBS, which counts the samples itself.

    Example:
        >>> from adabatch.schedules import StepBS
        >>> schedule = StepBS(None, step_size=1, batch_size_manager=VirtualBatchSize(64))
        >>> controller = Scheduled(schedule)
        >>> controller.on_step(samples=64, epoch=0)
        >>> controller.first_batch_size, controller.propose(None, loss=1.0, lr=0.1)
        (64, 128.0)
    """

    needs_moments = False

    def __init__(self, schedule: BSScheduler | str | Callable[[int], float], unit: str = "step",
                 every: int | None = None):
        self.unit = choice("unit", unit, UNITS)
        self.schedule = _checked(schedule)
        self.every = _checked_every(self.schedule, unit, every)
        self.counts = dict.fromkeys(UNITS, 0)
        self.steps_taken = self.latest = 0
        self.loss_sum, self.loss_samples, self.samples = 0.0, 0, 0
        kept = ("schedule",) if isinstance(self.schedule, BSScheduler) else ()
        self.state_attrs = (*kept, "counts", "steps_taken", "loss_sum", "loss_samples", "samples")

    @property
    def first_batch_size(self) -> float:
        if isinstance(self.schedule, BSScheduler):
            return self.schedule.batch_size
        return self.schedule(0)

    @property
    def finished(self) -> bool:
        """Whether the schedule will change nothing any more; False for a function."""
        return isinstance(self.schedule, BSScheduler) and self.schedule.finished

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.counts["step"] += 1
        self.counts["epoch"] = epoch
        self.counts["samples"] += samples
        self.latest = samples
        self.samples += samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        count = self.counts[self.unit]
        if not isinstance(self.schedule, BSScheduler):
            size = self.schedule(count // self.every)
            return float(size) if type(size) is int else returned(
                "the schedule", size, "the batch size, a number")
        if math.isfinite(loss):
            self.loss_sum += loss * self.latest
            self.loss_samples += self.latest
        due = count // self.every - self.steps_taken
        if due > 0:
            once = self.unit == "samples" and isinstance(self.schedule, RampBS)
            self._step(self.schedule, 1 if once else due)
            self.steps_taken += due
        return float(self.schedule.batch_size)

    def latest_interval(self) -> tuple[float, float]:
        return NO_INTERVAL

    def _step(self, schedule: BSScheduler, times: int) -> None:
        mean = self.loss_sum / self.loss_samples if self.loss_samples else math.nan
        for _ in range(times):
            schedule.step(metrics=mean, samples=self.samples)
            self.samples = 0
        self.loss_sum, self.loss_samples = 0.0, 0

    def __repr__(self) -> str:
        return f"Scheduled({described(self.schedule)}, unit={self.unit!r}, every={self.every})"


def _checked(schedule: object) -> BSScheduler | Callable[[int], float]:
    if isinstance(schedule, str):
        return stepwise_ramp(schedule)
    if isinstance(schedule, BSScheduler):
        manager, kind = schedule.batch_size_manager, type(schedule).__name__
        if not isinstance(manager, VirtualBatchSize):
            raise ValueError(f"the schedule writes to a loader ({type(manager).__name__}), which "
                             f"only the BatchSizeScheduler may: build it as {kind}(None, ..., "
                             f"batch_size_manager=VirtualBatchSize({schedule.batch_size}))")
        return schedule
    if not callable(schedule):
        raise TypeError("schedule must be a schedule over VirtualBatchSize, a ramp as a string, or "
                        f"a function of the count, got {schedule!r}")
    return schedule


def _checked_every(schedule: object, unit: str, every: int | None) -> int:
    by_samples, ramp = unit == "samples", isinstance(schedule, RampBS)
    if every is None and by_samples and isinstance(schedule, BSScheduler) and not ramp:
        kind = type(schedule).__name__
        raise ValueError(f"unit='samples' needs every=, the samples to one step of {kind}")
    every = 1 if every is None else integer("every", every, at_least=1)
    if by_samples and ramp and every != 1:
        raise ValueError(f"a RampBS counts the samples itself: omit every, got {every}")
    return every
