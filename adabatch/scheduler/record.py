"""What a step leaves behind: its record, the queue in which it waits, the checks of the loop,
and the entry in the history."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch import _transfers
from adabatch._transfers import HostCopies
from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.layers import LayerStatistics
from adabatch.diagnostics.record import NO_METRICS, Row
from adabatch.estimators.averages import MovingAverage, Ratio
from adabatch.estimators.moments import GradientMoments, trace_error
from adabatch.interfaces import (NO_INTERVAL, BatchSource, Estimator, NotMeasured, PendingMoments,
                                 State)
from adabatch.micro_batches.token_means import check_token_mean

TOLERANCE = 0.01  # of the mean squared norm: far above float32's rounding
SHAPES_SHOWN = 3
WATCHED_STEPS, WATCHED_GRADIENTS, LEAST_SCALE = 3, 4, 16.0
UNKNOWN_SCALER = (
    "the gradients of this step were divided by {scale:.6g} between loss.backward() and the "
    "optimizer's step, as a GradScaler does that was not passed to adabatch. Gradients are "
    "measured while they carry its scale, so that their variance would be too large by its square. "
    "Pass grad_scaler=scaler to adabatch.wrap or BatchSizeScheduler; for a scale that never "
    "changes, scheduler.step(loss, loss_scale=...) is enough"
)
# Calls of scheduler.step() that are judged together; calls in succession without a batch that are
# too many where the loader was never used, and where one batch may be used several times.
GUARDED_CALLS, IDLE_CALLS, REUSED_CALLS = 8, 3, 20
NO_STEP = (
    "{n} of {calls} calls of scheduler.step() had no step of the optimizer that was wrapped since "
    "the call before, and each call counts as a step: sizes and variances are wrong. If gradients "
    "are accumulated, pass accumulate=k to adabatch.wrap (the number given to Lightning's "
    "accumulate_grad_batches, or to Hugging Face's or Accelerate's gradient_accumulation_steps) "
    "and call scheduler.step(loss) only after optimizer.step(); if a GradScaler skips steps, pass "
    "grad_scaler="
)
SEVERAL_STEPS = (
    "{n} of {calls} calls of scheduler.step() came after several steps of the optimizer: call "
    "scheduler.step(loss) after each optimizer.step(), or batch sizes and the diagnostics lag"
)
NO_BATCH = (
    "no batch of the loader that adabatch.wrap returned was drawn in the last {n} calls of "
    "scheduler.step(), so that the batch size it sets has no effect: iterate over that loader, not "
    "over the one that was passed in, and not over a list of its batches. Frameworks that build a "
    "loader of their own (Hugging Face's Trainer, Accelerate's prepare(), Lightning, skorch) must "
    "be given this one, e.g. by a get_train_dataloader() that returns it"
)
SAME_BATCH = (
    "this step measured {passes} backward passes, but drew {drawn} batches: samples were "
    "differentiated several times and counted as different ones. If one batch has several losses, "
    "add them, call backward() once, and omit accumulate=; otherwise pause the measurement around "
    "all but one of its passes (with scheduler.paused(): ...)"
)


@dataclass(slots=True)
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
        not_measured: why there are no moments, where a step was to be measured and could not be.
        other_size_by: the next batch must differ by so many samples, so that it can be measured.

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
    not_measured: str = ""
    other_size_by: int = 0

    def settle(self) -> None:
        """Turn loss and moments into numbers; where they are on their way from an accelerator, this
        waits for them."""
        if self.copies is not None:
            self.copies.wait()
            self.copies = None
        self.loss = float(self.loss)
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                self.moments = pending.moments()
            except NotMeasured as error:
                self.not_measured = error.reason
                if error.warns:
                    warnings.warn(str(error), stacklevel=2)

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
    step runs; others are there at once."""

    def start(self, record: StepRecord) -> bool:
        """Begin the copies; whether they are to be waited for."""
        loss, pending = record.loss, record.pending
        if isinstance(loss, Tensor):
            record.copies = HostCopies()
            record.loss = record.copies.add(loss)
            if record.copies.under_way:
                return True
        elif pending is None:
            return False
        if pending is not None and pending.lags:
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

    def push(self, record: StepRecord) -> Iterable[StepRecord]:
        """Take this step's record; those that have reached the end, oldest first."""
        if self._waiting:
            self._advance()
        at = self._stage_of(record, 0)
        if at == len(self.stages) and not self._waiting:
            return (record,)
        self._waiting.append((record, at))
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
            self._waiting.append((record, self._stage_of(record, at + 1)))

    def _stage_of(self, record: StepRecord, at: int) -> int:
        """The stage, of those from number `at` on, in which the record waits; their number: none.
        """
        while at < len(self.stages) and not self.stages[at].start(record):
            at += 1
        return at

    def _finished(self) -> Iterator[StepRecord]:
        while self._waiting and self._waiting[0][1] >= len(self.stages):
            yield self._waiting.pop(0)[0]


def scalar_loss(loss: Tensor | float) -> Tensor | float:
    """A step's loss as a number; a tensor of its own on an accelerator, which is not read.

    Raises:
        ValueError: a tensor of several values.
        TypeError: not a number.

    Example:
        >>> scalar_loss(torch.tensor(0.5))
        0.5
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                "step() takes the scalar loss of the step, got a tensor of shape "
                f"{tuple(loss.shape)}: reduce it first, e.g. losses.mean()"
            )
        if _transfers.LAGS_ON_CPU or not loss.is_cpu:  # as is_remote, at every step
            # A compiled step may overwrite it before it is read.
            return loss.detach().reshape(()).clone()
        loss = loss.item()
    try:
        if not isinstance(loss, (str, bytes)):
            return float(loss)
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"step() takes the loss of the step as a scalar tensor or a number, got {loss!r}")


class LossPool:
    """Pools the losses of a batch's micro-batches: Σ m_j l_j / m for means over them, Σ l_j for
    sums. A loop that reports only one loss, on the last micro-batch, reports the batch's own.

    Args:
        loader: where micro-batches come from.
        summed: the losses are sums over the samples.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> LossPool(ResizableBatchSampler(10, 4), summed=False).pool(0.5)
        0.5
    """

    def __init__(self, loader: BatchSource, summed: bool):
        self._micro, self._summed = loader.micro_batches, summed
        self._attempt, self._calls = -1, 0
        self._total: Tensor | float = 0.0

    def pool(self, loss: Tensor | float) -> Tensor | float | None:
        """Take one loss; the batch's, or None while micro-batches of it are to come. One on an
        accelerator is not read: the result is a tensor there.

        Raises:
            ValueError, TypeError: not a scalar.
        """
        micro = self._micro
        if micro is None or micro.count == 1:
            return scalar_loss(loss)
        if self._attempt != micro.attempt:
            self._attempt, self._total, self._calls = micro.attempt, 0.0, 0
        if not self._summed:
            check_token_mean(loss, micro)
        self._calls += 1
        whole = self._summed or (micro.is_last and self._calls == 1)
        self._total = self._total + scalar_loss(loss) * (1 if whole else micro.size)
        if not micro.is_last:
            return None
        return self._total if whole else self._total / micro.batch_size


class EpochCount:
    """Counts the epochs that have ended, from the loader's position in samples.

    An epoch ends with the step after which no further batch is drawn, so that a size set there
    holds from the first batch of the next epoch. Where the length of an epoch is not known, and
    for an epoch that was broken off, the end is seen one step late, when the position restarts.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> sampler = ResizableBatchSampler(10, 4)
        >>> count = EpochCount(sampler)
        >>> [count.after_step() for _ in range(2) for batch in sampler]
        [0, 0, 1, 1, 1, 2]
    """

    def __init__(self, loader: BatchSource):
        self._loader = loader
        self.ended, self._position, self._at_end = 0, math.inf, True
        self._iteration: int | None = None

    def after_step(self) -> int:
        """Call once a step: how many epochs have ended."""
        loader = self._loader
        position, total, iteration = loader.position, loader.num_samples, loader.n_iterations
        known = iteration is not None and self._iteration is not None
        restarted = iteration != self._iteration if known else position <= self._position
        broken_off = restarted and not self._at_end
        # With drop_last a smaller size may draw what was left over: that epoch has been counted.
        counted = self._at_end and not restarted
        left = math.inf if total is None else total - position
        self._at_end = counted or left <= 0 or (loader.drop_last and left < loader.batch_size)
        self.ended += broken_off + (self._at_end and not counted)
        self._position, self._iteration = position, iteration
        return self.ended

    def state_dict(self) -> State:
        """Plain numbers."""
        return {"ended": self.ended, "position": self._position, "at_end": self._at_end}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict()."""
        self.ended, self._position = state["ended"], state["position"]
        self._at_end, self._iteration = state["at_end"], None


# Metrics that have a field of their own in a `Row`.
NOT_REPORTED = dict.fromkeys(("f_star", "f_star_std_error", "preconditioned_trace_ema",
                              "preconditioned_trace_std_error"), math.nan)


class Recorder:
    """Writes what was seen and decided in a step into the history; `trace` is the moving average of
    the variance trace.

    Raises:
        TypeError: `diagnostics` is not a history.
    """

    def __init__(self, diagnostics: Diagnostics):
        if not isinstance(diagnostics, Diagnostics):
            raise TypeError(
                "diagnostics must be None, for a new history, or an adabatch.Diagnostics() to "
                f"append to, got {diagnostics!r}; to write it to a file during the run, call "
                "scheduler.diagnostics.to_jsonl(path)"
            )
        self.diagnostics, self.trace = diagnostics, MovingAverage()

    def record(
        self, seen: StepRecord, moments: GradientMoments | None, *, dropped: str, samples: int,
        samples_seen: int, loss: float, lr: float, metrics: Mapping[str, float],
        proposal: float = math.nan, interval: Ratio | tuple[float, float] = NO_INTERVAL,
        next_size: int | None = None,
    ) -> None:
        """Append one record.

        Args:
            seen: the step.
            moments: unless dropped before the controller saw them.
            dropped: why they were not used; empty where they were.
            metrics: what controller and statistics report.
            samples, samples_seen, loss, lr, proposal, interval, next_size: as in `Record`.
        """
        trace = error = square = signal = math.nan
        n_measured, measured, layers = 0, False, None
        if moments is not None:
            error, freedom = trace_error(moments)
            self.trace.update(moments.variance_trace, moments.n_measured, error, freedom)
            if dropped:
                error = math.nan
            else:
                measured, n_measured, trace = True, moments.n_measured, moments.variance_trace
                square, signal = moments.grad_sq_norm, moments.true_grad_sq_norm
                if moments.by_parameter or moments.by_group:
                    layers = LayerStatistics.of_step(moments)
        reported, others = NOT_REPORTED, NO_METRICS
        if metrics:
            reported, others = dict(NOT_REPORTED), {}
            for name, value in metrics.items():
                (reported if name in NOT_REPORTED else others)[name] = float(value)
        f_star, f_star_error, average, average_error = reported.values()
        low: Ratio | float = math.nan
        high = math.nan
        if isinstance(interval, Ratio):
            low = interval
        elif interval is not NO_INTERVAL:
            low, high = map(float, interval)
        self.diagnostics.add(Row(  # by position, as this is done at every step
            seen.step, samples_seen, samples, proposal, low, high, next_size, lr, loss, f_star,
            f_star_error, n_measured, trace, error, square, signal, average, average_error,
            seen.seconds, measured, dropped, others), layers)


def check_rows(seen: StepRecord, loader: BatchSource) -> None:
    """Compare what the layers saw with what the loader delivered.

    Raises:
        RuntimeError: they differ, and the loader does not run ahead of the training loop.
    """
    size, delivered = seen.samples, seen.delivered
    if delivered and delivered != size and not loader.runs_ahead:
        raise RuntimeError(
            f"the layers saw {size} rows in this step, but the loader delivered {delivered} "
            "samples. If the model puts another dimension first (time first, or samples and "
            "positions flattened together), find its layout with adabatch.check(...); if the loop "
            "leaves samples out, keep their rows and set their losses to 0; if one step uses "
            "several batches, pass accumulate=; if the loop fetches a batch before it has stepped "
            "the last one, leave that to workers (num_workers=)"
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


class LoopGuard:
    """Warns, once each, where the loop does not do what scheduler.step(loss) assumes: one step of
    the optimizer for each call, on batches of the loader that is controlled.

    A few calls without a step are no fault (a GradScaler or the loop skips steps whose gradients
    are not finite, scheduler.step() comes first), nor is a batch used twice.

    Args:
        loader, optimizer: whose batches and steps are to be used.
        count: of the optimizer's steps.
        history: of which steps were dropped.
        accumulate: batches of each step.
        grad_scaler: whose scale falls where it skips a step; None.
    """

    def __init__(self, loader: BatchSource, optimizer: Optimizer, count: StepCount,
                 history: Diagnostics, accumulate: int, grad_scaler: Any = None):
        self._loader, self._optimizer, self._count = loader, optimizer, count
        self._history, self._accumulate = history, accumulate
        self._scaler, self._scale = grad_scaler, math.inf
        self._warned: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Count from here on: at the start, and after a state was loaded."""
        self._steps, self._batches = self._count.steps, self._loader.n_batches
        self._began, self._idle, self._ahead = self._batches, 0, 0
        self._position = self._loader.position
        self._iteration: int | None = None
        self.short = False  # the last measured group of passes was shorter than `accumulate`
        self._calls, self._without, self._several = -1, 0, 0  # the first call has no step before
        self._dropped = self._history.n_dropped

    def after_call(self, measured: bool) -> int:
        """Look at one call of scheduler.step(); the batches drawn since the call before.

        Raises:
            RuntimeError: the same samples were differentiated several times in a measured step.
        """
        loader, steps = self._loader, self._count.steps
        batches = loader.n_batches
        done, self._steps = steps - self._steps, steps
        drawn, self._batches = batches - self._batches, batches
        self._position, self._iteration = loader.position, loader.n_iterations
        if self._calls >= 0:
            self._without += done == 0
            self._several += done > 1
        self._calls += 1
        self._idle = 0 if drawn else self._idle + 1
        if drawn != self._accumulate:
            self._judge_batches(drawn, measured)
        # Missing steps are judged at a call without one, whose gradient is still there.
        if self._calls >= GUARDED_CALLS and (not done or 2 * self._without < self._calls):
            self._judge_steps()
        return drawn

    def untrained_from(self, stepped_at: int) -> int | None:
        """The loader's position before the batches that no step was taken on: of the step that is
        under way. None where there are none, or more than a step has, as after a validation pass.

        stepped_at: batches that were drawn at the last step of the optimizer.
        """
        batches = self._loader.n_batches
        if stepped_at == batches or not 0 < batches - self._batches <= self._accumulate:
            return None
        same = self._iteration in (None, self._loader.n_iterations)
        return self._position if same else 0

    def allow_short(self, error: NotMeasured) -> None:
        """A group of accumulated passes is shorter than `accumulate`, as the last one of an epoch
        may be: two in succession raise the error, the first one is warned about."""
        if self.short:
            raise error
        self.short = True
        self._warn("short", f"{error}. This step is not measured, and is counted in "
                            "scheduler.diagnostics.dropped", stacklevel=5)

    def _judge_batches(self, drawn: int, measured: bool) -> None:
        ahead, accumulate = drawn - self._accumulate, self._accumulate
        self._ahead += ahead if measured else max(0, ahead)  # those fetched before their step
        if accumulate > 1 and self._ahead < 0 and not self._loader.runs_ahead:
            self._ahead = 0
            raise RuntimeError(SAME_BATCH.format(passes=accumulate, drawn=drawn))
        never = self._loader.n_batches == self._began
        if self._idle >= IDLE_CALLS and (never or (
                self._idle >= REUSED_CALLS and not self._loader.runs_ahead)):
            self._warn("batches", NO_BATCH.format(n=self._idle), stacklevel=6)

    def _judge_steps(self) -> None:
        dropped, self._dropped = self._dropped, self._history.n_dropped
        without, several = self._without - (self._dropped - dropped), self._several
        calls, self._calls, self._without, self._several = self._calls, 0, 0, 0
        if 2 * several >= calls:
            self._warn("several", SEVERAL_STEPS.format(n=several, calls=calls), stacklevel=6)
        if 2 * without >= calls and not self._skipped():
            self._warn("steps", NO_STEP.format(n=without, calls=calls), stacklevel=6)

    def _skipped(self) -> bool:
        """Whether steps may have been skipped for gradients that are not finite; this waits."""
        if self._scaler is not None:
            before, self._scale = self._scale, self._scaler.get_scale()
            if self._scale < before:
                return True
        grads = (each.grad for group in self._optimizer.param_groups for each in group["params"]
                 if type(each.grad) is Tensor and each.grad.layout is torch.strided)
        return not all(bool(grad.isfinite().all()) for grad in grads)

    def _warn(self, kind: str, message: str, stacklevel: int) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=stacklevel)


class StepCount(Protocol):
    """Counts the optimizer's steps."""

    steps: int


class GradientNormCheck:
    """Warns once where ‖g‖² is larger than any gradient of these samples can be.

    With all samples measured and equal weights mean ‖g_i‖² >= ‖g‖², since g is the mean of the
    g_i. A gradient that is longer holds something else as well.

    Example:
        >>> check = GradientNormCheck()
        >>> check.exceeds_bound(GradientMoments(2, sq_norms=torch.ones(2), grad_sq_norm=4.0))
        True
    """

    def __init__(self) -> None:
        self._warned = False

    def exceeds_bound(self, moments: GradientMoments) -> bool:
        """Whether the step's gradient is too long for its samples."""
        size = moments.batch_size
        if moments.n_measured != size or moments.inner_products is not None:
            return False
        if moments.effective_batch_size not in (None, size):
            return False
        return moments.grad_sq_norm > (1 + TOLERANCE) * moments.mean_sq_norm

    def update(self, moments: GradientMoments) -> None:
        """Take the moments of a step."""
        if self._warned or not self.exceeds_bound(moments):
            return
        self._warned = True
        warnings.warn(
            f"the gradient's squared norm, {moments.grad_sq_norm:.3g}, is above the samples' mean, "
            f"{moments.mean_sq_norm:.3g}, which is impossible for a mean of their gradients: it "
            "holds something else. Call optimizer.zero_grad() before each step's backward pass; "
            "put penalties on the weights into the optimizer's weight_decay. Until then the "
            "measured variance is too small",
            stacklevel=4,  # the caller of scheduler.step()
        )


class UntrackedParameters:
    """Warns once about parameters that are stepped but not measured, because they were frozen or
    not in the optimizer when measuring began. Parameters frozen later stay tracked.

    Args:
        optimizer: whose parameters are checked.
        measured: what the estimator measures; empty where that is not known: nothing is checked.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.bias.requires_grad_(False) is layer.bias
        True
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> untracked = UntrackedParameters(optimizer, [layer.weight])
        >>> untracked.found()
        []
        >>> layer.bias.requires_grad_(True) is untracked.found()[0]
        True
    """

    def __init__(self, optimizer: Optimizer, measured: Iterable[Tensor]):
        known = {id(parameter) for parameter in measured}
        self._optimizer, self._checks = optimizer, bool(known)
        # Trainable but not measured from the start: left out on purpose, by ignore= for instance.
        self._known = known
        self._known = known | {id(parameter) for parameter in self.found()}

    def found(self) -> list[Tensor]:
        """The parameters that came too late."""
        late: list[Tensor] = []
        for group in self._optimizer.param_groups if self._checks else ():
            for each in group["params"]:
                if id(each) not in self._known and each.requires_grad:
                    late.append(each)
        return late

    def warn(self, stacklevel: int) -> None:
        """Warn once about those found; stacklevel counts from the caller of this method."""
        late = self.found()
        if not late:
            return
        self._checks = False
        shapes = ", ".join(str(list(parameter.shape)) for parameter in late[:SHAPES_SHOWN])
        more = ", …" if len(late) > SHAPES_SHOWN else ""
        warnings.warn(
            f"{len(late)} parameters (of shapes {shapes}{more}) are trained but not measured: they "
            "were unfrozen, or added to the optimizer, after adabatch was attached, so that "
            "variance and gradient norm are those of the others alone. Attach while everything "
            "that will be trained requires grad and is in the optimizer, and freeze afterwards; or "
            "call scheduler.remove() and adabatch.wrap again",
            stacklevel=stacklevel + 1,
        )


class GradScalerDetector:
    """Detects a GradScaler that nobody passed: it divides all gradients by one power of two,
    2^k >= 16, between the end of the backward pass and the optimizer's step.

    The norms of a few gradients are compared at the first three measured steps; then its hooks are
    removed. Clipping gives another factor, zeroed gradients none.

    Example:
        >>> GradScalerDetector.scale_in([65536.0, 65536.0]), GradScalerDetector.scale_in([20.0])
        (65536.0, None)
    """

    def __init__(self, optimizer: Optimizer, estimator: Estimator):
        self._callbacks, self._left = estimator.on_backward_end, WATCHED_STEPS
        self._parameters = list(estimator.parameters.values())
        self._norms: dict[Tensor, Tensor] = {}
        self._ratios: list[tuple[HostCopies, list[Tensor]]] = []
        self._ready: list[HostCopies] = []
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self._callbacks.append(self._on_backward_end)

    def check(self) -> bool:
        """Look at the steps seen so far; whether there is more to come.

        Raises:
            RuntimeError: a scaler divided their gradients.
        """
        waiting, self._ratios = self._ratios, []
        for copies, ratios in waiting:
            if copies.under_way and copies not in self._ready:
                self._ready.append(copies)  # read at the next call, when the copies have arrived
                self._ratios.append((copies, ratios))
                continue
            copies.wait()
            scale = self.scale_in([float(ratio) for ratio in ratios])
            if scale is not None:
                raise RuntimeError(UNKNOWN_SCALER.format(scale=scale))
        if self._left <= 0:
            self._handle.remove()
        return self._left > 0 or bool(self._ratios)

    @staticmethod
    def scale_in(ratios: list[float]) -> float | None:
        """The power of two that all ratios are, if it is at least 16; None otherwise."""
        first = ratios[0] if ratios else 0.0
        if not LEAST_SCALE * 0.99 < first < math.inf:
            return None
        scale = 2.0 ** round(math.log2(first))
        return scale if all(abs(ratio / scale - 1) < 1e-5 for ratio in ratios) else None

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()
        if self._on_backward_end in self._callbacks:
            self._callbacks.remove(self._on_backward_end)

    def _on_backward_end(self) -> None:
        dense = (each for each in self._parameters
                 if type(each.grad) is Tensor and each.grad.layout is torch.strided)
        few = [parameter for parameter, _ in zip(dense, range(WATCHED_GRADIENTS), strict=False)]
        self._norms = {parameter: _norm(parameter) for parameter in few}

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        norms, self._norms = self._norms, {}
        if not norms or torch.compiler.is_compiling():
            return
        copies, ratios = HostCopies(), []
        fused = getattr(optimizer, "grad_scale", None)  # where a GradScaler leaves it to the step
        if isinstance(fused, Tensor):
            ratios = [fused]
        elif all(parameter.grad is not None for parameter in norms):
            ratios = [norms[each] / _norm(each) for each in norms]
        self._ratios.append((copies, [copies.add(ratio) for ratio in ratios]))
        self._left -= 1
        if self._left <= 0:  # the hook itself stays until check(): torch iterates over hooks now
            self._callbacks.remove(self._on_backward_end)


def _norm(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return torch.linalg.vector_norm(parameter.grad.detach().double())
