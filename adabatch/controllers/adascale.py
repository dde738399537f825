"""AdaScale: a fixed large batch, whose lr follows the gain it has over a small one."""

from __future__ import annotations

import functools
from collections.abc import Callable

from adabatch.controllers.base import Controller, check_positive
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments


def gain(batch_size: float, base_batch_size: float, variance_trace: float, true_grad_sq_norm: float) -> float:
    """r = (T/B₀ + G²)/(T/B + G²): how many steps at the base batch size B₀ one step at B is worth. Below 0 T and G² count as 0; without either r is 1.

    Example:
        >>> gain(64, 16, 32.0, 1.0), gain(64, 16, 1.0, -0.1), gain(64, 16, 0.0, 1.0)
        (2.0, 4.0, 1.0)
    """
    trace, square = max(0.0, variance_trace), max(0.0, true_grad_sq_norm)
    base, used = trace / base_batch_size + square, trace / batch_size + square
    return base / used if used else 1.0


class AdaScale(Controller):
    """Keeps the batch at `batch_size` and steps with lr · r, r = (T/B₀ + G²)/(T/B + G²), between 1 and B/B₀.

    One step is worth r steps of the base batch B₀, so that an lr schedule made for the base is read at `base_steps` = Σ r, the scale-invariant clock, and
    not at the number of steps: LambdaLR(optimizer, lambda _: schedule(controller.base_steps)). T̂ and Ĝ² are smoothed each by itself. Before the first
    measurement r is 1. Leave `coupling` at 'none'; coupling='adascale' is the same gain under a batch that another controller moves.

    The size is given, not measured: it has no interval, and the error of r is that of T̂ and Ĝ² (the history's). Where theory is thin: the bound r <= B/B₀ is
    the algebra's, not the loss's. The published guarantee takes it that lr · r stays within what the loss's curvature allows at every step; where noise
    dominates, r goes to B/B₀ and with it the lr, so choose the base lr with that much room, or bound B/B₀: at lr .3 with B = 8·B₀ one of three runs on
    scikit-learn's digits collapsed at a gain near 8. The gain is of one plain SGD step: under momentum, steps of different gains mix in one buffer, and for
    Adam it is no more than a rule of thumb. A schedule read at `base_steps` is right as far as r steps of the base run may be taken at once, which fails
    where the schedule changes within r steps: a warm-up of few base steps is passed in one. In the first steps, and at small B, Ĝ² is hardly known; below 0 it
    counts as 0, which makes r = B/B₀ just when least is known: warm up.

    Args:
        batch_size: B, in samples.
        base_batch_size: B₀, for which the lr was chosen.
        smoothing: μ of both averages, 0 <= μ < 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> rule = AdaScale(batch_size=64, base_batch_size=16)
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([17.0, 17.0]), grad_sq_norm=9.0)  # T = 16, Ĝ² = 1
        >>> rule.propose(moments, loss=1.0, lr=0.1), rule.lr_rule()(64)
        (64.0, 1.6)

    References:
        Johnson, Agrawal, Gu, Guestrin (2020), "AdaScale SGD", arXiv 2007.05105.
    """

    needs_effective_lr = False
    arguments = ("batch_size", "base_batch_size", "smoothing")
    saved = ("trace", "square", "base_steps")

    def __init__(self, batch_size: int, base_batch_size: int, smoothing: float = 0.95):
        check_positive(batch_size=batch_size, base_batch_size=base_batch_size)
        self.batch_size, self.base_batch_size, self.smoothing = batch_size, base_batch_size, smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.base_steps = 0.0

    @property
    def first_batch_size(self) -> int:
        """B."""
        return self.batch_size

    def lr_rule(self) -> Callable[[int], float]:
        """r of a batch of another size too: see `Controller.lr_rule`."""
        if not self.trace.count:
            return functools.partial(_gain_of, 0.0, 1.0, self.base_batch_size)
        return functools.partial(_gain_of, self.trace.average, self.square.average, self.base_batch_size)

    def advance(self, *, samples: int, epoch: int) -> None:
        """Advance the clock by the gain of the step: see `Controller.advance`."""
        self.base_steps += self.lr_rule()(max(1, samples))

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments; give B, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self.trace.update(moments.variance_trace, moments.n_measured)
        self.square.update(moments.true_grad_sq_norm, moments.batch_size)
        return float(self.batch_size)


def _gain_of(trace: float, square: float, base_batch_size: int, batch_size: int) -> float:
    return gain(batch_size, base_batch_size, trace, square)
