"""At which steps the gradient is measured, and how much of it: one step in k, or within a budget.

Legend: N samples in a backward pass, S of them measured.
"""

from __future__ import annotations

import math
import warnings

from adabatch.config import Every
from adabatch.estimators.averages import MovingAverage
from adabatch.grad_sample.cost import LONGEST_INTERVAL, Measurement, within_budget
from adabatch.interfaces import Estimator, State

# The first steps are measured at any cost; intervals are longer by STRETCH until that is repaid.
WARM_UP, STRETCH = 5, 1.25
# A plan is made for a size, and again where the size differs by more than this factor.
REPLAN_FACTOR = 1.5
# The relative standard error of the smoothed trace above which a budget is too small, and the
# measurements before that is judged.
LARGEST_ERROR, JUDGED_AFTER = 0.5, 20


class FixedInterval:
    """Measures at one step in k, as many samples as the estimator is set to.

    Args:
        estimator: enabled, or not, for the next step.
        every: the interval.

    Example:
        >>> from adabatch.estimators.null import NullEstimator
        >>> FixedInterval(NullEstimator(), 3).measurement.every
        3
    """

    def __init__(self, estimator: Estimator, every: int):
        self._estimator, self._every, self._batch_size = estimator, every, 0

    @property
    def measurement(self) -> Measurement:
        """What is measured; the share is NaN before the first measured step, or where the estimator
        does not know its cost."""
        samples, share = self._estimator.samples, math.nan
        cost = self._estimator.cost() if self._batch_size else None
        if cost is not None:
            share = cost.share(per_pass(self._estimator, self._batch_size), samples) / self._every
        return Measurement(samples, self._every, share)

    def next_step(self, step: int, measured: bool, batch_size: int) -> None:
        """A step has ended: prepare the estimator for step number `step`."""
        self._batch_size = batch_size if measured else self._batch_size
        self._estimator.enabled = step % self._every == 0

    def judge(self, trace: MovingAverage) -> None:
        """Nothing to judge: the user chose."""

    def state_dict(self) -> State:
        """No state: the number of the step decides."""
        return {"share": None}

    def load_state_dict(self, state: State) -> None:
        """Nothing to load."""


class Budget:
    """Measures at most at a share of the training time on average, by the cost model
    (`grad_sample/cost.py`).

    The first step measures all samples and shows the layers' shapes. S and the interval follow from
    them (`within_budget`), and are chosen again at a measured step where the batch size has changed
    by more than a factor of 1.5. They depend on shapes and sizes only, never on the clock.

    The first WARM_UP = 5 steps are all measured, as controllers need a first estimate at once. What
    they cost above the budget is a debt; while there is any, intervals are a quarter longer
    (STRETCH), which repays it within about 20 of them. Unused budget is not saved up.

    Where FEWEST_SAMPLES at one step in LONGEST_INTERVAL still cost more, the interval grows up to
    100 steps, with a warning. After JUDGED_AFTER = 20 measurements a relative standard error of the
    smoothed trace above LARGEST_ERROR = 0.5 is warned about, once.

    Args:
        estimator: knows its cost().
        share: of the training time, above 0.

    Raises:
        ValueError: an estimator that does not know its cost, or for which the user chose the number
            of samples.

    Example:
        >>> import torch, adabatch
        >>> estimator = adabatch.GradSampleHooks(torch.nn.Linear(4, 1))
        >>> Budget(estimator, 0.05).measurement
        Measurement(samples=None, every=1, share=nan)
    """

    def __init__(self, estimator: Estimator, share: float):
        if estimator.cost() is None:
            raise ValueError(f"measure={share!r} needs an estimator that knows its cost, "
                             f"GradSampleHooks, got {type(estimator).__name__}: pass Every(k)")
        if estimator.samples is not None:
            raise ValueError(f"measure={share!r} chooses the samples, but the estimator measures "
                             f"samples={estimator.samples}: pass one of them only")
        self._estimator, self._share = estimator, share
        self.measurement = Measurement(None, 1)
        self._planned_for, self._cost_of_step = 0, 0.0
        self._debt, self._n_measured, self._since = 0.0, 0, 0
        self._in_debt = self._warned = self._warned_of_cost = False

    def next_step(self, step: int, measured: bool, batch_size: int) -> None:
        """A step has ended: prepare the estimator for the next one.

        Args:
            step: the number of the next step.
            measured: whether the one that ended was measured.
            batch_size: in force now, in samples of a step.
        """
        if measured:
            self._n_measured, self._since = self._n_measured + 1, 0
            self._in_debt = self._debt > 1e-9
            self._debt += self._cost_of_step
            size = per_pass(self._estimator, batch_size)
            if not size / REPLAN_FACTOR <= self._planned_for <= size * REPLAN_FACTOR:
                self._choose(size)
        self._debt = max(0.0, self._debt - self._share)
        self._since += 1
        every = self.measurement.every
        due = math.ceil(STRETCH * every) if self._in_debt else every
        self._estimator.enabled = self._n_measured < WARM_UP or self._since >= due

    def _choose(self, size: int) -> None:
        cost, shard = self._estimator.cost(), self._estimator.shard
        if shard is not None:
            # Processes may have seen other lengths of sequences: all use what the first saw.
            cost = shard.broadcast_from_first(cost)
        assert cost is not None
        if self._n_measured == 1:
            self._debt += cost.share(size)  # the first step, which measured all
        self.measurement = within_budget(cost, size, self._share)
        samples = self.measurement.samples
        self._planned_for, self._cost_of_step = size, cost.share(size, samples)
        self._estimator.samples = samples
        if self.measurement.every > LONGEST_INTERVAL and not self._warned_of_cost:
            self._warned_of_cost = True
            least = self._cost_of_step / LONGEST_INTERVAL
            warnings.warn(
                f"measure={self._share:g} is too small for this model: measuring "
                f"{samples or 'all'} of {size} samples at one step in {LONGEST_INTERVAL} costs "
                f"{least:.3g} of a step. It is measured at one step in {self.measurement.every} "
                f"only, so that the batch size follows slowly: raise measure to {least:.2g}, or "
                "pass measure='all'",
                stacklevel=4,
            )

    def judge(self, trace: MovingAverage) -> None:
        """Warn, once, when too little is measured to know the smoothed trace.

        Args:
            trace: the moving average of the measured traces.
        """
        if self._warned or trace.count < JUDGED_AFTER:
            return
        error = trace.std_error() / abs(trace.average) if trace.average else 0.0
        if error > LARGEST_ERROR:
            self._warned = True
            samples = self.measurement.samples or "all"
            warnings.warn(
                f"the budget measure={self._share:g} is too small: after {trace.count} "
                f"measurements ({samples} samples at one step in {self.measurement.every}) the "
                f"smoothed variance trace has a relative standard error of {error:.2f}, above "
                f"{LARGEST_ERROR}. Raise measure, e.g. to {4 * self._share:g}, pass measure='all', "
                "or raise the minimum of batch_sizes",
                stacklevel=4,
            )

    def state_dict(self) -> State:
        """Plain numbers."""
        return {
            "share": self._share, "samples": self.measurement.samples,
            "every": self.measurement.every, "expected_share": self.measurement.share,
            "planned_for": self._planned_for, "cost_of_step": self._cost_of_step,
            "debt": self._debt, "n_measured": self._n_measured, "since": self._since,
            "in_debt": self._in_debt, "warned": self._warned,
            "warned_of_cost": self._warned_of_cost,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict(). With another share the plan is made again at the next
        measured step."""
        if state["share"] is None:
            return
        self._planned_for = state["planned_for"] if state["share"] == self._share else 0
        self._cost_of_step, self._debt = state["cost_of_step"], state["debt"]
        self._n_measured, self._since = state["n_measured"], state["since"]
        self._in_debt, self._warned = state["in_debt"], state["warned"]
        self._warned_of_cost = state["warned_of_cost"]
        self.measurement = Measurement(state["samples"], state["every"], state["expected_share"])
        self._estimator.samples = self.measurement.samples


def plan_for(estimator: Estimator, measure: Every | float) -> FixedInterval | Budget:
    """The plan that `measure` describes.

    Raises:
        ValueError: as Budget.

    Example:
        >>> from adabatch.estimators.null import NullEstimator
        >>> type(plan_for(NullEstimator(), Every(2))).__name__
        'FixedInterval'
    """
    if not isinstance(measure, Every):
        return Budget(estimator, measure)
    if measure.samples is not None:
        estimator.samples = measure.samples
    return FixedInterval(estimator, measure.k)


def per_pass(estimator: Estimator, batch_size: int) -> int:
    """Samples of one backward pass of a step, on one of the processes that share it."""
    world_size = 1 if estimator.shard is None else estimator.shard.world_size
    return max(1, -(-batch_size // (estimator.accumulate * world_size)))
