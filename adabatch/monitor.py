"""monitor: measures the gradient moments of any training loop and changes nothing."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adabatch._checks import check_version, suggest_keywords
from adabatch._types import Part
from adabatch.config import Every, Measure, PerSample, checked_together, measure_of, plain
from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.record import Record
from adabatch.estimators.loss_scale import LossScale
from adabatch.grad_sample import GradSampleHooks
from adabatch.grad_sample.cost import Measurement
from adabatch.interfaces import State
from adabatch.scheduler.decision import plan_for
from adabatch.scheduler.record import (
    GradientNormCheck, GradScalerDetector, HostTransferStage, Pipeline, Recorder,
    StepRecord, UntrackedParameters, rejection_reason,
)
from adabatch.scheduler.scheduler import check_optimizer
from adabatch.wrap import (check_not_hooked, check_one_pass, per_sample_hooks, plan_of, run_checks,
                           warn_of_foreign_parameters)

# Optimizer steps in turn before which a GradScaler may have skipped others: more of them are a loop
# that accumulates.
MOST_RESETS = 3


@suggest_keywords
def monitor(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    measure: Measure = "auto",
    estimator: PerSample | None = None,
    loss_reduction: str = "mean",
    accumulate: int = 1,
    grad_scaler: GradScaler | None = None,
    diagnostics: Diagnostics | None = None,
) -> Monitor:
    """Record the variance of the gradient in any training loop, read only.

    The loop stays as it was, with any data loader: every optimizer.step() appends a record to
    `diagnostics`. Neither lr nor batch size is written.

    Args:
        model, measure, loss_reduction, accumulate, diagnostics: as for `adabatch.wrap`.
        optimizer: its parameters are measured; its step() ends a step.
        estimator: a `PerSample` with a layout, ignored modules, per_parameter=True, ...
        grad_scaler: the GradScaler that scales the loss. A step that it skips is not recorded, and
            the next one is not measured.

    Raises:
        ValueError: layers that cannot be measured exactly (all listed), unknown options, a model
            that is measured already, or one whose batches several processes share.
        TypeError: an optimizer of another kind, an unknown keyword.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with monitor(model, optimizer) as watched:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> watched.diagnostics.n_steps, watched.latest.batch_size, watched.latest.noise_scale > 0
        (3, 8, True)
    """
    check_optimizer(optimizer)
    accumulate = plain(accumulate)
    measured, how, *_ = checked_together(
        lambda: _measure(measure), lambda: _options(estimator),
        *run_checks(loss_reduction, accumulate, grad_scaler, diagnostics))
    _check_alone()
    check_not_hooked(model)
    check_one_pass(optimizer)
    interval, share = plan_of(measured, how, needed=True)
    hooks = per_sample_hooks(
        model, optimizer, how, frozenset(), samples=None if interval is None else interval.samples,
        loss_reduction=loss_reduction, accumulate=accumulate,
    )
    try:
        warn_of_foreign_parameters(model, optimizer)
        plan = Every(interval.k) if interval is not None else share or Every(1)
        return Monitor(optimizer, hooks, plan, grad_scaler=grad_scaler, diagnostics=diagnostics)
    except Exception:
        hooks.remove()
        raise


class Monitor:
    """Records each optimizer step in `diagnostics`; made by `monitor`, removed at the end of with.

    On an accelerator a step's numbers are copied while the next one runs and recorded then;
    flush() records what is under way. The batch size of a step that was not measured is not known:
    that of the last measured step stands for it.
    """

    def __init__(
        self, optimizer: Optimizer, hooks: GradSampleHooks, measure: Every | float, *,
        grad_scaler: GradScaler | None = None, diagnostics: Diagnostics | None = None,
    ):
        self.diagnostics = Diagnostics() if diagnostics is None else diagnostics
        self.step_count = self.samples_seen = 0
        self._optimizer, self._hooks = optimizer, hooks
        self._plan = plan_for(hooks, measure)
        self._recorder, self._began = Recorder(self.diagnostics), math.nan
        self._pipeline = Pipeline([HostTransferStage()])
        self._norms = GradientNormCheck()
        self._untracked = UntrackedParameters(optimizer, hooks.parameters.values())
        self._batch_size = self._resets = 0
        self._loss: Tensor | float = math.nan
        self._scale = None if grad_scaler is None else LossScale(grad_scaler)
        self._detector = GradScalerDetector(optimizer, hooks) if grad_scaler is None else None
        if self._scale is not None:
            hooks.on_backward_end.append(self._scale.record)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def latest(self) -> Record:
        """The record of the last step."""
        return self.diagnostics.latest

    @property
    def measurement_plan(self) -> Measurement:
        """Samples measured of each backward pass (None: all), the interval, the share of time."""
        return self._plan.measurement

    def record_loss(self, loss: Tensor | float) -> None:
        """Optional: the loss of the step, for its record. Call before optimizer.step().

        loss: as it was differentiated: not scaled by a GradScaler, not divided by `accumulate`."""
        self._loss = loss.detach().clone() if isinstance(loss, Tensor) else loss

    def paused(self) -> AbstractContextManager[None]:
        """A context whose backward passes are not measured, e.g. of another loss."""
        return self._hooks.paused()

    def flush(self) -> None:
        """Record the steps that are under way; on the CPU there are none."""
        for seen in self._pipeline.flush():
            self._record(seen)

    def remove(self) -> None:
        """Take all hooks off model and optimizer; the diagnostics stay."""
        self.flush()
        self._handle.remove()
        if self._detector is not None:
            self._detector.remove()
        self._hooks.remove()

    def state_dict(self) -> State:
        """Plain numbers and tensors."""
        self.flush()
        return {"version": 1, "step_count": self.step_count, "samples_seen": self.samples_seen,
                "batch_size": self._batch_size, "enabled": self._hooks.enabled,
                **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict(); ValueError: an unknown version."""
        check_version(state, 1, "Monitor")
        self._pipeline.clear()
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count, self.samples_seen = state["step_count"], state["samples_seen"]
        self._batch_size, self._hooks.enabled = state["batch_size"], state["enabled"]
        self._began = math.nan

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        measured = self._plan.measurement if self._hooks.attached else "removed"
        return f"Monitor(step {self.step_count}, {measured})"

    def _parts(self) -> dict[str, Part]:
        # The plan before the hooks, whose number of samples it sets.
        return {"plan": self._plan, "hooks": self._hooks, "diagnostics": self.diagnostics,
                "trace": self._recorder.trace}

    def _after_step(self, *_: object) -> None:
        """The optimizer's post-hook. Nothing here may wait for an accelerator."""
        began, hooks = time.perf_counter(), self._hooks
        skipped, present = divmod(max(0, hooks.n_passes - 1), hooks.accumulate)
        pending = None
        whole = skipped and present == hooks.accumulate - 1 and self._resets < MOST_RESETS
        if hooks.enabled and whole and self._scale is not None:
            hooks.reset()  # the GradScaler skipped steps, whose passes have not been collected
            self._scale.clear()
            self._resets += 1
        elif hooks.enabled and hooks.n_passes:
            scale = None if self._scale is None else self._scale.take()
            pending, self._resets = hooks.observe(loss_scale=scale), 0
            self._untracked.warn(stacklevel=4)
        seen = StepRecord(
            step=self.step_count, loss=self._loss, moments=None, delivered=0, epoch=0, base_lr=None,
            batch_size=self._batch_size, seconds=began - self._began, pending=pending,
            lrs=[float(group["lr"]) for group in self._optimizer.param_groups])
        self._loss, self._began = math.nan, began
        self.step_count += 1
        for settled in self._pipeline.push(seen):
            self._record(settled)
        size = max(1, self._batch_size)
        self._plan.next_step(self.step_count, pending is not None, size, began)

    def _record(self, seen: StepRecord) -> None:
        seen.settle()
        if self._detector is not None and seen.measured and not self._detector.check():
            self._detector = None
        moments, loss = seen.moments, float(seen.loss)
        if moments is not None:
            self._batch_size = moments.batch_size
        samples = self._batch_size
        if self._hooks.loss_reduction == "sum":
            loss /= max(1, samples)
        known_loss = 0.0 if math.isnan(loss) else loss
        dropped = (seen.not_measured if moments is None
                   else rejection_reason(moments, known_loss))
        usable = None if dropped else moments
        if usable is not None:
            self._norms.update(usable)
        self.samples_seen += samples
        lr = sum(seen.lrs) / len(seen.lrs)
        self._recorder.record(seen, usable, samples=samples, samples_seen=self.samples_seen, lr=lr,
                              loss=loss, dropped=dropped,
                              metrics={} if usable is None else self._hooks.metrics(usable))
        self._plan.judge(self._recorder.trace)


def _measure(measure: Measure) -> float | Every | Literal["auto"] | None:
    """measure=, which must not be None here."""
    if measure is None:
        raise ValueError("measure=None measures nothing: omit monitor(), or pass 'auto', a share, "
                         "adabatch.Every(k) or 'all'")
    return measure_of(measure)


def _options(estimator: PerSample | None) -> PerSample:
    """The options of an estimator that measures single samples."""
    how = PerSample() if estimator is None else estimator
    if not isinstance(how, PerSample):
        raise ValueError(f"estimator must be None or an adabatch.PerSample(...), got {how!r}: "
                         "other estimators need adabatch.wrap")
    return how


def _check_alone() -> None:
    """Refuse several processes: what one of them measures is not the batch's variance."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise ValueError(
            f"monitor measures one process, and {group.get_world_size()} share each batch: use "
            "adabatch.wrap, with controller=controllers.Scheduled('0:SIZE') and measure=0.05 for a "
            "fixed batch size")
