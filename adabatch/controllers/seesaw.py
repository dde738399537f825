"""Seesaw: where the lr schedule cuts, the batch grows instead."""

from __future__ import annotations

import math
from typing import Any

from adabatch._checks import check_controller
from adabatch.estimators.moments import GradientMoments
from adabatch.schedules.arguments import choice, integer

EXPONENTS = {"sqrt": 1.0, "linear": 0.5}


class Seesaw:
    """The batch half of Seesaw: batch = base · c for Adam, base · √c for SGD, where the lr schedule has cut the lr by c = largest lr so far / lr.

    The lr half is the coupling: lr ∝ √batch for Adam, lr ∝ batch for SGD makes lr/√c of the schedule's lr/c. Beyond max_batch_size the lr falls as
    scheduled. `BatchSizeScheduler(..., coupling="seesaw")` without a controller is both. While a warm-up raises the lr, c is 1. Nothing need be measured: the
    proposal has no error and no interval. Where theory is thin: the exchange holds at or below the critical batch size, which is not looked at: bound the size.

    Call the lr scheduler's step before this scheduler's, otherwise the batch follows one step later (the coupling keeps lr and batch in step even so).

    Args:
        batch_size: the base, for which the largest lr was chosen, in samples.
        rule: 'sqrt' for Adam and its family, 'linear' for SGD.

    Raises:
        TypeError: batch_size is no integer.
        ValueError: it is below 1, or the rule unknown.

    Example:
        >>> controller = Seesaw(64, rule="linear")
        >>> [controller.propose(None, loss=1.0, lr=lr) for lr in (0.1, 0.4, 0.1)]
        [64.0, 64.0, 128.0]

    References:
        Meterez et al. (2025), "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling", arXiv 2510.14717.
    """

    needs_moments = False
    version = 1

    def __init__(self, batch_size: int, rule: str = "sqrt"):
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.rule = choice("rule", rule, EXPONENTS)
        self.largest_lr = 0.0

    def stepped_with(self, lr: float) -> None:
        """Called by the scheduler before propose with the base lr of the last optimizer step: the lr scheduler may have cut it since."""
        self.largest_lr = max(self.largest_lr, lr)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The size for this lr, in samples; infinity for an lr of 0, and the base before there was any other."""
        self.largest_lr = max(self.largest_lr, lr)
        if not self.largest_lr:
            return float(self.batch_size)
        return self.batch_size * (self.largest_lr / lr) ** EXPONENTS[self.rule] if lr > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The base and the largest lr, as plain numbers."""
        return {"version": self.version, "controller": type(self).__name__, "batch_size": self.batch_size, "largest_lr": self.largest_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(), with its base.

        Raises:
            ValueError: unknown version, or the state of another controller.
        """
        check_controller(state, self.version, type(self).__name__)
        self.batch_size, self.largest_lr = state["batch_size"], state["largest_lr"]

    def __repr__(self) -> str:
        return f"Seesaw(batch_size={self.batch_size}, rule={self.rule!r})"
