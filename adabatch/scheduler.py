"""BatchSizeScheduler: the only writer of the batch size and, for the length of a step, of the learning rate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch.arguments import bind_controller, check_loss, check_measured, check_options, epoch_samples, reason_to_drop
from adabatch.controllers import CABS, Seesaw
from adabatch.coupling import Coupling, rule_of_optimizer
from adabatch.diagnostics import Diagnostics
from adabatch.effective_lr import EffectiveLr, MeanLr, effective_lr_for
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.unmeasured import Unmeasured
from adabatch.losses import LossPool
from adabatch.sizing import SizeRule
from adabatch.state import check_version
from adabatch.stepping import EpochCount, Stepping

CHECKED_STEPS, CHECKED_EVERY = 10, 50  # measured steps whose loss graph is looked at: the first ones, and then some
logger = logging.getLogger(__name__)


class BatchSizeScheduler:
    """Sets the batch size of the next step from the gradient moments of this one.

    Call step(loss) once per optimizer step, before or after optimizer.step() and zero_grad(). The controller is handed the raw moments, the raw loss and the
    BASE effective lr: the one in param_groups, read at every step, so that any torch lr scheduler couples at once; with SGD's momentum
    lr·(1 − dampening)/(1 − momentum); with several groups Σ lr_k T_k / Σ T_k, T_k the group's variance trace (hooks made with param_groups=). Its wish is
    rounded half to even, then clipped to the bounds.

    NaN or infinite loss or moments, and a batch of one (it has no variance): the measurement is dropped and counted in the diagnostics, the size holds.

    A controller with `needs_moments = False` is asked at every step, measured or not, with whatever moments there are or None. One with an `advance` is told
    at every step, before it is asked, the samples of the step and how many epochs have ended; one with a `stepped_with` the base lr of the last optimizer
    step; one with a `first_batch_size` chooses the first size.

    Args:
        optimizer: its step hooks carry the lr factors. A controller that needs an effective lr accepts SGD, or any optimizer with effective_lr=.
        loader: what takes the batch size: an AdaptiveDataLoader or a ResizableBatchSampler. A sampler under a DataLoader with workers runs ahead of the
            training loop; use AdaptiveDataLoader (adabatch.wrap does) for the short-batch rule to meet the right batch.
        hooks: a GradSampleHooks, or anything with collect() -> GradientMoments, a settable `enabled`, remove(), state_dict() and load_state_dict(); None
            where neither controller nor coupling needs moments: nothing is measured.
        controller: propose(moments, loss=, lr=) -> wished batch size; default CABS(), with coupling='seesaw' Seesaw().
        min_batch_size, max_batch_size: bounds of the step's size, in samples; no batch is larger than the loader's epoch.
        multiple_of: sizes are multiples of this.
        every: measure at every so many steps; the others add no node to the graph and keep the size.
        dwell, hysteresis: steps between changes, and relative change up to which the size is kept; off by default.
        ladder: e.g. 1.25, for few sizes, each so many times the one below; see SizeRule.
        spill: 'lr' lowers the lr by size/wish while the sizes fall short of the wish, by max_batch_size, dwell or hysteresis, which keeps the noise level
            asked for; None does nothing.
        short_batch: a batch shorter than asked for (the last of an epoch) steps with lr × its size / the size asked for ('scale'; a summed loss does so by
            itself), as it is ('keep'), or is never drawn ('drop').
        coupling: the factor on the lr of a batch of another size than base_batch_size: 'none', 'linear', 'sqrt', 'adascale', 'seesaw', or a callable (see
            adabatch.coupling). The controller is told the lr without it.
        base_batch_size: the size for which the lr was chosen; default the first size.
        scale_betas: step with Adam's betas to the power batch/base, which keeps their horizon in samples (see adabatch.betas).
        effective_lr: a callable of a param group for optimizers other than SGD.
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
        controller: Any = None,
        *,
        min_batch_size: int = 16,
        max_batch_size: int = 2048,
        multiple_of: int = 1,
        every: int = 1,
        dwell: int = 0,
        hysteresis: float = 0.0,
        ladder: float | None = None,
        spill: str | None = None,
        short_batch: str = "scale",
        coupling: str | Coupling = "none",
        base_batch_size: int | None = None,
        scale_betas: bool = False,
        effective_lr: EffectiveLr | None = None,
        diagnostics: Diagnostics | None = None,
    ):
        hooks = Unmeasured() if hooks is None else hooks
        controller = CABS() if controller is None and coupling != "seesaw" else controller
        self.accumulate = getattr(hooks, "accumulate", 1)
        size_rule = SizeRule(min_batch_size, max_batch_size, multiple_of, dwell, hysteresis, ladder)
        self._summed = getattr(hooks, "loss_reduction", "mean") == "sum"
        bind_controller(controller, optimizer, effective_lr, hooks)
        check_options(optimizer, loader, controller, summed=self._summed, every=every, spill=spill, short_batch=short_batch)
        self.size_rule = size_rule.for_steps(self.accumulate, epoch_samples(loader), short_batch == "drop" or loader.drop_last)
        self._batch_size = self.size_rule.size_for(getattr(controller, "first_batch_size", None) or loader.batch_size * self.accumulate)
        base_batch_size = self._batch_size if base_batch_size is None else base_batch_size
        self.controller = Seesaw(base_batch_size, rule_of_optimizer(optimizer)) if controller is None else controller
        check_measured(hooks, self.controller, coupling)
        self.optimizer, self.loader, self.hooks = optimizer, loader, hooks
        self.every, self.short_batch = every, short_batch
        self._base_lr = MeanLr(optimizer, self._choose_effective_lr(effective_lr), getattr(hooks, "parameters", {}).values())
        self.diagnostics = Diagnostics() if diagnostics is None else diagnostics
        self.step_count = self.samples_seen = 0
        self._steps_since_change = self.size_rule.dwell
        self._trace, self._epochs, self._losses = MovingAverage(), EpochCount(loader), LossPool(loader, self._summed)
        self._clock: float | None = None
        factors = {"coupling": coupling, "base_batch_size": base_batch_size, "spill": spill, "short_batch": short_batch, "scale_betas": scale_betas}
        self._stepping = Stepping(optimizer, loader, self._base_lr, accumulate=self.accumulate, summed=self._summed, controller=self.controller, **factors)
        self._write_batch_size(self._batch_size)
        hooks.enabled = True
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
            ValueError: weights without dots=True, or a loss_scale that is no positive number.
        """
        value = self._losses.pool(loss)
        if value is None:
            return
        self._stepping.restore()
        given = {name: option for name, option in (("weights", weights), ("loss_scale", loss_scale)) if option is not None}
        moments = self.hooks.collect(**given) if self.hooks.enabled else None
        if moments is not None and (self.step_count < CHECKED_STEPS or self.step_count % CHECKED_EVERY == 0):
            check_loss(self.hooks, loss)
        samples = self._samples_of_step(moments)
        if self._summed:
            value /= max(1, samples)
        dropped = "" if moments is None else reason_to_drop(moments, value)
        lr = self._base_lr({} if moments is None or dropped else {group: part.variance_trace for group, part in moments.by_group.items()})
        used, usable = self._batch_size, None if dropped else moments
        if usable is not None:
            self._trace.update(usable.variance_trace, usable.n_measured)
            self._stepping.measured(usable)
        wish = self._ask(usable, value, lr, samples or used)
        self._stepping.asked()
        if usable is not None and math.isnan(wish):
            dropped = "the controller's wish is NaN"
        if math.isnan(wish):
            self._steps_since_change += 1
        else:
            self._move(wish)
        self.samples_seen += samples
        self._record(samples or used, wish, lr, value, moments, dropped)
        self.step_count += 1
        self.hooks.enabled = self.step_count % self.every == 0

    def get_last_batch_size(self) -> int:
        """The size of a step's batch from the next one drawn, in samples (all accumulated passes together)."""
        return self._batch_size

    def get_last_lr(self) -> list[float]:
        """The lr of each param group as the last optimizer step used it, coupling, spill and short-batch factors included."""
        return list(self._stepping.lr.last_lrs)

    def get_last_coupling(self) -> float:
        """The coupling's factor of the last optimizer step; AdaScale's gain is by how many steps of the base batch that step counts in an lr schedule."""
        return self._stepping.last_coupling

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors: counters, the size, and the states of controller, hooks and diagnostics. The loader's position is the loader's own."""
        return {
            "version": 1,
            "step_count": self.step_count,
            "samples_seen": self.samples_seen,
            "batch_size": self._batch_size,
            "steps_since_change": self._steps_since_change,
            "stepping": self._stepping.state_dict(),
            "epochs": self._epochs.state_dict(),
            "lr_weights": self._base_lr.weights,
            "trace": self._trace.state_dict(),
            "enabled": self.hooks.enabled,
            "controller": self.controller.state_dict(),
            "hooks": self.hooks.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(): sets the loader's batch size too, within the present bounds.

        Raises:
            ValueError: unknown version, here or in a part.
        """
        check_version(state, 1, "BatchSizeScheduler")
        self.controller.load_state_dict(state["controller"])
        self.hooks.load_state_dict(state["hooks"])
        self.diagnostics.load_state_dict(state["diagnostics"])
        self._trace.load_state_dict(state["trace"])
        self.step_count, self.samples_seen = state["step_count"], state["samples_seen"]
        self._steps_since_change = state["steps_since_change"]
        self._base_lr.weights = list(state["lr_weights"])
        self._stepping.load_state_dict(state["stepping"])
        self._epochs.load_state_dict(state["epochs"])
        self.hooks.enabled = state["enabled"]
        self._clock = None
        self._write_batch_size(self.size_rule.size_for(state["batch_size"]))

    def remove(self) -> None:
        """Take all hooks off the optimizer and the model."""
        self._stepping.remove()
        self.hooks.remove()

    # -- parts of a step

    def _choose_effective_lr(self, given: EffectiveLr | None) -> EffectiveLr:
        if given is None and not getattr(self.controller, "needs_effective_lr", False):
            return lambda group: float(group["lr"])
        chosen = effective_lr_for(self.optimizer, given)
        if given is None and any(group.get("momentum") for group in self.optimizer.param_groups):
            logger.info("SGD with momentum: the controller is handed the effective lr, lr*(1 - dampening)/(1 - momentum)")
        return chosen

    def _samples_of_step(self, moments: GradientMoments | None) -> int:
        delivered = self._stepping.samples()
        if moments is None:
            return delivered or self._batch_size
        if delivered and delivered != moments.batch_size and not getattr(self.loader, "runs_ahead", False):
            raise RuntimeError(
                f"the layers saw {moments.batch_size} rows in this step, but the loader delivered {delivered} samples. If the model puts another dimension "
                "first (time first, or samples and positions flattened together), settle its layout with adabatch.check(...); if one step uses several "
                "batches, pass accumulate=; if the loop fetches a batch before it has stepped the last one, leave that to workers (num_workers=)"
            )
        return moments.batch_size

    def _ask(self, moments: GradientMoments | None, loss: float, lr: float, samples: int) -> float:
        """The controller's wish; NaN where it is not asked."""
        epoch = self._epochs.after_step()
        if hasattr(self.controller, "advance"):
            self.controller.advance(samples=samples, epoch=epoch)
        if hasattr(self.controller, "stepped_with") and self._stepping.base_lr is not None:
            self.controller.stepped_with(self._stepping.base_lr)
        if moments is None and getattr(self.controller, "needs_moments", True):
            return math.nan
        return float(self.controller.propose(moments, loss=loss, lr=lr))

    def _move(self, wish: float) -> None:
        size = self.size_rule.next_size(wish, self._batch_size, self._steps_since_change)
        self._steps_since_change = 0 if size != self._batch_size else self._steps_since_change + 1
        self._stepping.wished(wish, self.size_rule.is_met(wish, size))
        self._write_batch_size(size)

    def _write_batch_size(self, size: int) -> None:
        self._batch_size = size
        self.loader.batch_size = size // self.accumulate

    def _record(self, samples: int, wish: float, lr: float, loss: float, moments: GradientMoments | None, dropped: str) -> None:
        now, before = time.perf_counter(), self._clock
        self._clock = now
        fields = {}
        if moments is not None and not dropped:
            fields = {name: getattr(moments, name) for name in ("variance_trace", "grad_sq_norm", "true_grad_sq_norm")}
            fields["variance_trace_std_error"] = self._trace.std_error()
        self.diagnostics.append(
            step=self.step_count,
            samples_seen=self.samples_seen,
            batch_size=samples,
            proposed_batch_size=wish,
            next_batch_size=self._batch_size,
            lr=lr,
            loss=loss,
            seconds=math.nan if before is None else now - before,
            measured=moments is not None,
            dropped=dropped,
            **fields,
        )
