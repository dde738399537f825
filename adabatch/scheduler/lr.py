"""What an optimizer step is multiplied by, and how epochs are counted: the parts of the scheduler that look at the batches delivered.

Legend: B the size asked for of the batch being stepped (all accumulated passes together), b the size delivered, B₀ the base batch size, W a proposal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from adabatch._checks import check_version
from adabatch.coupling import Coupling, coupling_for
from adabatch.diagnostics.record import noise_scale
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import Controller
from adabatch.scheduler.arguments import epoch_samples
from adabatch.scheduler.betas import BetaRescaler
from adabatch.scheduler.effective_lr import MeanEffectiveLr
from adabatch.scheduler.step_factor import Pending, StepFactor


class LrAdjuster:
    """The factor on the lr of each step: coupling(B, B₀) · spill · short batch, each of the very batch that is stepped.

    The spill is B/W for the latest proposal W that the sizes fall short of, by max_batch_size, dwell or hysteresis, and 1 where they do not: lr/batch, and with
    it the noise level, is then what lr/W would have been. Batches that were under way when the proposal came keep the spill they were asked for with.

    Args:
        optimizer, loader: as in BatchSizeScheduler.
        mean_lr: gives the lr that controllers are told.
        accumulate: batches per step.
        coupling: a name or a callable, see `coupling_for`.
        base_batch_size: B₀, in samples.
        spill: None or 'lr'.
        short_batch: 'scale' multiplies by b/B; anything else does not.
        summed: the loss is a sum, so that a short batch is smaller by itself.
        scale_betas: see `BetaRescaler`; its exponent is b/B₀.
        controller: its lr_factor(), if it has one, gives one more factor, of B.

    Attributes:
        last_coupling: the coupling's factor of the last step.
        base_lr: the lr of the last step without any factor; None before.

    Raises:
        ValueError: an unknown coupling; a coupling for a summed loss; scale_betas for an optimizer without betas.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loader: Any,
        mean_lr: MeanEffectiveLr,
        *,
        accumulate: int,
        coupling: str | Coupling,
        base_batch_size: int,
        spill: str | None,
        short_batch: str,
        summed: bool,
        scale_betas: bool,
        controller: Controller | None = None,
    ):
        self._controller = controller
        if self._controller_factor() is not None and (summed or coupling != "none" or spill is not None):
            raise ValueError(
                f"{type(controller).__name__} sets the lr by itself, for a loss that is a mean over the batch: leave coupling at 'none' and spill at None, got "
                f"coupling={coupling!r}, spill={spill!r}{' and a summed loss' if summed else ''}"
            )
        if summed and coupling != "none":
            raise ValueError(f"coupling={coupling!r} is for a loss that is a mean over the batch; a sum grows with the batch by itself: use coupling='none'")
        if isinstance(base_batch_size, bool) or not isinstance(base_batch_size, int) or base_batch_size < 1:
            raise ValueError(f"base_batch_size must be a positive integer, got {base_batch_size!r}")
        self.loader, self.accumulate, self.base_batch_size = loader, accumulate, base_batch_size
        self._coupling = coupling_for(coupling, optimizer)
        self._spill, self._scales_short = spill, short_batch == "scale" and not summed
        self._couples_noise = getattr(self._coupling, "needs_moments", False)
        smoothing = getattr(self._coupling, "smoothing", 0.95)
        self._trace, self._signal = MovingAverage(smoothing), MovingAverage(smoothing)
        self._noise_scale, self._unmet_proposal, self._own_rule = Pending(0.0), Pending(0.0), Pending(self._controller_factor())
        self._mean_lr, self.base_lr = mean_lr, None
        self.last_coupling = 1.0
        self.lr = StepFactor(optimizer, self._lr_factor)
        self._betas: BetaRescaler | None = None
        if scale_betas:
            try:
                self._betas = BetaRescaler(optimizer, self._beta_exponent)
            except ValueError:
                self.lr.remove()
                raise

    def samples(self) -> int:
        """Samples delivered for the present step; 0 if no batch was."""
        return sum(delivered for _, delivered in self._recent())

    def measured(self, moments: GradientMoments) -> None:
        """Take the moments of a step, for the batches to come."""
        if self._couples_noise:
            self._trace.update(moments.variance_trace, moments.n_measured)
            self._signal.update(moments.true_grad_sq_norm, moments.batch_size)
            self._noise_scale.set(noise_scale(self._trace.average, self._signal.average), after_batch=self.loader.n_batches)

    def proposed(self, proposal: float, is_met: bool) -> None:
        """Take a proposal, and whether the sizes to come meet it. An infinite one asks for no noise at all, which no lr gives: the last unmet proposal holds."""
        if self._spill == "lr" and proposal < math.inf:
            self._unmet_proposal.set(0.0 if is_met else proposal, after_batch=self.loader.n_batches)

    def asked(self) -> None:
        """The controller has gone on to the next step: take its own factor on the lr, for the batches to come."""
        self._own_rule.set(self._controller_factor(), after_batch=self.loader.n_batches)

    def restore(self) -> None:
        """Undo what a step that raised left behind."""
        self.lr.restore()
        if self._betas is not None:
            self._betas.restore()

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self.lr.remove()
        if self._betas is not None:
            self._betas.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "version": 1,
            "base_batch_size": self.base_batch_size,
            "unmet_proposal": self._unmet_proposal.latest,
            "base_lr": self.base_lr,
            "noise_scale": self._noise_scale.latest,
            "trace": self._trace.state_dict(),
            "signal": self._signal.state_dict(),
            "betas": None if self._betas is None else self._betas.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(), with its base batch size.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "LrAdjuster")
        self.base_batch_size = state["base_batch_size"]
        self._unmet_proposal, self._noise_scale = Pending(state["unmet_proposal"]), Pending(state["noise_scale"])
        self.base_lr = state["base_lr"]
        self._own_rule = Pending(self._controller_factor())
        self._trace.load_state_dict(state["trace"])
        self._signal.load_state_dict(state["signal"])
        if self._betas is not None and state["betas"] is not None:
            self._betas.load_state_dict(state["betas"])

    def _recent(self) -> list[tuple[int, int]]:
        """(size asked for, size delivered) of the batches of the present step."""
        recent = self.loader.recent
        return [recent[index] for index in range(-min(self.accumulate, len(recent)), 0)]

    def _asked_and_delivered(self) -> tuple[int, int]:
        recent = self._recent()
        if not recent:  # a step on data of another loader
            return (self.loader.batch_size * self.accumulate,) * 2
        return sum(asked for asked, _ in recent), sum(delivered for _, delivered in recent)

    def _lr_factor(self) -> float:
        self.base_lr = self._mean_lr({})
        asked, delivered = self._asked_and_delivered()
        batch = self.loader.n_batches
        factor = self._coupling(asked, self.base_batch_size, self._noise_scale.for_batch(batch))
        if not 0 <= factor < math.inf:
            raise ValueError(f"the coupling gave the factor {factor!r} for a batch of {asked} and a base of {self.base_batch_size}; it must be finite and >= 0")
        self.last_coupling = factor
        own_rule = self._own_rule.for_batch(batch)
        factor *= 1.0 if own_rule is None else own_rule(asked)
        proposal = self._unmet_proposal.for_batch(batch)
        if proposal > asked:
            factor *= asked / proposal
        return factor * delivered / asked if self._scales_short else factor

    def _controller_factor(self) -> Callable[[int], float] | None:
        return None if self._controller is None else self._controller.lr_factor()

    def _beta_exponent(self) -> float:
        return self._asked_and_delivered()[1] / self.base_batch_size


class EpochCount:
    """Counts the epochs that have ended, from the loader's position in samples.

    An epoch ends with the step after which no further batch is drawn, so that a size set there holds from the first batch of the next epoch. Where the
    loader does not know how long an epoch is, and for one that was broken off, the end is seen one step late: by the position that starts anew.

    Args:
        loader: has `position` (samples of the present epoch delivered), `num_samples`, `batch_size`, `drop_last` and, if it can, `n_iterations`.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> sampler = ResizableBatchSampler(10, 4)
        >>> count = EpochCount(sampler)
        >>> [count.after_step() for _ in range(2) for batch in sampler]
        [0, 0, 1, 1, 1, 2]
    """

    def __init__(self, loader: Any):
        self._loader = loader
        self.ended, self._position, self._at_end = 0, math.inf, True
        self._iteration: int | None = None

    def after_step(self) -> int:
        """Call once a step: how many epochs have ended."""
        position, total, iteration = getattr(self._loader, "position", 0), epoch_samples(self._loader), getattr(self._loader, "n_iterations", None)
        anew = position <= self._position if iteration is None or self._iteration is None else iteration != self._iteration
        broken_off = anew and not self._at_end
        # With drop_last a smaller size may draw what was left over: that epoch has been counted.
        counted = self._at_end and not anew
        left = math.inf if total is None else total - position
        self._at_end = counted or left <= 0 or (self._loader.drop_last and left < self._loader.batch_size)
        self.ended += broken_off + (self._at_end and not counted)
        self._position, self._iteration = position, iteration
        return self.ended

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"version": 1, "ended": self.ended, "position": self._position, "at_end": self._at_end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "EpochCount")
        self.ended, self._position, self._at_end = state["ended"], state["position"], state["at_end"]
        self._iteration = None
