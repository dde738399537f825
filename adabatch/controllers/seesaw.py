"""Seesaw: where the lr schedule cuts, the batch grows instead."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from adabatch._checks import choice, integer
from adabatch.controllers.base import Controller
from adabatch.estimators.moments import GradientMoments

EXPONENTS = {"sqrt": 1.0, "linear": 0.5}


def rule_of_optimizer(optimizer: Optimizer) -> str:
    """'linear' for SGD; 'sqrt' for Adam and its family (anything with betas, RMSprop, Adagrad,
    Adadelta).

    Raises:
        ValueError: another optimizer.

    Example:
        >>> rule_of_optimizer(torch.optim.AdamW([torch.zeros(1)]))
        'sqrt'
    """
    if isinstance(optimizer, torch.optim.SGD):
        return "linear"
    adaptive = (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta)
    if isinstance(optimizer, adaptive) or "betas" in optimizer.param_groups[0]:
        return "sqrt"
    raise ValueError(f"whether lr ∝ batch or lr ∝ √batch suits {type(optimizer).__name__} is not "
                     "known: pass coupling='linear' or 'sqrt'")


class Seesaw(Controller):
    """The batch half of Seesaw: batch = base · c for Adam, base · √c for SGD, where the lr schedule
    has cut the lr by c = largest lr so far / lr; c is 1 while a warm-up raises the lr.

    The lr half is the coupling: lr ∝ √batch for Adam, lr ∝ batch for SGD makes lr/√c of the
    schedule's lr/c. Beyond the upper bound the lr falls as scheduled. coupling="seesaw" without a
    controller is both. The exchange holds at or below the critical batch size, which the rule does
    not measure: bound the size. Call the lr scheduler's step before this scheduler's, or the batch
    follows one step later. An lr of 0 proposes infinity.

    batch_size is the base, for which the largest lr was chosen; rule is 'sqrt' for Adam and its
    family, 'linear' for SGD.

    Example:
        >>> controller = Seesaw(64, rule="linear")
        >>> [controller.propose(None, loss=1.0, lr=lr) for lr in (0.1, 0.4, 0.1)]
        [64.0, 64.0, 128.0]

    Reference: Meterez et al. (2025), "Seesaw", arXiv 2510.14717.
    """

    needs_moments = False
    init_args = ("batch_size", "rule")
    state_attrs = ("batch_size", "largest_lr")

    def __init__(self, batch_size: int, rule: str = "sqrt"):
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.rule = choice("rule", rule, EXPONENTS)
        self.largest_lr = 0.0

    def on_optimizer_step(self, lr: float) -> None:
        self.largest_lr = max(self.largest_lr, lr)  # the lr scheduler may have cut it since

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        self.largest_lr = max(self.largest_lr, lr)
        if not self.largest_lr:
            return float(self.batch_size)
        if lr <= 0:
            return math.inf
        return self.batch_size * (self.largest_lr / lr) ** EXPONENTS[self.rule]
