"""Size and measurement of the next steps: the controller's proposal, rounding, bounds, multiples, a
series of sizes, cooldown and hysteresis; which steps are measured, and how many of their samples.

Legend: N samples in a backward pass, S of them measured.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Any

from adabatch._checks import returned
from adabatch._types import Argument
from adabatch.config import BatchSizes, Every
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments
from adabatch.grad_sample.cost import LONGEST_INTERVAL, Measurement, StepCost, within_budget
from adabatch.interfaces import BatchSource, Controller, Estimator, State
from adabatch.scheduler.record import StepRecord

MISSING: Any = object()
# The first steps are measured at any cost; intervals are longer by STRETCH until that is repaid.
WARM_UP, STRETCH = 5, 1.25
# Steps that are timed without a measurement before the clock is compared with the cost model; what
# scheduler.step(), the optimizer's hooks and the loader take together, in units of the first: timed
# one by one on a small network, 1 + .35 + .35.
PLAIN_STEPS, HOOKS = 5, 1.7
# What the clock says leads to another plan where it differs by these factors, or NEAR_FIXED; a
# measurement is taken to cost at least LEAST_FACTOR of what the model says.
LOWER, HIGHER, NEAR_FIXED, LEAST_FACTOR = 0.8, 1.1, 0.01, 0.25
# A budget counts as kept up to this factor; that it is not is warned of after so many steps.
KEPT, WARNED_AFTER = 1.2, 100
# A plan is made for a size, and again where the size differs by more than this factor.
REPLAN_FACTOR = 1.5
# The relative standard error of the smoothed trace above which a budget is too small, and the
# measurements before that is judged.
LARGEST_ERROR, JUDGED_AFTER = 0.5, 20


@dataclass(frozen=True)
class SizeRule(BatchSizes):
    """The batch sizes of a run's steps. Arguments as in `BatchSizes`.

    Example:
        >>> rule = SizeRule(16, 2048)
        >>> rule.size_for(2.5), rule.size_for(100.5), rule.size_for(float("inf"))
        (16, 100, 2048)
        >>> SizeRule(16, 60, size_ratio=1.5).series
        (16, 24, 36, 54, 60)
    """

    @classmethod
    def for_steps(
        cls, sizes: BatchSizes, accumulate: int, epoch_samples: int | None, drop_last: bool,
        measured: bool = False,
    ) -> SizeRule:
        """The rule for steps of `accumulate` equal batches drawn from epochs of `epoch_samples`
        samples (None: not known). A batch larger than an epoch is never delivered whole, and with
        drop_last not at all. Where the size follows from what is measured, a step has at least two
        samples: one has no variance, and would stay one for ever.

        Raises:
            ValueError: no step fits the bounds; with drop_last also: the smallest batch is larger
                than an epoch.
        """
        multiple = math.lcm(sizes.multiple_of, accumulate)
        if measured and sizes.maximum < 2:
            raise ValueError(
                "the maximum of batch_sizes must be at least 2 where the size follows from the "
                f"variance of a batch, got {sizes.maximum}")
        least = max(sizes.minimum, 2) if measured else sizes.minimum
        if -(-least // multiple) > sizes.maximum // multiple:
            parts = " and ".join(f"{name}={count}" for name, count in (
                ("multiple_of", sizes.multiple_of), ("accumulate", accumulate)) if count > 1)
            raise ValueError(
                f"no multiple of {multiple} ({parts}) lies between minimum ({least}) and maximum "
                f"({sizes.maximum}) of batch_sizes: widen the bounds, or lower {parts}")
        rule = cls(**asdict(sizes) | {"multiple_of": multiple, "minimum": least})
        if epoch_samples is None or rule.highest <= epoch_samples * accumulate:
            return rule
        smallest = rule.lowest // accumulate
        if smallest <= epoch_samples:
            return replace(rule, maximum=epoch_samples * accumulate)
        fits = least <= epoch_samples * accumulate
        lower = f"multiple_of={sizes.multiple_of}" if fits else "the minimum of batch_sizes"
        if not fits and sizes.multiple_of > epoch_samples * accumulate:
            lower += f" and multiple_of={sizes.multiple_of}"
        if drop_last:
            raise ValueError(
                f"the smallest batch ({smallest} samples) is larger than an epoch "
                f"({epoch_samples}), and with drop_last no batch would ever be drawn: lower {lower}"
            )
        warnings.warn(
            f"an epoch has {epoch_samples} samples, less than the smallest batch of {smallest}: "
            "every batch is a short one, for which short_batch='scale' lowers the lr. Lower "
            f"{lower}",
            stacklevel=4,
        )
        return replace(rule, maximum=rule.lowest)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest allowed size."""
        return self.lowest, self.highest

    @cached_property
    def series(self) -> tuple[int, ...]:
        """The sizes about size_ratio apart, ascending; empty where every size is allowed."""
        if self.size_ratio is None:
            return ()
        sizes, unrounded = [self.lowest], float(self.lowest)
        while sizes[-1] < self.highest:
            unrounded = max(unrounded * self.size_ratio, sizes[-1] + self.multiple_of)
            size = round(unrounded / self.multiple_of) * self.multiple_of
            sizes.append(min(size, self.highest))
        return tuple(sizes)

    def size_for(self, proposal: float) -> int:
        """Round half to even to a multiple, or to the nearest of the series by ratio, then clip. An
        infinite proposal is clipped too; NaN is a ValueError."""
        lowest, highest = self.bounds
        if not math.isfinite(proposal):
            if math.isnan(proposal):
                raise ValueError("the proposed batch size is NaN")
            return highest if proposal > 0 else lowest
        if self.size_ratio is not None:
            above = bisect.bisect_left(self.series, proposal)
            near = self.series[max(0, above - 1) : above + 1]
            return near[0] if len(near) == 1 or proposal**2 < near[0] * near[1] else near[1]
        size = round(proposal / self.multiple_of) * self.multiple_of
        return lowest if size < lowest else highest if size > highest else size

    def next_size(self, proposal: float, present: int, steps_since_change: int) -> int:
        """The size to use after this step: size_for(proposal), unless cooldown or hysteresis keeps
        the present one, which must itself be allowed."""
        size = self.size_for(proposal)
        if size == present:
            return size
        if self.size_ratio is None:
            kept = abs(size - present) <= self.hysteresis * present
        else:
            reach = math.sqrt(self.size_ratio) * (1 + self.hysteresis)
            kept = present <= proposal * reach and proposal <= present * reach
        kept |= steps_since_change < self.cooldown
        return present if kept and self.size_for(present) == present else size

    def other_size(self, size: int, by: int = 1) -> int:
        """The next allowed size above that differs by that much, else below; the same where there
        is no other."""
        step = -(-by // self.multiple_of) * self.multiple_of
        near = self.series or (size + step, size - step)
        above = [each for each in near if size + by <= each <= self.highest]
        below = [each for each in near if self.lowest <= each <= size - by]
        return min(above) if above else max(below, default=size)

    def is_met(self, proposal: float, size: int) -> bool:
        """Whether the size is the proposal but for rounding, or more: not where a bound, cooldown
        or hysteresis keeps it below."""
        return proposal <= self.bounds[1] and size >= self.size_for(proposal)


class CurrentBatchSize:
    """The size of a step's batch from the next one drawn.

    Args:
        loader: its batch_size is written.
        accumulate: batches per step.
        size: to start with, in samples.
        cooldown: steps between changes; the first change need not wait.

    Attributes:
        size: in samples, all accumulated passes together.
        steps_since_change: for the cooldown.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> loader, rule = ResizableBatchSampler(64, 8), SizeRule(8, 32)
        >>> current = CurrentBatchSize(loader, accumulate=2, size=16, cooldown=0)
        >>> current.update(24.0, rule)
        >>> current.update(float("nan"), rule)
        >>> current.size, loader.batch_size, current.steps_since_change
        (24, 12, 1)
    """

    def __init__(self, loader: BatchSource, accumulate: int, size: int, cooldown: int):
        self._loader, self._accumulate = loader, accumulate
        self.steps_since_change = cooldown
        self.write(size)

    def update(self, proposal: float, rule: SizeRule) -> None:
        """Set the size that a proposal leads to, or keep it without one (NaN)."""
        size = self.size
        if not math.isnan(proposal):
            size = rule.next_size(proposal, size, self.steps_since_change)
        self.steps_since_change = 0 if size != self.size else self.steps_since_change + 1
        if size != self.size or self._loader.batch_size != size // self._accumulate:
            self.write(size)

    def write(self, size: int) -> None:
        """Set the size."""
        self.size, self._loader.batch_size = size, size // self._accumulate


def call_controller(
    controller: Controller, seen: StepRecord, moments: GradientMoments | None, *,
    samples: int, loss: float, lr: float, spacing: int = 1,
) -> float:
    """The controller's proposal; NaN where it is not called.

    Args:
        controller: first gets the progress of training.
        seen: the step.
        moments: of the step; None where it was not measured or they cannot be used.
        samples: of the step.
        loss: a mean over the samples.
        lr: the base effective lr.
        spacing: steps since the last one that was to be measured.
    """
    controller.on_step(samples=samples, epoch=seen.epoch)
    if seen.base_lr is not None:
        controller.on_optimizer_step(seen.base_lr)
    if controller.needs_moments:
        if moments is None:
            return math.nan
        controller.on_measurement(steps=spacing)
    proposal = controller.propose(moments, loss=loss, lr=lr)
    return proposal if type(proposal) is float else returned(
        f"propose() of {name_of(controller)}", proposal,
        "the batch size as a number, NaN to keep the present one")


class PlainController(Controller):
    """A user's object with propose(): what it has is used, the rest are a Controller's defaults."""

    def __init__(self, given: Argument):
        self.given = given

    def __getattribute__(self, name: str) -> Any:
        if name == "given" or name.startswith("_"):
            return super().__getattribute__(name)
        value = getattr(self.given, name, MISSING)
        if value is MISSING:
            return super().__getattribute__(name)
        return frozenset(value) if name == "requires" else value

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        proposal: float = self.given.propose(moments, loss=loss, lr=lr)
        return proposal


def as_controller(given: Argument) -> Controller:
    """A Controller as it is; a user's object with propose() with the defaults it lacks.

    Raises:
        TypeError: an object that proposes nothing, or a class instead of an object.
    """
    if isinstance(given, Controller):
        return given
    if isinstance(given, type) or not callable(getattr(given, "propose", None)):
        fix = "such as adabatch.CABS(), or controllers.Scheduled(...)"
        fix = f"make one, {given.__name__}()" if isinstance(given, type) else fix
        raise TypeError("controller must be an object with propose(moments, *, loss, lr), got "
                        f"{given!r}: {fix}")
    return PlainController(given)


def name_of(controller: Controller) -> str:
    """The class's name, of a user's own object too."""
    given = controller.given if isinstance(controller, PlainController) else controller
    return type(given).__name__


class FixedInterval:
    """Measures at one step in `every`, as many samples as the estimator is set to."""

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

    def next_step(self, step: int, measured: bool, batch_size: int, began: float) -> None:
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


@dataclass(frozen=True)
class Price:
    """What a run's clock says of the cost model: measuring costs `factor` times as much, and what
    the scheduler does at every step `fixed` plain steps."""

    factor: float = 1.0
    fixed: float = 0.0

    def for_measuring(self, share: float) -> float:
        """What is left of a share for measuring: at least half of it."""
        return max(share - self.fixed, share / 2)

    def whole(self, share: float) -> float:
        """The whole price where the model says `share`."""
        return self.factor * share + self.fixed

    def is_near(self, other: Price) -> bool:
        """Whether this one differs by too little from the `other` for another plan."""
        ratio = self.factor / other.factor
        return LOWER < ratio < HIGHER and abs(self.fixed - other.fixed) < NEAR_FIXED


class StepTimes:
    """The latest steps by the clock, from the end of one scheduler.step() to that of the next.

    A measured step and the one after it are timed together: an accelerator may do the work then.
    The lower quartiles leave out what happens between two steps now and then, and other processes.
    """

    def __init__(self) -> None:
        # (seconds over the plain cost by the model, steps), and of plain steps the scheduler's own.
        self._measured: deque[tuple[float, int]] = deque(maxlen=9)
        self._plain: deque[float] = deque(maxlen=31)
        self._scheduler: deque[float] = deque(maxlen=31)
        self._held, self._before = 0.0, math.nan

    def add(self, measured: bool, plain_cost: float, began: float, keep: bool) -> None:
        """A step has ended whose scheduler.step() began at `began`; `keep`: its cost is typical."""
        now, before = perf_counter(), self._before
        self._before = now
        seconds, held = (now - before) / plain_cost, self._held
        self._held = 0.0
        if math.isnan(seconds):
            return
        if measured:
            if held:
                self._measured.append((held, 1))
            self._held = seconds if keep else 0.0
        elif held:
            self._measured.append((held + seconds, 2))
        else:
            self._plain.append(seconds)
            self._scheduler.append((now - began) / plain_cost)

    @property
    def are_known(self) -> bool:
        """Whether steps of both kinds were seen."""
        return len(self._plain) >= PLAIN_STEPS and len(self._measured) >= 3

    def costs(self) -> tuple[float, float]:
        """(of a measurement, of the scheduler at every step), in plain steps without either."""
        plain = lower_quartile(self._plain)
        own = min(HOOKS * lower_quartile(self._scheduler), 0.8 * plain)
        added = lower_quartile(seconds - steps * plain for seconds, steps in self._measured)
        return added / (plain - own), own / (plain - own)

    def forget(self, all_steps: bool = False) -> None:
        """Forget the measured steps, whose cost has changed, or all steps."""
        self._measured.clear()
        self._held = 0.0
        if all_steps:
            self._plain.clear()
            self._scheduler.clear()
            self._before = math.nan


def lower_quartile(values: Iterable[float]) -> float:
    """A quarter of the values are smaller.

    Example:
        >>> lower_quartile([5.0, 1.0, 2.0, 9.0])
        2.0
    """
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


class Budget:
    """Measures at most at a share of the training time on average: the taps, and the scheduler's
    own time at every step.

    The first step measures all samples and shows the layers' shapes. S and the interval follow from
    them by the cost model (`within_budget`), and are chosen again at a measured step where the
    batch size has changed by more than a factor of 1.5. When three measurements after the first
    steps have been timed, the model is multiplied by what the clock says, and again where the clock
    has come to differ by a tenth or so: two runs may measure other steps. The first process's clock
    decides for all processes.

    The first WARM_UP = 5 steps are all measured, as controllers need a first estimate at once, and
    the next PLAIN_STEPS = 5 are not, so that both are timed. What the first cost above the budget
    is a debt; while there is any, intervals are a quarter longer (STRETCH), which repays it within
    about 20 of them. Unused budget is not saved up.

    Where FEWEST_SAMPLES at one step in LONGEST_INTERVAL still cost more, the interval grows up to
    100 steps. After WARNED_AFTER = 100 steps that is warned of, or a budget that cannot be kept at
    all, with the figure; measuring is then planned for at least half of the budget. After
    JUDGED_AFTER = 20 measurements a relative standard error of the smoothed trace above
    LARGEST_ERROR = 0.5 is warned about, once.

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
        Measurement(all samples at every step)
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
        self._cost: StepCost | None = None  # not known before a measured step
        self._plain_cost, self._size = (1.0, 0.0), 1
        self._price, self._times, self._calibrated = Price(), StepTimes(), False
        self._debt, self._spent, self._n_measured, self._since = 0.0, 0.0, 0, 0
        self._in_debt = self._warned = self._warned_of_cost = False

    def next_step(self, step: int, measured: bool, batch_size: int, began: float) -> None:
        """A step has ended, whose scheduler.step() began at that time of the clock: prepare the
        estimator for step number `step`."""
        each, per_sample = self._plain_cost
        self._times.add(measured, each + per_sample * self._size, began,
                        keep=self._n_measured > WARM_UP)
        self._size = size = per_pass(self._estimator, batch_size)
        if measured:
            self._n_measured, self._since = self._n_measured + 1, 0
            self._in_debt = self._debt > 1e-9
            self._debt += self._cost_of_step
            self._spent += self._cost_of_step
            other = not size / REPLAN_FACTOR <= self._planned_for <= size * REPLAN_FACTOR
            if other or self._cost is None:
                self._cost = self._see(size)
            if other:
                self._choose(self._cost, size)
            if self._n_measured < 4 * WARM_UP or self._n_measured % WARM_UP == 0:
                self._calibrate(step)
        self._debt = max(0.0, self._debt - self._price.for_measuring(self._share))
        self._since += 1
        every = self.measurement.every
        due = math.ceil(STRETCH * every) if self._in_debt else every
        if self._n_measured == WARM_UP:
            due = max(due, PLAIN_STEPS + 2)
        self._estimator.enabled = self._n_measured < WARM_UP or self._since >= due

    def _see(self, size: int) -> StepCost:
        """The cost by the shapes of the layers, as they are now."""
        cost, shard = self._estimator.cost(), self._estimator.shard
        if shard is not None:
            # Processes may have seen other lengths of sequences: all use what the first saw.
            cost = shard.broadcast_from_first(cost)
        assert cost is not None
        if self._n_measured == 1:
            self._debt = self._spent = cost.share(size)  # the first step, which measured all
        before, none = self._plain_cost, cost.plain(0)
        self._plain_cost = none, cost.plain(1) - none
        if before != self._plain_cost:
            self._times.forget(all_steps=True)
        return cost

    def _calibrate(self, step: int) -> None:
        """Compare the model with the clock, and plan again where they have come to differ."""
        shard, size, model = self._estimator.shard, self._planned_for, self._cost
        found: tuple[float, float] | None = self._times.costs() if self._times.are_known else None
        if shard is not None:
            found = shard.broadcast_from_first(found)
        if found is None or model is None:
            return
        cost, fixed = found
        expected = model.share(size, self.measurement.samples)
        price = Price(max(LEAST_FACTOR, cost / expected), fixed)
        if not self._calibrated or not price.is_near(self._price):
            if not self._calibrated:
                self._debt = price.factor * self._spent - step * price.for_measuring(self._share)
            self._calibrated, self._price = True, price
            self._choose(model, size)
        by_clock = fixed + max(0.0, cost) / self.measurement.every
        self.measurement = replace(self.measurement, clock=by_clock)
        if step >= WARNED_AFTER and not self._warned_of_cost:
            self._judge_cost(fixed)

    def _choose(self, cost: StepCost, size: int) -> None:
        """Plan for steps of that size."""
        price = self._price
        plan = within_budget(cost, size, price.for_measuring(self._share) / price.factor)
        if plan.samples != self.measurement.samples:
            self._times.forget()
        self.measurement = replace(plan, share=self._price.whole(plan.share))
        self._planned_for = size
        self._cost_of_step = self._price.factor * cost.share(size, plan.samples)
        self._estimator.samples = plan.samples

    def _judge_cost(self, fixed: float) -> None:
        """Warn, once, of a budget that cannot be kept, or only by long intervals."""
        plan, size, share = self.measurement, self._planned_for, self._share
        samples = f"{plan.samples or 'all'} of {size} samples"
        least = self._cost_of_step / LONGEST_INTERVAL
        if plan.share > KEPT * share:
            enough = max(2 * fixed, plan.share)  # see Price.for_measuring
            message = (
                f"measure={share:g} cannot be kept on this model: by the clock the scheduler takes "
                f"{fixed:.3g} of a plain step, and measuring {samples} at one step in {plan.every} "
                f"another {plan.share - fixed:.3g}. Raise measure to {enough:.2g} or more, or "
                "choose the steps yourself, measure=adabatch.Every(k)")
        elif plan.every > LONGEST_INTERVAL:
            message = (
                f"measure={share:g} is too small for this model: measuring {samples} at one step "
                f"in {LONGEST_INTERVAL} costs {least:.3g} of a step. It is measured at one step in "
                f"{plan.every} only, so that the batch size follows slowly: raise measure to "
                f"{least + fixed:.2g}, or pass measure='all'")
        else:
            return
        self._warned_of_cost = True
        warnings.warn(message, stacklevel=5)

    def judge(self, trace: MovingAverage) -> None:
        """Warn, once, when too little is measured to know the smoothed trace."""
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
            "factor": self._price.factor, "fixed": self._price.fixed,
            "calibrated": self._calibrated, "spent": self._spent,
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
        self._price = Price(state.get("factor", 1.0), state.get("fixed", 0.0))
        self._calibrated, self._cost = state.get("calibrated", False), None
        self._spent = state.get("spent", 0.0)
        self._times.forget(all_steps=True)
        self._cost_of_step, self._debt = state["cost_of_step"], state["debt"]
        self._n_measured, self._since = state["n_measured"], state["since"]
        self._in_debt, self._warned = state["in_debt"], state["warned"]
        self._warned_of_cost = state["warned_of_cost"]
        self.measurement = Measurement(state["samples"], state["every"], state["expected_share"])
        self._estimator.samples = self.measurement.samples


def plan_for(estimator: Estimator, measure: Every | float) -> FixedInterval | Budget:
    """The plan that `measure` describes; ValueError as Budget."""
    if not isinstance(measure, Every):
        return Budget(estimator, measure)
    if measure.samples is not None:
        estimator.samples = measure.samples
    return FixedInterval(estimator, measure.k)


def per_pass(estimator: Estimator, batch_size: int) -> int:
    """Samples of one backward pass of a step, on one of the processes that share it."""
    world_size = 1 if estimator.shard is None else estimator.shard.world_size
    return max(1, -(-batch_size // (estimator.accumulate * world_size)))
