"""Goodput: the batch size with the most statistical progress a second.

Legend: B samples in a step, B₀ the base batch size, R replicas (processes) that share a step, φ the
noise scale T/G².
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from adabatch._checks import positive, real
from adabatch.controllers.adascale import gain as gain_of
from adabatch.controllers.base import Controller, Input, measured, ratio
from adabatch.estimators.averages import JointAverages, MovingAverage
from adabatch.estimators.moments import GradientMoments, trace_and_signal
from adabatch.interfaces import RunContext

KEPT_TIMES, TIMES_OF_A_SIZE = 992, 31  # of steps, the latest ones
REFIT = 20  # steps between two decisions
GRID = 512  # sizes tried, evenly spaced on a log scale
SMALLEST = 1e-12  # seconds; below any step, keeps logarithms finite
START_GAMMA = 2.0


@dataclass(frozen=True)
class StepTime:
    """seconds(B) = ((a + b·B/R)^γ + c^γ)^(1/γ): computing and network overlap in part; γ = 1 not at
    all, γ = 10 nearly wholly. With R = 1, a + b·B.

    Example:
        >>> StepTime(0.5, 0.25).seconds(2)
        1.0
    """

    per_step: float  # a, in seconds
    per_sample: float  # b, in seconds
    network: float = 0.0  # c, in seconds: the published a' + b'·(R − 2) at a fixed R
    gamma: float = 1.0  # γ in [1, 10]
    replicas: int = 1  # R

    def seconds(self, batch_size: float) -> float:
        compute = self.per_step + self.per_sample * batch_size / self.replicas
        if not self.network:
            return compute
        larger, gamma = max(compute, self.network, SMALLEST), self.gamma
        parts = (compute / larger) ** gamma + (self.network / larger) ** gamma
        return larger * parts ** (1 / gamma)


def fit_step_time(sizes: Sequence[float], seconds: Sequence[float], counts: Sequence[float],
                  replicas: int = 1) -> StepTime:
    """Minimise Σ n_j (log seconds(B_j) − log s_j)² by L-BFGS-B over the parameters' logarithms.

    sizes are the B_j, in samples, at least two different ones (else a ValueError); seconds the s_j,
    the typical time of a step at each; counts the n_j, the steps that each stands for.

    Example:
        >>> fitted = fit_step_time([16, 64, 256], [1.16, 1.64, 3.56], [1, 1, 1])
        >>> round(fitted.per_step, 4), round(fitted.per_sample, 4)
        (1.0, 0.01)
    """
    from scipy.optimize import minimize  # takes half a second to import, and few runs fit

    if len(set(sizes)) < 2:
        raise ValueError(f"a step's time needs at least two batch sizes to fit, got {set(sizes)}")
    log_sizes = np.log(np.asarray(sizes, float) / replicas)
    logs, weights = np.log(np.maximum(seconds, SMALLEST)), np.asarray(counts, float)
    weights = weights / weights.sum()
    half = float(logs.min()) - math.log(2)
    start = [half, half - float(log_sizes.min())]
    bounds: list[tuple[float, float | None]] = [(math.log(SMALLEST), None)] * 2
    if replicas > 1:
        start += [half, START_GAMMA]
        bounds += [(math.log(SMALLEST), None), (1.0, 10.0)]

    def error(parameters: np.ndarray) -> float:
        total = np.logaddexp(parameters[0], parameters[1] + log_sizes)
        if replicas > 1:
            network, gamma = parameters[2:]
            total = np.logaddexp(gamma * total, gamma * network) / gamma
        return float(weights @ (total - logs) ** 2)

    options = {"ftol": 1e-15, "gtol": 1e-10}
    found = minimize(error, start, method="L-BFGS-B", bounds=bounds, options=options).x
    network = (math.exp(found[2]), float(found[3])) if replicas > 1 else (0.0, 1.0)
    return StepTime(math.exp(found[0]), math.exp(found[1]), *network, replicas)


class Goodput(Controller):
    """argmax over B of throughput(B) · efficiency(B): samples a second, times the progress a sample
    makes; the size moves only for a predicted gain above `gain`.

    Throughput is B/seconds(B), seconds(B) fitted every 20 steps to the median times of the sizes so
    far (`StepTime`; of each size its last 31 steps); efficiency is (φ + B₀)/(φ + B), AdaScale's
    gain over B/B₀, φ from separately smoothed T̂ and Ĝ². Sizes beyond twice the largest one timed
    are not considered; while all steps had one size the proposal is twice that size, after 20 of
    them.

    Pair it with coupling='adascale', for which the efficiency holds, and choose the upper bound for
    lr · B/B₀. It follows the clock: two runs from one seed differ. A step's time is that between
    two calls of `on_step`. Limits, and what was measured: adabatch/controllers/README.md.

    Args:
        base_batch_size: B₀, for which the lr was chosen.
        max_batch_size: no larger size is considered; None for no bound.
        replicas: R, processes that share a batch.
        clock: gives the time in seconds; None for that of the run.

    Example:
        >>> times = StepTime(per_step=0.01, per_sample=0.0001)
        >>> Goodput(16).best_size(times, noise_scale=100.0, largest=4096)  # √(φ·a/b) = 100
        100.0

    Reference: Qiao et al. (2021), "Pollux", OSDI.
    """

    init_args = ("base_batch_size", "max_batch_size", "gain", "replicas", "smoothing")
    state_attrs = ("trace", "square", "joint", "sizes", "seconds", "proposal", "steps",
                   "decided_at", "decided")

    def __init__(self, base_batch_size: int = 16, max_batch_size: int | None = None,
                 gain: float = 0.05, replicas: int = 1, smoothing: float = 0.95,
                 clock: Callable[[], float] | None = None):
        self.base_batch_size = positive("base_batch_size", base_batch_size)
        if max_batch_size is not None and not max_batch_size >= base_batch_size:
            raise ValueError("max_batch_size must not be below base_batch_size "
                             f"({base_batch_size}), got {max_batch_size!r}")
        self.max_batch_size, self.gain = max_batch_size, real("gain", gain, at_least=0)
        self.replicas, self.smoothing = int(positive("replicas", replicas)), smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.square)
        # Of the last decision by both models: the proposal before, the size timed nearest to it,
        # the largest one; the fields of StepTime.
        self.decided: list[float] = []
        self.sizes: list[int] = []  # of the steps timed, the oldest first
        self.seconds: list[float] = []  # NaN for the first step at a size
        self.proposal = math.nan
        self.steps = self.decided_at = 0
        self.clock, self._last = clock, math.nan

    def bind(self, context: RunContext) -> None:
        self.clock = self.clock or context.clock

    def on_step(self, *, samples: int, epoch: int) -> None:
        """Time the step, except the first one at a size, which may compile or allocate."""
        now, before = (self.clock or time.perf_counter)(), self._last
        self._last = now
        self.steps += 1
        known = samples in self.sizes
        if known and (math.isnan(before) or not now > before):
            return
        full = self.sizes.count(samples) >= TIMES_OF_A_SIZE
        if full or len(self.sizes) >= KEPT_TIMES:
            oldest = self.sizes.index(samples) if full else 0
            del self.sizes[oldest], self.seconds[oldest]
        self.sizes.append(samples)
        self.seconds.append(now - before if known else math.nan)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        moments = measured(moments)
        self.joint.update(*trace_and_signal(moments))
        if math.isnan(self.proposal):
            self.proposal = float(moments.batch_size)
        if self.steps - self.decided_at >= REFIT:
            self.decided_at = self.steps
            self._decide()
        return self.proposal

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """What the last decision would be at both ends of the noise scale's interval, and the
        proposal itself; the times of steps count as known."""
        low, high = super().interval(level)
        if math.isnan(low):
            return low, high
        return min(low, self.proposal), max(high, self.proposal)

    def _inputs(self, level: float) -> list[Input]:
        noise_scale = ratio(self.trace.average, self.square.average)
        return [(noise_scale, *self.joint.ratio_interval(level))] if self.decided else []

    def _rule(self, *inputs: float) -> float:
        """The best size at a noise scale, or the proposal before the last decision where moving
        promises too little. Monotone: ∂/∂φ of log efficiency, 1/(φ + B₀) − 1/(φ + B), grows with B.
        """
        before, nearest, largest, per_step, per_sample, network, gamma, _ = self.decided
        step_time = StepTime(per_step, per_sample, network, gamma, self.replicas)
        best = self.best_size(step_time, inputs[0], 2.0 * largest)
        bar = (1 + self.gain) * self._goodput(nearest, step_time, inputs[0])
        return best if self._goodput(best, step_time, inputs[0]) > bar else before

    def best_size(self, step_time: StepTime, noise_scale: float, largest: float) -> float:
        """The size with the greatest goodput among B₀ … largest, in samples, to 0.01 %; the
        smallest of equals."""
        low = float(self.base_batch_size)
        high = max(low, min(float(largest), self._limit))
        for _ in range(3):
            grid = np.geomspace(low, high, GRID)
            best = int(np.argmax([self._goodput(size, step_time, noise_scale) for size in grid]))
            low, high = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
        return float(f"{grid[best]:.6g}")

    def _goodput(self, size: float, step_time: StepTime, noise_scale: float) -> float:
        return gain_of(size, self.base_batch_size, noise_scale) / step_time.seconds(size)

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
        medians = [float(np.median(seconds)) for seconds in times.values()]
        counts = [len(seconds) for seconds in times.values()]
        step_time = fit_step_time(list(times), medians, counts, self.replicas)
        nearest = min(times, key=lambda size: abs(size - self.proposal))
        self.decided = [self.proposal, float(nearest), float(max(times)), *astuple(step_time)]
        self.proposal = self._rule(ratio(self.trace.average, self.square.average))
