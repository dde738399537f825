"""BatchSizeScheduler: the only writer of the batch size and, for the length of a step, of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch._checks import check_version
from adabatch.controllers import CABS, Seesaw
from adabatch.coupling import Coupling, rule_of_optimizer
from adabatch.diagnostics import Diagnostics
from adabatch.estimators.null import NullEstimator
from adabatch.grad_sample.cost import Measurement
from adabatch.interfaces import Controller, RunContext
from adabatch.scheduler.arguments import bind_controller, check_loss, check_measured, check_options, epoch_samples, rejection_reason
from adabatch.scheduler.decision import ask, check_rows, proposal_bounds
from adabatch.scheduler.effective_lr import MeanEffectiveLr, effective_lr_of_controller
from adabatch.scheduler.health import GradientNormCheck
from adabatch.scheduler.late_parameters import UntrackedParameters
from adabatch.scheduler.losses import LossPool
from adabatch.scheduler.lr import EpochCount, LrAdjuster
from adabatch.scheduler.pipeline import HostTransferStage, Pipeline, Stage, StepRecord
from adabatch.scheduler.plan import plan_for
from adabatch.scheduler.record import Recorder, StepClock
from adabatch.scheduler.size_in_force import CurrentBatchSize
from adabatch.scheduler.sizing import SizeRule
from adabatch.scheduler.step_factor import check_unscaled


class BatchSizeScheduler:
    """Sets the batch size of the next step from the gradient moments of this one.

    Call step(loss) once per optimizer step, before or after optimizer.step() and zero_grad(). The controller is handed the raw moments, the raw loss and the
    BASE effective lr: the one in param_groups, read at every step, so that any torch lr scheduler couples at once; with SGD's momentum
    lr·(1 − dampening)/(1 − momentum); with several groups Σ lr_k T_k / Σ T_k, T_k the group's variance trace (hooks made with param_groups=). Its proposal is
    rounded half to even, then clipped to the bounds.

    On an accelerator nothing waits for the numbers of a step: they are copied to the host while the next one runs, and decided on, recorded and checked when
    step() is called again; flush() settles what is under way, and state_dict() calls it. On the CPU there is no such lag.

    NaN or infinite loss or moments, and a batch of one (it has no variance): the measurement is dropped and counted in the diagnostics, the size holds.

    A controller with `needs_moments = False` is asked at every step, measured or not; one with a `first_batch_size` chooses the first size.

    Args:
        optimizer: its step hooks carry the lr factors. A controller that needs an effective lr accepts SGD, or any optimizer where it has its own effective_lr.
        loader: what takes the batch size: an AdaptiveDataLoader or a ResizableBatchSampler. A sampler under a DataLoader with workers runs ahead of the
            training loop; use AdaptiveDataLoader (adabatch.wrap does) for the short-batch rule to meet the right batch.
        hooks: a GradSampleHooks, or anything with collect() -> GradientMoments, a settable `enabled`, remove(), state_dict() and load_state_dict(); None
            where neither controller nor coupling needs moments: nothing is measured.
        controller: propose(moments, loss=, lr=) -> proposed batch size; default CABS(), with coupling='seesaw' Seesaw().
        min_batch_size, max_batch_size: bounds of the step's size, in samples; no batch is larger than the loader's epoch.
        multiple_of: sizes are multiples of this.
        every: measure at every so many steps; the others add no node to the graph and keep the size.
        overhead: the share of a step that measuring may cost on average: chooses samples and interval, see `adabatch.scheduler.plan.Budget`; None: as `every` and the
            hooks say.
        dwell, hysteresis: steps between changes, and relative change up to which the size is kept; off by default.
        ladder: e.g. 1.25, for few sizes, each so many times the one below; see SizeRule.
        spill: 'lr' lowers the lr by size/proposal while the sizes fall short of the proposal, by max_batch_size, dwell or hysteresis, which keeps the noise level
            asked for; None does nothing.
        short_batch: a batch shorter than asked for (the last of an epoch) steps with lr × its size / the size asked for ('scale'; a summed loss does so by
            itself), as it is ('keep'), or is never drawn ('drop').
        coupling: the factor on the lr of a batch of another size than base_batch_size: 'none', 'linear', 'sqrt', 'adascale', 'seesaw', or a callable (see
            adabatch.coupling). The controller is told the lr without it.
        base_batch_size: the size for which the lr was chosen; default the first size.
        scale_betas: step with Adam's betas to the power batch/base, which keeps their horizon in samples (see adabatch.scheduler.betas).
        diagnostics: a history to append to; default a new one.

    Raises:
        ValueError: bounds out of order, an unknown option, an optimizer whose effective lr is not known, a summed loss with a controller or a coupling for
            mean losses, or no hooks where moments are needed.

    Example:
        >>> import torch, adabatch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = adabatch.AdaptiveDataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4)), batch_size=16)
        >>> scheduler = BatchSizeScheduler(optimizer, loader, adabatch.GradSampleHooks(model), min_batch_size=8, max_batch_size=32)
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
        loader: Any,
        hooks: Any,
        controller: Controller | None = None,
        *,
        min_batch_size: int = 16,
        max_batch_size: int = 2048,
        multiple_of: int = 1,
        every: int = 1,
        overhead: float | None = None,
        dwell: int = 0,
        hysteresis: float = 0.0,
        ladder: float | None = None,
        spill: str | None = None,
        short_batch: str = "scale",
        coupling: str | Coupling = "none",
        base_batch_size: int | None = None,
        scale_betas: bool = False,
        diagnostics: Diagnostics | None = None,
    ):
        hooks = NullEstimator() if hooks is None else hooks
        controller = CABS() if controller is None and coupling != "seesaw" else controller
        self.accumulate = accumulate = getattr(hooks, "accumulate", 1)
        size_rule = SizeRule(min_batch_size, max_batch_size, multiple_of, dwell, hysteresis, ladder)
        self._summed = getattr(hooks, "loss_reduction", "mean") == "sum"
        self.context = RunContext(optimizer, getattr(hooks, "parameters", {}), batch_size=lambda: loader.batch_size * accumulate)
        bind_controller(controller, self.context)
        check_options(optimizer, loader, controller, summed=self._summed, every=every, spill=spill, short_batch=short_batch)
        self.size_rule = size_rule.for_steps(self.accumulate, epoch_samples(loader), short_batch == "drop" or loader.drop_last)
        first = self.size_rule.size_for((None if controller is None else controller.first_batch_size) or loader.batch_size * self.accumulate)
        base_batch_size = first if base_batch_size is None else base_batch_size
        self.controller = Seesaw(base_batch_size, rule_of_optimizer(optimizer)) if controller is None else controller
        check_measured(hooks, self.controller, coupling)
        check_unscaled(optimizer)
        self.optimizer, self.loader, self.hooks = optimizer, loader, hooks
        self._plan, self.short_batch = plan_for(hooks, every, overhead), short_batch
        self._base_lr = MeanEffectiveLr(optimizer, effective_lr_of_controller(self.controller, optimizer), getattr(hooks, "parameters", {}).values())
        self.diagnostics = Diagnostics() if diagnostics is None else diagnostics
        self.step_count = self.samples_seen = 0
        self._epochs, self._losses, self._clock = EpochCount(loader), LossPool(loader, self._summed), StepClock()
        self._pipeline, self._recorder = Pipeline([HostTransferStage()]), Recorder(self.diagnostics)
        factors = {"coupling": coupling, "base_batch_size": base_batch_size, "spill": spill, "short_batch": short_batch, "scale_betas": scale_betas}
        self._stepping = LrAdjuster(optimizer, loader, self._base_lr, accumulate=self.accumulate, summed=self._summed, controller=self.controller, **factors)
        self._force = CurrentBatchSize(loader, self.accumulate, first, self.size_rule.dwell)
        self._stale, self._late = GradientNormCheck(), UntrackedParameters(optimizer, getattr(hooks, "parameters", {}).values())
        hooks.enabled = True
        if hasattr(hooks, "loss_scale"):
            hooks.loss_scale.watch(optimizer)
        if short_batch == "drop":
            loader.drop_last = True

    # -- torch's surface

    def step(self, loss: Tensor | float, *, weights: Tensor | Sequence[float] | None = None, loss_scale: float | None = None) -> None:
        """Take the loss of this step, measure, and set the size of the batches drawn from now on.

        Args:
            loss: the step's loss as it was differentiated over the samples of the step: a scalar tensor or a number, the mean over the samples for
                loss_reduction='mean' (not divided by `accumulate`, not multiplied by a GradScaler's scale), their sum for 'sum'.
            weights, loss_scale: as in GradSampleHooks.collect(): the samples' numbers of tokens under a token mean; a factor on the differentiated loss. A
                GradScaler is given to the hooks, or to wrap(grad_scaler=), beforehand: here its scale may already be the next step's.

        Raises:
            RuntimeError: a measuring step without a backward pass since the last one, or layers that saw another number of rows than the loader delivered.
            ValueError: weights without inner_products=True, or a loss_scale that is no positive number.
        """
        pooled = self._losses.pool(loss)
        if pooled is None:
            return
        given = {name: option for name, option in (("weights", weights), ("loss_scale", loss_scale)) if option is not None}
        observation = self._observe(loss, pooled, given)
        measured = observation.measured
        for seen in self._pipeline.push(observation):
            self._decide(seen)
        self._plan.next_step(self.step_count, measured, self._force.size)

    def flush(self) -> None:
        """Decide now on the steps that are under way; on the CPU there are none."""
        for observation in self._pipeline.flush():
            self._decide(observation)

    def get_last_batch_size(self) -> int:
        """The size of a step's batch from the next one drawn, in samples (all accumulated passes together)."""
        return self._force.size

    @property
    def measurement(self) -> Measurement:
        """What is measured at present: samples of each backward pass (None: all), at one step in `every`, and the share of the training time expected."""
        return self._plan.measurement

    def get_last_lr(self) -> list[float]:
        """The lr of each param group as the last optimizer step used it, coupling, spill and short-batch factors included."""
        return list(self._stepping.lr.last_lrs)

    def get_last_coupling(self) -> float:
        """The coupling's factor of the last optimizer step; AdaScale's gain is by how many steps of the base batch that step counts in an lr schedule."""
        return self._stepping.last_coupling

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors: counters, the size, and the states of controller, hooks and diagnostics. The loader's position is the loader's own."""
        self.flush()
        return {
            "version": 1,
            "step_count": self.step_count,
            "samples_seen": self.samples_seen,
            "batch_size": self._force.size,
            "steps_since_change": self._force.steps_since_change,
            "lr_weights": self._base_lr.weights,
            "enabled": self.hooks.enabled,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(): sets the loader's batch size too, within the present bounds.

        Raises:
            ValueError: unknown version, here or in a part.
        """
        check_version(state, 1, "BatchSizeScheduler")
        plain = {"step_count", "samples_seen", "batch_size", "steps_since_change", "lr_weights", "enabled"}
        missing = sorted((plain | self._parts().keys()) - state.keys())
        if missing:
            raise ValueError(f"the state of BatchSizeScheduler lacks {missing}: pass what state_dict() returned, whole")
        self._pipeline.clear()
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count, self.samples_seen = state["step_count"], state["samples_seen"]
        self._force.steps_since_change = state["steps_since_change"]
        self._base_lr.weights = list(state["lr_weights"])
        self.hooks.enabled = state["enabled"]
        self._clock.reset()
        self._force.write(self.size_rule.size_for(state["batch_size"]))

    def remove(self) -> None:
        """Take all hooks off the optimizer and the model."""
        self._stepping.remove()
        self.hooks.remove()
        for stage in self._pipeline.stages:
            if hasattr(stage, "remove"):
                stage.remove()

    def add_stage(self, stage: Stage) -> None:
        """Let what is seen of each step pass one more station before it is decided on. Call before the first step; remove() removes it too."""
        self._pipeline.stages.append(stage)

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own; the plan before the hooks, whose samples it sets, and the controller before the stepping, which asks it for its rule."""
        parts = {"plan": self._plan, "controller": self.controller, "hooks": self.hooks, "diagnostics": self.diagnostics, "trace": self._recorder.trace}
        return {**parts, "stepping": self._stepping, "epochs": self._epochs}

    # -- parts of a step

    def _observe(self, loss: Tensor | float, pooled: Tensor | float, given: dict[str, Any]) -> StepRecord:
        """Take what the step leaves behind, and make the hooks ready for the next one. Nothing here may wait for an accelerator."""
        self._stepping.restore()
        moments = getattr(self.hooks, "observe", self.hooks.collect)(**given) if self.hooks.enabled else None
        if moments is not None:
            check_loss(self.hooks, loss, self.step_count)
            self._late.warn(stacklevel=3)
        observation = StepRecord(
            step=self.step_count,
            loss=pooled,
            moments=moments,
            delivered=self._stepping.samples(),
            batch_size=self._force.size,
            lrs=self._base_lr.read(),
            base_lr=self._stepping.base_lr,
            epoch=self._epochs.after_step(),
            seconds=self._clock.lap(),
        )
        self.step_count += 1
        return observation

    def _decide(self, seen: StepRecord) -> None:
        """Use or drop what was seen, ask the controller, move, and record."""
        seen.settle()
        moments, samples = seen.moments, seen.samples
        check_rows(seen, self.loader)
        loss = seen.loss / max(1, samples) if self._summed else seen.loss
        dropped = "" if moments is None else rejection_reason(moments, loss)
        usable = None if dropped else moments
        lr = self._base_lr({} if usable is None else {group: part.variance_trace for group, part in usable.by_group.items()}, seen.lrs)
        if usable is not None:
            self._stale.look(usable)
            self._stepping.measured(usable)
        proposal = ask(self.controller, seen, usable, loss=loss, lr=lr)
        self._stepping.asked()
        if usable is not None and math.isnan(proposal):
            dropped = "the controller's proposal is NaN"
        sure = proposal_bounds(self.controller, proposal)
        is_met = self._force.move(proposal, self.size_rule)
        if not math.isnan(proposal):
            self._stepping.proposed(proposal, is_met)
        self.samples_seen += samples
        decided = {"samples_seen": self.samples_seen, "proposed_batch_size": proposal, "next_batch_size": self._force.size, "dropped": dropped}
        self._recorder.record(seen, usable, lr=lr, loss=loss, **decided, **sure)
        self._plan.judge(self._recorder.trace)
