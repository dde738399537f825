"""Goodput: the batch size with the most statistical progress a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple
from statistics import median
from typing import Any

import numpy as np

from adabatch.controllers.base import Controller, check_positive
from adabatch.controllers.throughput import StepTime, fit_step_time
from adabatch.estimators.averages import MovingAverage, student_quantile
from adabatch.estimators.intervals import NO_INTERVAL, JointAverages, fieller, trace_and_signal
from adabatch.estimators.moments import GradientMoments

KEPT_TIMES, TIMES_OF_A_SIZE = 992, 31  # of steps, the latest ones
REFIT = 20  # steps between two decisions
GRID = 512  # sizes tried, evenly spaced on a log scale


def efficiency(batch_size: float, base_batch_size: float, noise_scale: float) -> float:
    """(φ + B₀)/(φ + B): progress of a sample in a batch of B, relative to one in a batch of B₀; 1 for an infinite noise scale φ.

    Example:
        >>> efficiency(64, 16, 32.0)
        0.5
    """
    return 1.0 if math.isinf(noise_scale) else (noise_scale + base_batch_size) / (noise_scale + batch_size)


class Goodput(Controller):
    """argmax over B of throughput(B) · efficiency(B): samples a second, times the progress a sample makes; moves only for a predicted gain above `gain`.

    Throughput is B/seconds(B), seconds(B) a model fitted by scipy every 20 steps to the median times of the sizes so far (`StepTime`; of each size its last
    31 steps, so that an evaluation or a busy machine in between does not count); efficiency is (φ + B₀)/(φ + B), φ = T/G² from separately smoothed T̂ and
    Ĝ². Sizes beyond twice the largest one timed are not considered; while all steps had one size their time says nothing of another: the proposal is then twice
    that size, once there are 20 of them.

    Where theory is thin: that efficiency is of plain SGD under AdaScale's lr, and the progress per sample of momentum or Adam may differ; early and at small
    sizes φ is hardly known, which `proposal_interval` shows: with confidence= the size then stays.

    Pair it with coupling='adascale', under which the efficiency is meant. The lr then grows up to B/B₀ times, and beyond what the model can be trained at a
    run collapses: choose max_batch_size for it. Measured on scikit-learn's digits (20 epochs, sizes 16 to 1024, lr .1 and .3, ten seeds each): 18 of 20 runs
    ended at .97 to .99 held-out accuracy, two at .93 and .96; at lr .1 and no size beyond 128, nine at .98 to .99 and one at .88. It follows the clock, so
    that two runs from one seed differ.

    A step's time is that between two calls of `advance`, which the scheduler makes at every step; on an accelerator it is right on average, where the loop
    waits for the device now and then.

    Args:
        base_batch_size: B₀, for which the lr was chosen.
        max_batch_size: no larger size is considered; None for no bound.
        gain: relative gain that a move must promise.
        replicas: processes that share a batch.
        smoothing: μ of the averages of T̂ and Ĝ², 0 <= μ < 1.
        clock: seconds since some moment.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Goodput(16).best_size(StepTime(per_step=0.01, per_sample=0.0001), noise_scale=100.0, largest=4096)  # √(φ·a/b) = 100
        100.0

    References:
        Qiao et al. (2021), "Pollux: co-adaptive cluster scheduling for goodput-optimized deep learning", OSDI.
    """

    needs_effective_lr = False
    arguments = ("base_batch_size", "max_batch_size", "gain", "replicas", "smoothing")
    saved = ("trace", "square", "joint", "sizes", "seconds", "proposal", "steps", "decided_at", "samples", "decided")

    def __init__(
        self,
        base_batch_size: int = 16,
        max_batch_size: int | None = None,
        gain: float = 0.05,
        replicas: int = 1,
        smoothing: float = 0.95,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_positive(base_batch_size=base_batch_size, replicas=replicas)
        if max_batch_size is not None and not max_batch_size >= base_batch_size:
            raise ValueError(f"max_batch_size must not be below base_batch_size ({base_batch_size}), got {max_batch_size!r}")
        if not (math.isfinite(gain) and gain >= 0):
            raise ValueError(f"gain must be a number >= 0, got {gain!r}")
        self.base_batch_size, self.max_batch_size, self.gain, self.replicas, self.smoothing = base_batch_size, max_batch_size, gain, replicas, smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.square)
        # Of the last decision by both models: T, G², their variances and covariance, degrees of freedom; the proposal before, the size timed nearest to it, the
        # largest one; the fields of StepTime.
        self.decided: list[float] = []
        self.sizes: list[int] = []  # of the steps timed, the oldest first
        self.seconds: list[float] = []  # NaN for the first step at a size
        self.proposal = math.nan
        self.steps = self.decided_at = self.samples = 0
        self._clock, self._last = clock, math.nan

    def advance(self, *, samples: int, epoch: int) -> None:
        """Time the step: see `Controller.advance`. The first step at a size is left out, as it may compile or allocate."""
        now, before = self._clock(), self._last
        self._last = now
        self.steps += 1
        self.samples = samples
        known = samples in self.sizes
        if known and (math.isnan(before) or not now > before):
            return
        if self.sizes.count(samples) >= TIMES_OF_A_SIZE or len(self.sizes) >= KEPT_TIMES:
            place = self.sizes.index(samples) if self.sizes.count(samples) >= TIMES_OF_A_SIZE else 0
            del self.sizes[place], self.seconds[place]
        self.sizes.append(samples)
        self.seconds.append(now - before if known else math.nan)

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments; give the proposed batch size, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self.joint.update(*trace_and_signal(moments))
        if math.isnan(self.proposal):
            self.proposal = float(moments.batch_size)
        if self.steps - self.decided_at >= REFIT:
            self.decided_at = self.steps
            self._decide()
        return self.proposal

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """What the last decision would have been at both ends of the noise scale's interval, moved or kept: see `Controller.proposal_interval`.

        A larger noise scale never makes a smaller size best, whatever the times: ∂/∂φ of log efficiency, 1/(φ + B₀) − 1/(φ + B), grows with B, so that the
        ends of φ's interval are those of the size's, and so with the gain that a move must promise. The times of steps count as known. None before the first
        decision by both models: doubling a size that was the only one so far tries a second one, it has no error.
        """
        if not self.decided:
            return NO_INTERVAL
        trace, square, of_trace, of_square, both, freedom, *_ = self.decided
        ends = [self._choice(end) for end in fieller(trace, square, (of_trace, of_square), both, student_quantile(level, freedom))]
        return min(*ends, self.proposal), max(*ends, self.proposal)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(), also one from before intervals were kept: see `Controller.load_state_dict`."""
        if isinstance(state, dict) and "decided" not in state:
            state = {"joint": JointAverages(MovingAverage(), MovingAverage()).state_dict(), "decided": [], **state}
        super().load_state_dict(state)

    def best_size(self, step_time: StepTime, noise_scale: float, largest: float) -> float:
        """The size with the greatest goodput among B₀ … largest, in samples, to 0.01 %; the smallest of equals."""
        low, high = float(self.base_batch_size), max(float(self.base_batch_size), min(float(largest), self._limit))
        for _ in range(3):
            grid = np.geomspace(low, high, GRID)
            best = int(np.argmax([self._goodput(size, step_time, noise_scale) for size in grid]))
            low, high = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
        return float(f"{grid[best]:.6g}")

    def _goodput(self, size: float, step_time: StepTime, noise_scale: float) -> float:
        return size / step_time.seconds(size) * efficiency(size, self.base_batch_size, noise_scale)

    @property
    def _limit(self) -> float:
        return math.inf if self.max_batch_size is None else float(self.max_batch_size)

    def _decide(self) -> None:
        times: dict[int, list[float]] = {}
        for size, seconds in zip(self.sizes, self.seconds, strict=True):
            if not math.isnan(seconds):
                times.setdefault(size, []).append(seconds)
        if len(times) < 2:
            self.proposal = min(2 * self.proposal, self._limit) if times else self.proposal
            return
        sizes = list(times)
        step_time = fit_step_time(sizes, [median(values) for values in times.values()], [len(values) for values in times.values()], self.replicas)
        errors = [self.trace.std_error() ** 2, self.square.std_error() ** 2, self.joint.covariance()]
        freedom = min(self.trace.freedom, self.square.freedom)
        self.decided = [self.trace.average, self.square.average, *errors, freedom, self.proposal, *self._nearest_and_largest(sizes), *astuple(step_time)]
        square = self.square.average
        self.proposal = self._choice(max(0.0, self.trace.average) / square if square > 0 else math.inf)

    def _nearest_and_largest(self, sizes: list[int]) -> tuple[float, float]:
        """Of the sizes timed, the one nearest to the proposal, and the largest."""
        return float(max(sizes, key=lambda size: -abs(size - self.proposal))), float(max(sizes))

    def _choice(self, noise_scale: float) -> float:
        """The best size at this noise scale, or the proposal before the last decision where moving promises too little."""
        before, nearest, largest, *times = self.decided[6:]
        step_time = StepTime(*times)
        best = self.best_size(step_time, noise_scale, 2.0 * largest)
        gained = self._goodput(best, step_time, noise_scale) > (1 + self.gain) * self._goodput(nearest, step_time, noise_scale)
        return best if gained else before
