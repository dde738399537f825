"""AdaDamp and its cheaper relatives: the batch grows as the loss falls, or as if it did.

Reference: Sievert, Shah (2019), "Improving the convergence of SGD through adaptive batch sizes",
arXiv 1910.08222.
"""

from __future__ import annotations

import math

from adabatch._checks import positive, real
from adabatch.controllers.base import Controller, Input, ends_of, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments


class AdaDamp(Controller):
    """m = batch_size·(F₀ − f_star)/(F − f_star), F the smoothed loss, F₀ the loss at the start.

    The published rule evaluates F on the whole data set and rounds up; ours takes the losses of the
    batches (those that are not finite are skipped). Beyond the upper bound, on_limit='lower_lr'
    lowers the lr as published. A smoothed loss at or below f_star proposes infinity. At small
    batches F₀, the first loss, is noisy: give initial_loss. The interval is by the error of F.

    Example:
        >>> rule = AdaDamp(16, smoothing=0.0)
        >>> [rule.propose(None, loss=loss, lr=0.1) for loss in (2.0, 1.0, 0.5)]
        [16.0, 32.0, 64.0]
    """

    needs_moments = False
    init_args = ("batch_size", "f_star", "initial_loss", "smoothing")
    state_attrs = ("average", "start", "samples")

    def __init__(self, batch_size: int, f_star: float = 0.0, initial_loss: float | None = None,
                 smoothing: float = 0.95):
        self.batch_size, self.f_star = positive("batch_size", batch_size), real("f_star", f_star)
        self._first_batch_size = self.batch_size
        self.initial_loss = None if initial_loss is None else real("initial_loss", initial_loss)
        self.average, self.smoothing = MovingAverage(smoothing), smoothing
        self.start, self.samples = self.initial_loss, 1

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.samples = samples  # the weight of the step's loss

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        if self.start is None and math.isfinite(loss):
            self.start = loss
        average = self.average.update(loss, self.samples)
        return float(self.batch_size) if self.start is None else self._rule(average)

    def _inputs(self, level: float) -> list[Input]:
        return [] if self.start is None else [ends_of(self.average, level)]

    def _rule(self, *inputs: float) -> float:
        start = 0.0 if self.start is None else self.start
        return ratio(self.batch_size * (start - self.f_star), inputs[0] - self.f_star)


class PadaDamp(Controller):
    """m = batch_size + rate·k after k steps: what AdaDamp's batch does where the loss falls as 1/k.

    Example:
        >>> rule = PadaDamp(16, rate=0.25)
        >>> rule.on_step(samples=16, epoch=0)
        >>> rule.propose(None, loss=1.0, lr=0.1)
        16.25
    """

    needs_moments = False
    init_args = ("batch_size", "rate")
    state_attrs = ("steps",)

    def __init__(self, batch_size: int, rate: float):
        self._first_batch_size = self.batch_size = positive("batch_size", batch_size)
        self.rate = real("rate", rate, at_least=0)
        self.steps = 0

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.steps += 1

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return self.batch_size + self.rate * float(self.steps)


class GeoDamp(Controller):
    """m = batch_size·factor^⌊epochs/every⌋: by default doubled every five epochs.

    Example:
        >>> rule = GeoDamp(16)
        >>> rule.on_step(samples=16, epoch=11)
        >>> rule.propose(None, loss=1.0, lr=0.1)
        64.0
    """

    needs_moments = False
    init_args = ("batch_size", "factor", "every")
    state_attrs = ("epoch",)

    def __init__(self, batch_size: int, factor: float = 2.0, every: int = 5):
        self._first_batch_size = self.batch_size = positive("batch_size", batch_size)
        self.factor, self.every = positive("factor", factor), positive("every", every)
        self.epoch = 0

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.epoch = epoch

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return self.batch_size * float(self.factor) ** (self.epoch // self.every)
