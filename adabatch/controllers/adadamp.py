"""AdaDamp and its cheaper relatives: the batch grows as the loss falls, or as if it did."""

from __future__ import annotations

import math

from adabatch.controllers.base import Controller, check_positive, ratio
from adabatch.estimators.averages import MovingAverage, student_quantile
from adabatch.estimators.intervals import NO_INTERVAL, fieller
from adabatch.estimators.moments import GradientMoments


class AdaDamp(Controller):
    """m = B₀·(F₀ − f_star)/(F − f_star), F the smoothed loss, F₀ the loss at the start: the batch grows as the excess loss falls.

    The published rule evaluates F on the whole data set and rounds up; ours takes the losses of the batches. Nothing need be measured. Beyond
    max_batch_size, spill='lr' lowers the lr as lr·max/m, as published. A smoothed loss at or below f_star proposals infinity.

    Where theory is thin: that noise must fall as the excess loss does is argued for plain SGD on losses whose floor is known; momentum and Adam do not enter,
    and at small batches F₀ is one noisy loss: give initial_loss. The proposal has an interval, by the error of F alone.

    Args:
        batch_size: B₀, in samples.
        f_star: floor of the loss.
        initial_loss: F₀; None takes the first loss seen.
        smoothing: μ of the loss's average, 0 <= μ < 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> rule = AdaDamp(16, smoothing=0.0)
        >>> [rule.propose(None, loss=loss, lr=0.1) for loss in (2.0, 1.0, 0.5)]
        [16.0, 32.0, 64.0]

    References:
        Sievert, Shah (2019), "Improving the convergence of SGD through adaptive batch sizes", arXiv 1910.08222.
    """

    needs_effective_lr = False
    needs_moments = False
    arguments = ("batch_size", "f_star", "initial_loss", "smoothing")
    saved = ("average", "start", "samples")

    def __init__(self, batch_size: int, f_star: float = 0.0, initial_loss: float | None = None, smoothing: float = 0.95):
        check_positive(batch_size=batch_size)
        for name, value in {"f_star": f_star, "initial_loss": 0.0 if initial_loss is None else initial_loss}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        self.batch_size, self.f_star, self.initial_loss, self.smoothing = batch_size, f_star, initial_loss, smoothing
        self.average = MovingAverage(smoothing)
        self.start, self.samples = initial_loss, 1

    @property
    def first_batch_size(self) -> int:
        """B₀."""
        return self.batch_size

    def advance(self, *, samples: int, epoch: int) -> None:
        """Take the size of the step, the weight of its loss: see `Controller.advance`."""
        self.samples = samples

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Take one step's raw loss; give the proposed batch size, in samples. A loss that is not finite is left out."""
        if self.start is None and math.isfinite(loss):
            self.start = loss
        loss = self.average.update(loss, self.samples)
        if self.start is None:
            return float(self.batch_size)
        return ratio(self.batch_size * (self.start - self.f_star), loss - self.f_star)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """By the error of the smoothed loss alone, as if F₀ were known: see `Controller.proposal_interval`."""
        if self.start is None:
            return NO_INTERVAL
        above, quantile = self.average.average - self.f_star, student_quantile(level, self.average.freedom)
        return fieller(self.batch_size * (self.start - self.f_star), above, (0.0, self.average.std_error() ** 2), 0.0, quantile)


class PadaDamp(Controller):
    """m = B₀ + rate·k after k steps: what AdaDamp's batch does where the loss falls as 1/k. Nothing is measured, so the proposal has no error and no interval.

    Args:
        batch_size: B₀, in samples.
        rate: samples by which the batch grows a step, >= 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> rule = PadaDamp(16, rate=0.25)
        >>> rule.advance(samples=16, epoch=0)
        >>> rule.propose(None, loss=1.0, lr=0.1)
        16.25

    References:
        Sievert, Shah (2019), arXiv 1910.08222.
    """

    needs_effective_lr = False
    needs_moments = False
    arguments = ("batch_size", "rate")
    saved = ("steps",)

    def __init__(self, batch_size: int, rate: float):
        check_positive(batch_size=batch_size)
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate must be a number >= 0, got {rate!r}")
        self.batch_size, self.rate = batch_size, rate
        self.steps = 0

    @property
    def first_batch_size(self) -> int:
        """B₀."""
        return self.batch_size

    def advance(self, *, samples: int, epoch: int) -> None:
        """Count the step: see `Controller.advance`."""
        self.steps += 1

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The size at the present count, in samples."""
        return self.batch_size + self.rate * float(self.steps)


class GeoDamp(Controller):
    """m = B₀·factor^⌊epochs/every⌋: doubled every five epochs unless said otherwise. Nothing is measured, so the proposal has no error and no interval.

    Args:
        batch_size: B₀, in samples.
        factor: of the growth, > 0.
        every: epochs between two growths, >= 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> rule = GeoDamp(16)
        >>> rule.advance(samples=16, epoch=11)
        >>> rule.propose(None, loss=1.0, lr=0.1)
        64.0

    References:
        Sievert, Shah (2019), arXiv 1910.08222.
    """

    needs_effective_lr = False
    needs_moments = False
    arguments = ("batch_size", "factor", "every")
    saved = ("epoch",)

    def __init__(self, batch_size: int, factor: float = 2.0, every: int = 5):
        check_positive(batch_size=batch_size, factor=factor, every=every)
        self.batch_size, self.factor, self.every = batch_size, factor, every
        self.epoch = 0

    @property
    def first_batch_size(self) -> int:
        """B₀."""
        return self.batch_size

    def advance(self, *, samples: int, epoch: int) -> None:
        """Take the count of epochs: see `Controller.advance`."""
        self.epoch = epoch

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The size at the present epoch, in samples."""
        return self.batch_size * float(self.factor) ** (self.epoch // self.every)
