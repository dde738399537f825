"""What the learning rate does when the batch changes: each rule is a pure function of batch sizes
that gives a factor on the lr.

Legend: B the requested size of the batch being stepped, B₀ the base batch size, for which the lr
was chosen, S = B/B₀, φ = T/G² the noise scale.

A user's rule is any callable (batch_size, base_batch_size, noise_scale) -> factor. With an
attribute `needs_moments = True` it gets the noise scale of smoothed moments, without it 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from adabatch._checks import smoothing as checked_smoothing
from adabatch.config import CouplingRule
from adabatch.controllers.adascale import gain
from adabatch.controllers.seesaw import rule_of_optimizer


def none(batch_size: int, base_batch_size: int, noise_scale: float = 0.0) -> float:
    """1: the lr does not depend on the batch.

    Example:
        >>> none(256, 64)
        1.0
    """
    return 1.0


def linear(batch_size: int, base_batch_size: int, noise_scale: float = 0.0) -> float:
    """S: SGD moves as far per sample, as long as noise dominates.

    Example:
        >>> linear(256, 64)
        4.0

    References:
        Goyal et al. (2017), arXiv 1706.02677.
    """
    return batch_size / base_batch_size


def square_root(batch_size: int, base_batch_size: int, noise_scale: float = 0.0) -> float:
    """√S: the rule for Adam and its family, whose step has the size of the lr whatever the
    gradient's.

    Example:
        >>> square_root(256, 64)
        2.0
    """
    return math.sqrt(batch_size / base_batch_size)


class AdaScaleGain:
    """AdaScale's `gain` under a batch that a controller moves; 1 before the first measurement.

    An lr schedule that counts base steps is advanced by the gain of each step
    (`scheduler.last_lr_factor`).

    Args:
        smoothing: of the averages of T and G² whose ratio is φ, 0 <= smoothing < 1.

    Raises:
        ValueError: smoothing out of range.

    Example:
        >>> AdaScaleGain()(256, 64, 128.0)
        2.0
    """

    needs_moments = True

    def __init__(self, smoothing: float = 0.95):
        self.smoothing = checked_smoothing(smoothing)

    def __call__(self, batch_size: int, base_batch_size: int, noise_scale: float = 0.0) -> float:
        return gain(batch_size, base_batch_size, noise_scale)


RULES: dict[str, Callable[[], CouplingRule]] = {
    "none": lambda: none, "linear": lambda: linear, "sqrt": lambda: square_root,
    "adascale": AdaScaleGain,
}


def coupling_for(given: str | CouplingRule, optimizer: Optimizer) -> CouplingRule:
    """The rule of a name; a callable is taken as it is. 'seesaw' is the rule of the optimizer,
    whose other half is the controller `Seesaw`.

    Raises:
        ValueError: an unknown name; 'seesaw' with an optimizer whose rule is not known.

    Example:
        >>> import torch
        >>> coupling_for("seesaw", torch.optim.SGD([torch.zeros(1)], lr=0.1)) is linear
        True
    """
    if callable(given):
        return given
    if given == "seesaw":
        given = rule_of_optimizer(optimizer)
    if given not in RULES:
        raise ValueError(f"coupling must be one of {[*RULES, 'seesaw']} or a callable (batch_size, "
                         f"base_batch_size, noise_scale) -> factor, got {given!r}")
    return RULES[given]()


def smoothing_of(rule: str | CouplingRule) -> float | None:
    """The smoothing of the moments whose noise scale the rule is called with; None where it reads
    none.

    Example:
        >>> smoothing_of(linear), smoothing_of("adascale")
        (None, 0.95)
    """
    if isinstance(rule, str):
        rule = RULES[rule]() if rule in RULES else none
    return getattr(rule, "smoothing", 0.95) if getattr(rule, "needs_moments", False) else None
