"""BatchSizeScheduler: the only writer of the batch size and, during a step, of the lr."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch._checks import check_version, storable
from adabatch._table import html
from adabatch._types import Processes
from adabatch.config import (DEFAULT_SHARE, BatchSizes, Coupling, CouplingRule, Every, Measure,
                             measure_of)
from adabatch.controllers import CABS, Seesaw
from adabatch.controllers.seesaw import rule_of_optimizer
from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.record import shown
from adabatch.estimators.averages import Ratio
from adabatch.estimators.loss_scale import LossScale, StepScale
from adabatch.estimators.null import NullEstimator
from adabatch.grad_sample.cost import Measurement
from adabatch.interfaces import (NO_INTERVAL, BatchSource, Controller, Estimator, NotMeasured,
                                 Proposer, RunContext, State)
from adabatch.scheduler.coupling import smoothing_of
from adabatch.scheduler.decision import (CurrentBatchSize, PlainController, SizeRule, as_controller,
                                         call_controller, name_of, plan_for)
from adabatch.scheduler.lr import (LrAdjuster, MeanEffectiveLr, check_unscaled,
                                   effective_lr_of_controller)
from adabatch.scheduler.record import (EpochCount, GradientNormCheck, GradScalerDetector,
                                       HostTransferStage, LoopGuard, LossPool, Pipeline, Recorder,
                                       Stage, StepRecord, UntrackedParameters,
                                       check_rows, rejection_reason)

# Measured steps whose loss graph is checked: the first ones, and then one in CHECKED_EVERY.
CHECKED_STEPS, CHECKED_EVERY = 10, 50
# What a user's loader and estimator must have.
SOURCE = ("batch_size", "drop_last", "num_samples", "position", "n_batches", "n_iterations",
          "recent", "runs_ahead", "micro_batches")
REDUCED_BY_SUM = 2  # as the nodes of torch's loss functions save reduction="sum"
ESTIMATOR = ("observe", "cost", "check_loss", "reset", "remove", "state_dict", "load_state_dict",
             "enabled", "loss_reduction", "accumulate", "parameters", "statistics", "samples",
             "shard", "on_backward_end")


class BatchSizeScheduler:
    """Sets the batch size of the next step from the gradient moments of this one.

    Call step(loss) once per optimizer step, before or after optimizer.step() and zero_grad(). The
    controller is passed the raw moments, the raw loss and the BASE effective lr: the one in
    param_groups, read at every step, so that any torch lr scheduler couples at once; with SGD's
    momentum lr·(1 − dampening)/(1 − momentum); with several groups Σ lr_k T_k / Σ T_k, T_k the
    group's variance trace. Its proposal is rounded half to even, then clipped to the bounds.

    On an accelerator nothing waits for the numbers of a step: they are copied to the host while the
    next one runs, and used when step() is called again; flush() settles what is under way, and
    state_dict() calls it. On the CPU there is no such lag.

    NaN or infinite loss or moments, and a batch of one (it has no variance): the measurement is
    dropped and counted in the diagnostics, the size stays.

    Args:
        optimizer: its step hooks carry the lr factors. A controller that needs an effective lr
            accepts SGD, or any optimizer if the controller has an effective_lr.
        loader: what takes the batch size: an AdaptiveDataLoader or a ResizableBatchSampler. A
            sampler under a DataLoader with workers runs ahead of the training loop; with
            AdaptiveDataLoader the short-batch rule always meets the right batch.
        estimator: measures the moments, e.g. a GradSampleHooks; None where neither controller nor
            coupling needs any.
        controller: an `adabatch.interfaces.Controller`, or any object with propose(moments, *,
            loss, lr) -> batch size; default CABS(), with coupling="seesaw" Seesaw().
        batch_sizes: (minimum, maximum) of a step, in samples, or `BatchSizes`; no batch is larger
            than the loader's epoch.
        coupling: how the lr follows the batch size: a rule's name, a callable, or `Coupling`. The
            controller is passed the lr without it.
        measure: "all" at every step; `Every(k)`; a share of the training time that measuring may
            cost, the scheduler's own time included (`adabatch.scheduler.decision.Budget`), by the
            clock, so that two runs may differ; "auto": a share of 0.05 where the cost is
            known; None: nothing.
        grad_scaler: the GradScaler of the loss: step(loss) takes the loss without its scale.
        diagnostics: a history to append to; default a new one.

    Raises:
        TypeError: a part that lacks what the scheduler uses.
        ValueError: options that do not go together, an optimizer whose effective lr is not known, a
            summed loss with a controller or a coupling for mean losses, or no estimator where
            moments are needed.

    Example:
        >>> import torch, adabatch
        >>> model, data = torch.nn.Linear(4, 1), torch.utils.data.TensorDataset(torch.randn(64, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = adabatch.AdaptiveDataLoader(data, batch_size=16)
        >>> scheduler = BatchSizeScheduler(
        ...     optimizer, loader, adabatch.GradSampleHooks(model), batch_sizes=(8, 32))
        >>> for (inputs,) in loader:
        ...     optimizer.zero_grad()
        ...     loss = model(inputs).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step(loss)
        >>> scheduler.get_last_batch_size() in range(8, 33)
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loader: BatchSource,
        estimator: Estimator | None = None,
        controller: Proposer | None = None,
        *,
        batch_sizes: BatchSizes | tuple[int, int] = BatchSizes(),  # noqa: B008
        coupling: Coupling | str | CouplingRule = "none",
        measure: Measure = "all",
        grad_scaler: Any = None,
        diagnostics: Diagnostics | None = None,
    ):
        sizes, options = BatchSizes.of(batch_sizes), Coupling.of(coupling)
        measured = measure_of(measure)
        if estimator is None:
            estimator = NullEstimator()
        check_parts(optimizer, loader, estimator)
        if measured is None:
            estimator = NullEstimator(estimator.accumulate, estimator.loss_reduction)
        self.optimizer, self.loader, self.estimator = optimizer, loader, estimator
        self.accumulate = accumulate = estimator.accumulate
        self._summed = summed = estimator.loss_reduction == "sum"
        drops = options.short_batch == "drop" or loader.drop_last
        given = None if controller is None else as_controller(controller)
        reads = measured is not None and needs_moments(given, options.rule)
        rule = self.size_rule = SizeRule.for_steps(
            sizes, accumulate, loader.num_samples, drops, reads)
        seesaw = controller is None and options.rule == "seesaw"
        if seesaw:
            first = rule.size_for(loader.batch_size * accumulate)
            given = Seesaw(options.base_batch_size or first, rule_of_optimizer(optimizer))
        chosen = CABS() if given is None else given
        self.context = RunContext(optimizer, estimator.parameters,
                                  batch_size=lambda: loader.batch_size * accumulate)
        chosen.bind(self.context)
        check_summed(chosen, summed)
        first = rule.size_for(chosen.first_batch_size or loader.batch_size * accumulate)
        options = replace(options, base_batch_size=options.base_batch_size or first)
        check_measured(estimator, chosen, options.rule)
        check_unscaled(optimizer)
        if not isinstance(measured, (Every, float)):  # "auto", or None
            known = estimator.samples is None and estimator.cost() is not None
            measured = DEFAULT_SHARE if known else Every(1)
        self._plan = plan_for(estimator, measured)
        self._controller, parameters = chosen, list(estimator.parameters.values())
        of_group = effective_lr_of_controller(chosen, optimizer)
        self._base_lr = MeanEffectiveLr(optimizer, of_group, parameters)
        self.diagnostics = Diagnostics() if diagnostics is None else diagnostics
        self.process_group: Processes = None  # the processes that train together; None: all
        self.step_count = self.samples_seen = 0
        self._measured_at = -1  # the last step that was to be measured
        self._epochs, self._began = EpochCount(loader), math.nan  # the latest step(), by the clock
        self._losses, self._recorder = LossPool(loader, summed), Recorder(self.diagnostics)
        self._pipeline = Pipeline([HostTransferStage()])
        self._lr = LrAdjuster(optimizer, loader, self._base_lr, options, accumulate=accumulate,
                              summed=summed, controller=chosen)
        self._size = CurrentBatchSize(loader, accumulate, first, rule.cooldown)
        self._norm_check, self._warned_of_loss = GradientNormCheck(), False
        self._has_proposed = self._removed = False
        self._guard = LoopGuard(loader, optimizer, self._lr.lr, self.diagnostics, accumulate,
                                grad_scaler)
        self._untracked = UntrackedParameters(optimizer, parameters)
        self._scale = None if grad_scaler is None else LossScale(grad_scaler)
        self._detector: GradScalerDetector | None = None
        if self._scale is not None:
            estimator.on_backward_end.append(self._scale.record)
        elif parameters:
            self._detector = GradScalerDetector(optimizer, estimator)
        estimator.enabled = True
        if options.short_batch == "drop":
            loader.drop_last = True

    # -- torch's surface

    def step(
        self, loss: Tensor | float, *, weights: Tensor | Sequence[float] | None = None,
        loss_scale: float | None = None,
    ) -> None:
        """Take the loss of this step, measure, and set the size of the batches drawn from now on.

        Args:
            loss: the step's loss as it was differentiated over its samples: a scalar tensor or a
                number, the mean over the samples for loss_reduction="mean" (not divided by
                `accumulate`, not multiplied by a GradScaler's scale), their sum for "sum".
            weights: of the samples [m], their numbers of tokens under a token mean.
            loss_scale: a constant factor on the differentiated loss. A GradScaler is passed to
                wrap(grad_scaler=) instead: here its scale may already be the next step's.

        Raises:
            RuntimeError: a measuring step without a backward pass since the last one, or layers
                that saw another number of rows than the loader delivered.
            ValueError: weights without inner products, or a loss_scale that is not positive.
        """
        began = time.perf_counter()
        pooled = self._losses.pool(loss)
        if pooled is None:
            return
        record = self._observe(loss, pooled, weights, loss_scale, began)
        measured = record.pending is not None
        for seen in self._pipeline.push(record):
            self._decide(seen)
        self._plan.next_step(self.step_count, measured, self._size.size, began)

    def flush(self) -> None:
        """Decide now on the steps that are under way; on the CPU there are none."""
        for record in self._pipeline.flush():
            self._decide(record)

    @property
    def controller(self) -> Any:
        """The controller, as it was passed."""
        chosen = self._controller
        return chosen.given if isinstance(chosen, PlainController) else chosen

    def get_last_batch_size(self) -> int:
        """The size of a step from the next batch drawn, in samples (all accumulated passes)."""
        return self._size.size

    @property
    def measurement_plan(self) -> Measurement:
        """What is measured at present: samples of each backward pass (None: all), at one step in
        `every`, the share of the training time that is expected, and the one by the clock."""
        return self._plan.measurement

    def get_last_lr(self) -> list[float]:
        """The lr of each param group as the last optimizer step used it, all factors included."""
        return list(self._lr.lr.last_lrs)

    @property
    def last_lr_factor(self) -> float:
        """The coupling's factor of the last optimizer step; AdaScale's gain is the number of base
        steps by which that step advances an lr schedule."""
        return self._lr.last_lr_factor

    def state_dict(self) -> State:
        """Plain numbers and tensors: counters, the size, and the states of controller, estimator
        and diagnostics. The loader keeps its position itself.

        Raises:
            TypeError: a part's state holds what torch.load(weights_only=True) would refuse.
        """
        self.flush()
        return {
            "version": 2,
            "step_count": self.step_count, "samples_seen": self.samples_seen,
            "batch_size": self._size.size, "steps_since_change": self._size.steps_since_change,
            "measured_at": self._measured_at,
            "lr_weights": self._base_lr.weights, "enabled": self.estimator.enabled,
            **{name: storable(f"the state of the {name}", part.state_dict())
               for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict(): sets the loader's batch size too, within the bounds.

        Raises:
            ValueError: unknown version, here or in a part.
        """
        check_version(state, 2, "BatchSizeScheduler")
        plain = {"step_count", "samples_seen", "batch_size", "steps_since_change", "lr_weights"}
        missing = sorted((plain | {"enabled"} | self._parts().keys()) - state.keys())
        if missing:
            raise ValueError(f"the state of BatchSizeScheduler lacks {missing}: pass all that "
                             "state_dict() returned")
        self._pipeline.clear()
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count, self.samples_seen = state["step_count"], state["samples_seen"]
        self._measured_at = state.get("measured_at", self.step_count - 1)
        self._size.steps_since_change = state["steps_since_change"]
        self._base_lr.weights = list(state["lr_weights"])
        self.estimator.enabled = state["enabled"]
        self._began = math.nan
        self._guard.restart()
        self._size.write(self.size_rule.size_for(state["batch_size"]))

    def untrained_from(self) -> int | None:
        """The loader's position before the batches of a step that is under way and was not taken,
        as in the handler of a KeyboardInterrupt; None between steps."""
        return self._guard.untrained_from(self._lr.stepped_at)

    def paused(self) -> AbstractContextManager[None]:
        """A context whose backward passes are not measured, e.g. all but one of SAM's."""
        return self.estimator.paused()

    def remove(self) -> None:
        """Take all hooks off the optimizer and the model."""
        self._removed = True
        self._lr.remove()
        if self._detector is not None:
            self._detector.remove()
        if self._scale is not None and self._scale.record in self.estimator.on_backward_end:
            self.estimator.on_backward_end.remove(self._scale.record)
        self.estimator.remove()
        for stage in self._pipeline.stages:
            stage.remove()

    def add_stage(self, stage: Stage) -> None:
        """Let each step's record pass one more station before it is decided on. Call before the
        first step; remove() removes it too."""
        self._pipeline.stages.append(stage)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "the scheduler is attached to its model, optimizer and loader and cannot be copied or "
            "pickled: save scheduler.state_dict(), and load it into what adabatch.wrap returns")

    def __repr__(self) -> str:
        name, *rows = self._description()
        return f"{name[0]}({', '.join([name[1], *map(' '.join, rows)])})"

    def _repr_html_(self) -> str:
        return html(self._description())

    def _description(self) -> list[tuple[str, str]]:
        (lowest, highest), size = self.size_rule.bounds, f"{self._size.size}"
        latest = self.diagnostics.latest if len(self.diagnostics) else None
        if latest is not None and latest.batch_size != self._size.size:
            size = f"{latest.batch_size} → {size}"
        removed = ", removed" if self._removed else ""
        rows = [("BatchSizeScheduler", name_of(self._controller) + removed),
                ("batch", f"{size} in [{lowest}, {highest}]"), ("step", f"{self.step_count}")]
        if latest is not None and not math.isnan(latest.noise_scale_ema):
            rows.append(("noise scale", shown(latest, "noise_scale_ema")))
        return rows

    def _parts(self) -> dict[str, Any]:
        """What has a state; the plan before the estimator, whose samples it sets, and the
        controller before the lr, which reads its factor."""
        return {
            "plan": self._plan, "controller": self._controller, "estimator": self.estimator,
            "diagnostics": self.diagnostics, "trace": self._recorder.trace, "lr": self._lr,
            "epochs": self._epochs,
        }

    # -- parts of a step

    def _observe(
        self, loss: Tensor | float, pooled: Tensor | float,
        weights: Tensor | Sequence[float] | None, loss_scale: float | None, began: float,
    ) -> StepRecord:
        """Take what the step leaves behind. Nothing here may wait for an accelerator."""
        estimator, pending, not_measured = self.estimator, None, ""
        if estimator.enabled:
            if self._detector is not None and loss_scale is not None:
                self._detector.remove()
                self._detector = None
            scale: float | StepScale | None = loss_scale
            if self._scale is not None:
                if loss_scale is not None:
                    raise ValueError("the scale is read from the grad_scaler: omit loss_scale=")
                scale = self._scale.take()
            try:
                pending = estimator.observe(weights=weights, loss_scale=scale)
                self._guard.short = False
            except NotMeasured as error:
                self._guard.allow_short(error)
                not_measured = error.reason
            step = self.step_count
            if isinstance(loss, Tensor) and loss.grad_fn is not None and (
                step < CHECKED_STEPS or step % CHECKED_EVERY == 0
            ):
                estimator.check_loss(loss)
                if not self._summed and loss_scale is None:
                    check_mean(loss)
            self._untracked.warn(stacklevel=3)
        drawn = self._guard.after_call(measured=pending is not None)
        drawn = self.accumulate if pending is not None else drawn
        record = StepRecord(
            self.step_count, pooled, None, delivered=self._lr.samples(drawn)[1],
            batch_size=self._size.size, lrs=self._base_lr.read(), base_lr=self._lr.base_lr,
            epoch=self._epochs.after_step(), seconds=began - self._began, pending=pending,
            not_measured=not_measured,
            other_size_by=int(pending is not None and estimator.needs_another_size),
        )
        self.step_count += 1
        self._began = began
        return record

    def _decide(self, seen: StepRecord) -> None:
        """Use or drop what was seen, call the controller, set the size, and record."""
        moments, samples, loss = seen.moments, seen.samples, float(seen.loss)
        if moments is not None:
            if self._detector is not None and not self._detector.check():
                self._detector = None
            check_rows(seen, self.loader)
        if self._summed:
            loss /= max(1, samples)
        dropped = seen.not_measured if moments is None else rejection_reason(moments, loss)
        usable = None if dropped else moments
        if not self._warned_of_loss and not math.isfinite(loss):
            self._warned_of_loss = True
            warnings.warn(
                f"the loss of step {seen.step} is {loss}: the batch size stays, and steps "
                "with such losses are counted as dropped in the diagnostics. If training diverged, "
                "lower the lr or clip the gradient; if inputs are not finite, leave them out",
                stacklevel=3)
        traces: dict[int, float] = {}
        spacing = seen.step - self._measured_at
        if moments is not None or seen.not_measured:  # dropped or not
            self._measured_at = seen.step
        if usable is not None:
            if usable.by_group:
                traces = {group: part.variance_trace for group, part in usable.by_group.items()}
            self._norm_check.update(usable)
            self._lr.on_moments(usable, spacing)
        lr = self._base_lr(traces, seen.lrs)
        proposal = call_controller(
            self._controller, seen, usable, samples=samples or seen.batch_size, loss=loss, lr=lr,
            spacing=spacing)
        own_factor = self._controller.lr_factor()
        if own_factor is not self._lr.own_factor.latest:
            self._lr.own_factor.set(own_factor, after_batch=self.loader.n_batches)
        self._size.update(proposal, self.size_rule)
        interval: Ratio | tuple[float, float] = NO_INTERVAL
        size = self._size.size
        if not math.isnan(proposal):
            self._has_proposed = True
            interval = self._controller.latest_interval()
            if self._lr.lowers:
                self._lr.on_proposal(proposal, self.size_rule.is_met(proposal, size))
        elif usable is not None and self._has_proposed:
            # Before the first proposal the rule does not know enough yet, as under Adam, whose
            # first backward pass comes before its state: that measurement is used.
            dropped = "the controller's proposal is NaN"
        if seen.other_size_by and size == seen.batch_size:
            size = self.size_rule.other_size(size, seen.other_size_by)
            self._size.write(size)
        self.samples_seen += samples
        metrics = self._controller.metrics()
        if usable is not None:
            metrics = {**self.estimator.metrics(usable), **metrics}
        self._recorder.record(
            seen, usable, dropped=dropped, samples=samples or seen.batch_size,
            samples_seen=self.samples_seen, loss=loss, lr=lr, metrics=metrics, proposal=proposal,
            interval=interval, next_size=size)
        if usable is not None:
            self._plan.judge(self._recorder.trace)


def check_mean(loss: Tensor) -> None:
    """Raise a ValueError for a loss that torch's own loss function summed over the batch.

    Example:
        >>> import torch
        >>> outputs = torch.ones(4, requires_grad=True)
        >>> check_mean(torch.nn.functional.mse_loss(outputs, torch.zeros(4), reduction="sum"))
        Traceback (most recent call last):
        ValueError: the loss is a sum over the batch (reduction='sum'), which makes the variance \
wrong by the square of the batch size: use reduction='mean', or pass loss_reduction='sum' to \
adabatch.wrap
    """
    if getattr(loss.grad_fn, "_saved_reduction", None) == REDUCED_BY_SUM:
        raise ValueError(
            "the loss is a sum over the batch (reduction='sum'), which makes the variance wrong by "
            "the square of the batch size: use reduction='mean', or pass loss_reduction='sum' to "
            "adabatch.wrap")


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError for anything but an optimizer."""
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        if isinstance(optimizer, type):
            kind = f"the class {optimizer.__name__}: make one of the model's parameters"
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")


def check_parts(optimizer: Any, loader: BatchSource, estimator: Estimator) -> None:
    """Raise a TypeError that lists what parts lack."""
    check_optimizer(optimizer)
    missing = [name for name in SOURCE if not hasattr(loader, name)]
    if missing:
        raise TypeError(
            "loader must be an AdaptiveDataLoader or a ResizableBatchSampler, got "
            f"{type(loader).__name__} without {', '.join(missing)}: pass a plain DataLoader to "
            "adabatch.wrap"
        )
    missing = [name for name in ESTIMATOR if not hasattr(estimator, name)]
    if missing:
        raise TypeError(
            "estimator must be None or an Estimator, such as adabatch.GradSampleHooks(model), got "
            f"{type(estimator).__name__} without {', '.join(missing)}: derive it from "
            "adabatch.interfaces.Estimator"
        )


def check_summed(controller: Controller, summed: bool) -> None:
    """Raise a ValueError for a summed loss where the controller needs the step per unit of the mean
    gradient."""
    if summed and controller.needs_effective_lr:
        raise ValueError(
            f"{name_of(controller)} needs the step per unit of the mean gradient. With "
            "loss_reduction='sum' that is lr times the batch size, so that a larger batch would "
            "ask for a still larger one: divide the loss by the batch size (loss_reduction='mean') "
            "and multiply the lr by a usual batch size"
        )


def needs_moments(controller: Controller | None, rule: str | CouplingRule) -> bool:
    """Whether the controller (None: not chosen yet) or the coupling reads gradient moments.

    Example:
        >>> needs_moments(None, "seesaw"), needs_moments(None, "none")
        (False, True)
    """
    reads = rule != "seesaw" if controller is None else controller.needs_moments
    return reads or smoothing_of(rule) is not None


def without_moments(controller: Controller | None, rule: str | CouplingRule) -> tuple[str, str]:
    """What reads gradient moments, and what to use instead where there are none.

    Example:
        >>> without_moments(CABS(), "adascale")[0]
        "CABS and coupling='adascale' need"
    """
    names, fixes = [], []
    if controller is None or controller.needs_moments:
        names = ["CABS" if controller is None else name_of(controller)]
        fixes = ["a controller that needs none, such as controllers.Scheduled(...)"]
    if smoothing_of(rule) is not None:
        names.append(f"coupling={rule!r}")
        fixes.append("coupling='linear', 'sqrt' or 'none'")
    verb = "needs" if len(names) == 1 else "need"
    return f"{' and '.join(names)} {verb}", " and ".join(fixes)


def check_measured(
    estimator: Estimator, controller: Controller, rule: str | CouplingRule
) -> None:
    """Raise a ValueError where controller or coupling need moments and nothing is measured, or a
    statistic that the controller requires is missing."""
    name = name_of(controller)
    if isinstance(estimator, NullEstimator):
        if needs_moments(controller, rule):
            names, fixes = without_moments(controller, rule)
            raise ValueError(
                f"{names} gradient moments, but nothing is measured (estimator or measure is "
                f"None): pass adabatch.GradSampleHooks(model), or use {fixes}"
            )
        return
    missing = sorted(controller.requires - estimator.statistics)
    if missing:
        raise ValueError(
            f"{name} with this optimizer needs {' and '.join(missing)}, which the estimator does "
            "not measure: let adabatch.wrap make it, or pass the statistics to GradSampleHooks; "
            "or, for CABS, pass effective_lr=, a callable of a param group"
        )
