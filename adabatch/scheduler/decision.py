"""From a step's moments to the size in force: the controller's proposal, rounding, bounds,
multiples, a series of sizes, cooldown and hysteresis."""

from __future__ import annotations

import bisect
import math
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from adabatch.config import BatchSizes
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import BatchSource, Controller
from adabatch.scheduler.pipeline import StepRecord

MISSING: Any = object()


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
        cls, sizes: BatchSizes, accumulate: int, epoch_samples: int | None, drop_last: bool
    ) -> SizeRule:
        """The rule for steps of `accumulate` equal batches drawn from epochs of `epoch_samples`
        samples (None: not known). A batch larger than an epoch is never delivered whole, and with
        drop_last not at all.

        Raises:
            ValueError: no step fits the bounds; with drop_last also: the smallest batch is larger
                than an epoch.
        """
        multiple = math.lcm(sizes.multiple_of, accumulate)
        rule = cls(**asdict(sizes) | {"multiple_of": multiple})
        if epoch_samples is None or rule.highest <= epoch_samples * accumulate:
            return rule
        smallest = rule.lowest // accumulate
        if smallest <= epoch_samples:
            return replace(rule, maximum=epoch_samples * accumulate)
        if drop_last:
            raise ValueError(
                f"the smallest batch ({smallest} samples) is larger than an epoch "
                f"({epoch_samples}), and with drop_last no batch would ever be drawn: lower the "
                "minimum of batch_sizes"
            )
        warnings.warn(
            f"an epoch has {epoch_samples} samples, less than the smallest batch of {smallest}: "
            "every batch is a short one, for which short_batch='scale' lowers the lr. Lower the "
            "minimum of batch_sizes",
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
        if math.isnan(proposal):
            raise ValueError("the proposed batch size is NaN")
        lowest, highest = self.bounds
        if math.isinf(proposal):
            return highest if proposal > 0 else lowest
        if self.size_ratio is not None:
            above = bisect.bisect_left(self.series, proposal)
            near = self.series[max(0, above - 1) : above + 1]
            return near[0] if len(near) == 1 or proposal**2 < near[0] * near[1] else near[1]
        size = round(proposal / self.multiple_of) * self.multiple_of
        return min(max(size, lowest), highest)

    def next_size(self, proposal: float, present: int, steps_since_change: int) -> int:
        """The size to use after this step: size_for(proposal), unless cooldown or hysteresis keeps
        the present one, which must itself be allowed."""
        size = self.size_for(proposal)
        if self.size_ratio is None:
            kept = abs(size - present) <= self.hysteresis * present
        else:
            reach = math.sqrt(self.size_ratio) * (1 + self.hysteresis)
            kept = present <= proposal * reach and proposal <= present * reach
        kept |= steps_since_change < self.cooldown
        return present if kept and self.size_for(present) == present else size

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
        >>> current.update(24.0, rule), current.update(float("nan"), rule)
        (True, True)
        >>> current.size, loader.batch_size, current.steps_since_change
        (24, 12, 1)
    """

    def __init__(self, loader: BatchSource, accumulate: int, size: int, cooldown: int):
        self._loader, self._accumulate = loader, accumulate
        self.steps_since_change = cooldown
        self.write(size)

    def update(self, proposal: float, rule: SizeRule) -> bool:
        """Set the size that a proposal leads to, or keep it without one (NaN); whether sizes to
        come meet the proposal."""
        if math.isnan(proposal):
            self.steps_since_change += 1
            self.write(self.size)
            return True
        size = rule.next_size(proposal, self.size, self.steps_since_change)
        self.steps_since_change = 0 if size != self.size else self.steps_since_change + 1
        self.write(size)
        return rule.is_met(proposal, size)

    def write(self, size: int) -> None:
        """Set the size."""
        self.size = size
        self._loader.batch_size = size // self._accumulate


def check_rows(seen: StepRecord, loader: BatchSource) -> None:
    """Compare what the layers saw with what the loader delivered.

    Raises:
        RuntimeError: they differ, and the loader does not run ahead of the training loop.
    """
    size, delivered = seen.samples, seen.delivered
    if seen.measured and delivered and delivered != size and not loader.runs_ahead:
        raise RuntimeError(
            f"the layers saw {size} rows in this step, but the loader delivered {delivered} "
            "samples. If the model puts another dimension first (time first, or samples and "
            "positions flattened together), find its layout with adabatch.check(...); if one step "
            "uses several batches, pass accumulate=; if the loop fetches a batch before it has "
            "stepped the last one, leave that to workers (num_workers=)"
        )


def rejection_reason(moments: GradientMoments, loss: float) -> str:
    """Why a measurement cannot be used; empty where it can.

    Example:
        >>> import torch
        >>> rejection_reason(GradientMoments(1, sq_norms=torch.ones(1), grad_sq_norm=1.0), 0.5)
        'batch of one'
    """
    if moments.batch_size < 2:
        return "batch of one" if moments.batch_size else "empty batch"
    if not math.isfinite(loss):
        return "non-finite loss"
    return "" if moments.is_finite else "non-finite gradient"


def call_controller(
    controller: Controller, seen: StepRecord, moments: GradientMoments | None, *,
    loss: float, lr: float,
) -> float:
    """The controller's proposal; NaN where it is not called.

    Args:
        controller: first gets the progress of training.
        seen: the step.
        moments: of the step; None where it was not measured or they cannot be used.
        loss: a mean over the samples.
        lr: the base effective lr.
    """
    controller.on_step(samples=seen.samples or seen.batch_size, epoch=seen.epoch)
    if seen.base_lr is not None:
        controller.on_optimizer_step(seen.base_lr)
    if moments is None and controller.needs_moments:
        return math.nan
    return float(controller.propose(moments, loss=loss, lr=lr))


class PlainController(Controller):
    """A user's object with propose(): what it has is used, the rest are a Controller's defaults."""

    def __init__(self, given: Any):
        self.given = given

    def __getattribute__(self, name: str) -> Any:
        if name == "given" or name.startswith("_"):
            return super().__getattribute__(name)
        value = getattr(self.given, name, MISSING)
        if value is MISSING:
            return super().__getattribute__(name)
        return frozenset(value) if name == "requires" else value

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return float(self.given.propose(moments, loss=loss, lr=lr))


def as_controller(given: Any) -> Controller:
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
