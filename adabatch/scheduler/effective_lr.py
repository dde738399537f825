"""The effective lr of an optimizer: what a controller is told."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from adabatch.interfaces import Controller, EffectiveLr

logger = logging.getLogger(__name__)


def sgd_effective_lr(group: dict[str, Any]) -> float:
    """lr·(1 − dampening)/(1 − momentum): the distance a constant gradient moves a parameter per step, in the long run.

    Without momentum: lr (SGD then ignores the dampening). An extension of ours to the published rule; noise floors for momentum 0, 0.9, 0.99 at equal
    effective rate agreed within 4 % in simulation.

    Example:
        >>> round(sgd_effective_lr({"lr": 0.1, "momentum": 0.9, "dampening": 0.0}), 12)
        1.0
    """
    momentum = group.get("momentum", 0.0)
    return float(group["lr"]) * (1 - group.get("dampening", 0.0)) / (1 - momentum) if momentum else float(group["lr"])


def effective_lr_for(optimizer: Optimizer, given: EffectiveLr | None = None) -> EffectiveLr:
    """The function of a param group that gives its effective lr.

    Raises:
        ValueError: the optimizer is not torch.optim.SGD and no function was given.
        TypeError: what was given is not callable.
    """
    if given is not None:
        if not callable(given):
            raise TypeError(f"effective_lr must be a callable of a param group, got {given!r}")
        return given
    if isinstance(optimizer, torch.optim.SGD):
        return sgd_effective_lr
    raise ValueError(
        f"no effective learning rate is known for {type(optimizer).__name__}: the rule holds for SGD steps w - lr*g. Use torch.optim.SGD (for "
        "CABS also Adam, AdamW, RMSprop, Adagrad, or an optimizer given to adabatch.preconditioners.register_preconditioner), "
        "or give the controller a callable of a param group that returns its step per unit of gradient, e.g. CABS(effective_lr=lambda group: group['lr'])"
    )


def effective_lr_of_controller(controller: Controller, optimizer: Optimizer) -> EffectiveLr:
    """What a controller is told: the lr as it stands, unless the controller needs a step per unit of gradient.

    Raises:
        ValueError, TypeError: as effective_lr_for.

    Example:
        >>> from adabatch.controllers import PadaDamp
        >>> effective_lr_of_controller(PadaDamp(16, 1.0), None)({"lr": 0.1, "momentum": 0.9})
        0.1
    """
    given = controller.effective_lr
    if given is None and not controller.needs_effective_lr:
        return lambda group: float(group["lr"])
    chosen = effective_lr_for(optimizer, given)
    if given is None and any(group.get("momentum") for group in optimizer.param_groups):
        logger.info("SGD with momentum: the controller is handed the effective lr, lr*(1 - dampening)/(1 - momentum)")
    return chosen


class MeanEffectiveLr:
    """One effective lr for all param groups: Σ lr_k T_k / Σ T_k, T_k the variance trace of group k, 0 where it is negative.

    Without traces those of the last measured step weigh; before the first one, the groups with measured parameters count alike.

    Args:
        optimizer: its groups' lrs are read at every call.
        of_group: the effective lr of a param group.
        measured: the parameters whose variance is measured.

    Attributes:
        weights: T_k of the last step that had any; empty before.

    Example:
        >>> one, two = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [two], "lr": 2.0}])
        >>> lr = MeanEffectiveLr(optimizer, sgd_effective_lr, [one, two])
        >>> lr({}), lr({0: 3.0, 1: 1.0}), lr({})
        (1.5, 1.25, 1.25)
    """

    def __init__(self, optimizer: Optimizer, of_group: EffectiveLr, measured: Iterable[torch.Tensor]):
        self._optimizer, self._of_group = optimizer, of_group
        self._measured = {id(parameter) for parameter in measured}
        self.weights: list[float] = []

    def read(self) -> list[float]:
        """The effective lr of each group at this moment."""
        return [self._of_group(group) for group in self._optimizer.param_groups]

    def __call__(self, traces: dict[int, float], lrs: Sequence[float] | None = None) -> float:
        """The mean of the groups' lrs (read() at some moment; None: of this one), given {index of the group: its variance trace} of the step or nothing."""
        groups = self._optimizer.param_groups
        lrs = self.read() if lrs is None else lrs
        if len(lrs) == 1:
            return lrs[0]
        latest = [max(0.0, traces.get(index, 0.0)) for index in range(len(lrs))]
        if any(latest):
            self.weights = latest
        weights = self.weights if len(self.weights) == len(lrs) else self._alike(groups)
        return sum(lr * weight for lr, weight in zip(lrs, weights, strict=True)) / sum(weights)

    def _alike(self, groups: list[dict[str, Any]]) -> list[float]:
        weights = [float(any(id(parameter) in self._measured for parameter in group["params"])) for group in groups]
        return weights if any(weights) else [1.0] * len(groups)
