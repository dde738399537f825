"""At which steps the gradient is measured, and how much of it: at every so many steps, or as a budget allows.

Legend: N samples in a backward pass, S of them measured.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from adabatch._checks import check_version
from adabatch.distributed.shard import BatchShard
from adabatch.estimators.averages import MovingAverage
from adabatch.grad_sample.cost import LONGEST_INTERVAL, Measurement, within_budget

# The first steps are measured whatever they cost; intervals are longer by STRETCH until that is repaid.
WARM_UP, STRETCH = 5, 1.25
# A plan is made for a size, and made anew where the size differs by more than this factor.
REPLAN_FACTOR = 1.5
# The relative standard error of the smoothed trace above which a budget is called too small, and the measurements before it is looked at.
LARGEST_ERROR, JUDGED_AFTER = 0.5, 20


class _Default(float):
    """A number that can be told from the same number given by the caller."""


DEFAULT_OVERHEAD: float = _Default(0.05)


class FixedInterval:
    """Measures at every so many steps, as many samples as the hooks are set to.

    Args:
        hooks: enabled, or not, for the next step.
        every: the interval.

    Example:
        >>> from types import SimpleNamespace
        >>> plan = FixedInterval(SimpleNamespace(enabled=True, samples=None), 3)
        >>> plan.measurement.every
        3
    """

    def __init__(self, hooks: Any, every: int):
        self._hooks, self._every, self._batch_size = hooks, every, 0

    @property
    def measurement(self) -> Measurement:
        """What is measured, and its expected share of a step (NaN before the first measured step, or where the hooks do not know their cost)."""
        samples, share = getattr(self._hooks, "samples", None), math.nan
        cost = cost_of(self._hooks) if self._batch_size else None
        if cost is not None:
            share = cost.share(per_pass(self._hooks, self._batch_size), samples) / self._every
        return Measurement(samples, self._every, share)

    def next_step(self, step: int, measured: bool, batch_size: int) -> None:
        """A step has ended: make the hooks ready for step number `step`."""
        self._batch_size = batch_size if measured else self._batch_size
        self._hooks.enabled = step % self._every == 0

    def judge(self, trace: MovingAverage) -> None:
        """Nothing to say: the caller chose."""

    def state_dict(self) -> dict[str, Any]:
        """No state: the number of the step decides."""
        return {"version": 1, "overhead": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "the measuring plan")


class Budget:
    """Measures so that it costs at most a share of the training time on average, by the cost model (`grad_sample/cost.py`).

    The first step measures all samples and shows the layers' shapes. From them come S and the interval (`within_budget`); they are chosen anew when the batch
    size has changed by more than a factor of 1.5 since, at a measured step. They depend on shapes and sizes only, never on the clock.

    The first WARM_UP = 5 steps are all measured, as controllers need a first estimate at once. What they cost above the budget is a debt; while there is any,
    intervals are a quarter longer (STRETCH), which repays it within about 20 of them. Budget that was not used is not saved up.

    Where even FEWEST_SAMPLES at one step in LONGEST_INTERVAL cost more, the interval grows up to 100 steps, with a warning. After JUDGED_AFTER = 20
    measurements, a relative standard error of the smoothed trace above LARGEST_ERROR = 0.5 is warned about, once.

    Args:
        hooks: have cost() -> StepCost, `samples`, `enabled` and `accumulate`.
        overhead: the share, above 0.

    Raises:
        ValueError: hooks that do not know their cost, or that measure a number of samples of the caller's; an overhead that is no number above 0.

    Example:
        >>> import torch, adabatch
        >>> hooks = adabatch.GradSampleHooks(torch.nn.Linear(4, 1))
        >>> Budget(hooks, 0.05).measurement
        Measurement(samples=None, every=1, share=nan)
    """

    def __init__(self, hooks: Any, overhead: float):
        if isinstance(overhead, bool) or not isinstance(overhead, (int, float)) or not 0 < overhead < math.inf:
            raise ValueError(f"overhead must be a number above 0, the share of a step that measuring may cost, or None for no bound, got {overhead!r}")
        if cost_of(hooks) is None:
            raise ValueError(f"overhead={overhead!r} needs hooks that know what measuring costs, GradSampleHooks, got {type(hooks).__name__}: leave it away")
        if hooks.samples is not None:
            raise ValueError(f"overhead={overhead!r} chooses the samples, but the hooks measure samples={hooks.samples}: leave one of them away")
        self._hooks, self._overhead = hooks, float(overhead)
        self.measurement = Measurement(None, 1)
        self._planned_for, self._cost_of_step = 0, 0.0
        self._debt, self._n_measured, self._since = 0.0, 0, 0
        self._in_debt = self._warned = self._warned_of_cost = False

    def next_step(self, step: int, measured: bool, batch_size: int) -> None:
        """A step has ended: make the hooks ready for the next one.

        Args:
            step: the number of the next step.
            measured: whether the one that ended was measured.
            batch_size: in force now, in samples of a step.
        """
        if measured:
            self._n_measured, self._since, self._in_debt = self._n_measured + 1, 0, self._debt > 1e-9
            self._debt += self._cost_of_step
            size = per_pass(self._hooks, batch_size)
            if not size / REPLAN_FACTOR <= self._planned_for <= size * REPLAN_FACTOR:
                self._choose(size)
        self._debt = max(0.0, self._debt - self._overhead)
        self._since += 1
        every = self.measurement.every
        self._hooks.enabled = self._n_measured < WARM_UP or self._since >= (math.ceil(STRETCH * every) if self._in_debt else every)

    def _choose(self, size: int) -> None:
        # Processes that share a batch may have seen other lengths of sequences: all go by what the first saw.
        cost = shard_of(self._hooks).broadcast_from_first(self._hooks.cost())
        if self._n_measured == 1:
            self._debt += cost.share(size)  # the first step, which measured all
        self.measurement = within_budget(cost, size, self._overhead)
        self._planned_for, self._cost_of_step = size, cost.share(size, self.measurement.samples)
        self._hooks.samples = self.measurement.samples
        if self.measurement.every > LONGEST_INTERVAL and not self._warned_of_cost:
            self._warned_of_cost = True
            least = self._cost_of_step / LONGEST_INTERVAL
            warnings.warn(
                f"overhead={self._overhead:g} is too small for this model: measuring {self.measurement.samples or 'all'} of {size} samples at one step in "
                f"{LONGEST_INTERVAL} costs {least:.3g} of a step. It is measured at one step in {self.measurement.every} only, so that the batch size follows "
                f"slowly: raise overhead to {least:.2g}, or pass overhead=None to measure at every step",
                stacklevel=4,
            )

    def judge(self, trace: MovingAverage) -> None:
        """Warn, once, when what is measured is too little to know the smoothed trace.

        Args:
            trace: the moving average of the measured traces.
        """
        if self._warned or trace.count < JUDGED_AFTER:
            return
        error = trace.std_error() / abs(trace.average) if trace.average else 0.0
        if error > LARGEST_ERROR:
            self._warned = True
            warnings.warn(
                f"the budget overhead={self._overhead:g} is too small: after {trace.count} measurements ({self.measurement.samples or 'all'} samples at one "
                f"step in {self.measurement.every}) the smoothed variance trace has a relative standard error of {error:.2f}, above {LARGEST_ERROR}. Raise "
                f"overhead=, e.g. to {4 * self._overhead:g}, pass overhead=None to measure all samples at every step, or raise min_batch_size",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        chosen = {"samples": self.measurement.samples, "every": self.measurement.every, "share": self.measurement.share}
        own = ("overhead", "planned_for", "cost_of_step", "debt", "n_measured", "since", "in_debt", "warned", "warned_of_cost")
        return {"version": 1, **chosen, **{name: getattr(self, f"_{name}") for name in own}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(). With another overhead the plan is made anew at the next measured step.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "the measuring plan")
        if state["overhead"] is None:
            return
        for name in ("cost_of_step", "debt", "n_measured", "since", "in_debt", "warned", "warned_of_cost"):
            setattr(self, f"_{name}", state[name])
        self._planned_for = state["planned_for"] if state["overhead"] == self._overhead else 0
        self.measurement = Measurement(state["samples"], state["every"], state["share"])
        self._hooks.samples = self.measurement.samples


def plan_for(hooks: Any, every: int, overhead: float | None) -> FixedInterval | Budget:
    """The plan that a caller's options ask for.

    Raises:
        ValueError: both an interval and an overhead, or as Budget.

    Example:
        >>> plan_for(None, 2, None).__class__.__name__
        'FixedInterval'
    """
    if overhead is None:
        return FixedInterval(hooks, every)
    if every != 1:
        raise ValueError(f"overhead={overhead!r} chooses the interval: leave every={every!r} away, or pass overhead=None")
    return Budget(hooks, overhead)


def budget_of_wrap(overhead: float | None, samples: int | None, options: dict[str, Any]) -> float | None:
    """The overhead that wrap() goes by: its default gives way to what the caller asked for.

    Raises:
        ValueError: overhead= beside samples= or every=.

    Example:
        >>> budget_of_wrap(DEFAULT_OVERHEAD, None, {}), budget_of_wrap(DEFAULT_OVERHEAD, 8, {})
        (0.05, None)
    """
    given = [f"{name}={value!r}" for name, value in (("samples", samples), ("every", options.get("every"))) if value is not None]
    if not given:
        return overhead
    if overhead is not DEFAULT_OVERHEAD:
        raise ValueError(
            f"overhead={overhead!r} says what measuring may cost, and {' and '.join(given)} what is measured: leave overhead= away to measure as given, or "
            f"{' and '.join(each.split('=')[0] + '=' for each in given)} for the budget to choose"
        )
    return None


def per_pass(hooks: Any, batch_size: int) -> int:
    """Samples of one backward pass of a step, on one of the processes that share it."""
    return max(1, -(-batch_size // (getattr(hooks, "accumulate", 1) * shard_of(hooks).world_size)))


def cost_of(hooks: Any) -> StepCost | None:
    """What measuring costs; None where the hooks do not know."""
    return hooks.cost() if hasattr(hooks, "cost") else None


def shard_of(hooks: Any) -> BatchShard:
    """What the hooks know of the processes that share each batch; one process where they know of none."""
    return getattr(hooks, "shard", None) or BatchShard()
