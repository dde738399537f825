"""Controllers made of controllers: bounds, a pace of growth, one way only, a mean of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from adabatch.controllers.base import Controller, check_positive, interval_of
from adabatch.estimators.intervals import NO_INTERVAL
from adabatch.estimators.moments import GradientMoments


class AtLeast(Controller):
    """The largest of several proposals, each a controller's or a number of samples.

    Raises:
        ValueError: no member, or a number that is not positive.

    Example:
        >>> from adabatch.controllers import PadaDamp
        >>> AtLeast(PadaDamp(16, rate=1.0), 64).propose(None, loss=1.0, lr=0.1)
        64.0
    """

    def __init__(self, *members: Any):
        self.members, self.parts = _checked(members)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Ask all members; give the largest proposal, in samples."""
        self.proposals = _wishes(self.members, moments, loss, lr)
        return max(self.proposals)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """From the largest low end of the members to their largest high one: see `Controller.proposal_interval`."""
        return _combined(self, level, max)


class AtMost(Controller):
    """The smallest of several proposals, each a controller's or a number of samples.

    Raises:
        ValueError: no member, or a number that is not positive.

    Example:
        >>> from adabatch.controllers import PadaDamp
        >>> AtMost(PadaDamp(16, rate=1.0), 64).propose(None, loss=1.0, lr=0.1)
        16.0
    """

    def __init__(self, *members: Any):
        self.members, self.parts = _checked(members)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Ask all members; give the smallest proposal, in samples."""
        self.proposals = _wishes(self.members, moments, loss, lr)
        return min(self.proposals)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """From the smallest low end of the members to their smallest high one: see `Controller.proposal_interval`."""
        return _combined(self, level, min)


class Average(Controller):
    """The weighted arithmetic mean of several proposals, Σ w_i m_i / Σ w_i.

    It is a mean over controllers, not over time: each smooths its own numerator and denominator, and an average of ratios would mislead. One infinite
    proposal makes the mean infinite.

    Args:
        members: controllers or numbers of samples.
        weights: one positive number for each; None: all alike.

    Raises:
        ValueError: no member, weights that do not fit, or a number that is not positive.

    Example:
        >>> Average(64, 16, weights=(1, 3)).propose(None, loss=1.0, lr=0.1)
        28.0
    """

    arguments = ("weights",)

    def __init__(self, *members: Any, weights: Any = None):
        self.members, self.parts = _checked(members)
        if weights is not None:
            weights = tuple(weights)
            if len(weights) != len(members):
                raise ValueError(f"weights must have one number for each of the {len(members)} members, got {len(weights)}")
            for weight in weights:
                check_positive(weight=weight)
        self.weights = weights

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Ask all members; give the mean of their proposals, in samples."""
        self.proposals = _wishes(self.members, moments, loss, lr)
        return self._mean(self.proposals)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """The mean of the members' ends, as if all erred to one side at once: members measure the same gradients. See `Controller.proposal_interval`."""
        return _combined(self, level, self._mean)

    def _mean(self, values: Sequence[float]) -> float:
        weights = self.weights or (1,) * len(values)
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


class Monotone(Controller):
    """The largest proposal so far, and not less than the largest batch used: the size never shrinks.

    Raises:
        ValueError: the member is a number that is not positive.

    Example:
        >>> from adabatch.controllers import AdaDamp
        >>> rule = Monotone(AdaDamp(16, smoothing=0.0))
        >>> [rule.propose(None, loss=loss, lr=0.1) for loss in (2.0, 1.0, 4.0)]
        [16.0, 32.0, 32.0]
    """

    saved = ("largest",)

    def __init__(self, member: Any):
        self.members, self.parts = _checked((member,))
        self.largest = self._before = 0.0

    def advance(self, *, samples: int, epoch: int) -> None:
        """Take the size in use: see `Controller.advance`."""
        super().advance(samples=samples, epoch=epoch)
        self.largest = max(self.largest, float(samples))

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Ask the member; give the largest proposal so far, in samples. A proposal that is NaN is handed on."""
        self.proposals = [proposal] = _wishes(self.members, moments, loss, lr)
        if math.isnan(proposal):
            return proposal
        self._before, self.largest = self.largest, max(self.largest, proposal)
        return self.largest

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """The member's, cut off at what the largest proposal was before: see `Controller.proposal_interval`."""
        return _combined(self, level, lambda ends: max(self._before, *ends))


class Warmup(Controller):
    """Grows no faster than by `growth` every `samples` samples: proposal = min(proposed, limit · growth^(n/samples)).

    n is the size of the step, limit the last proposal of this controller, or the size in use where that is larger. It may fall as fast as it likes.

    Args:
        member: a controller, or a number of samples.
        growth: > 1.
        samples: over which the batch may grow by that factor, > 0.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> rule = Warmup(1024, growth=2.0, samples=64)
        >>> for samples in (64, 128):
        ...     rule.advance(samples=samples, epoch=0)
        ...     print(rule.propose(None, loss=1.0, lr=0.1))
        128.0
        512.0
    """

    arguments = ("growth", "samples")
    saved = ("limit",)

    def __init__(self, member: Any, growth: float = 2.0, samples: int = 10_000):
        check_positive(growth=growth, samples=samples)
        if growth <= 1:
            raise ValueError(f"growth must be above 1, got {growth!r}")
        self.members, self.parts = _checked((member,))
        self.growth, self.samples = growth, samples
        self.limit, self._before = 0.0, math.inf

    def advance(self, *, samples: int, epoch: int) -> None:
        """Raise the limit by the samples of the step: see `Controller.advance`."""
        super().advance(samples=samples, epoch=epoch)
        # The exponent is bounded: a step of many times `samples` must not overflow.
        self.limit = min(1e300, max(self.limit, float(samples)) * self.growth ** min(samples / self.samples, 990 / math.log2(self.growth)))

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """Ask the member; give its proposal or the limit, in samples."""
        self.proposals = [proposal] = _wishes(self.members, moments, loss, lr)
        if math.isnan(proposal):
            return proposal
        self._before = self.limit if self.limit else math.inf
        self.limit = min(proposal, self._before)
        return self.limit

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """The member's, cut off at the limit: see `Controller.proposal_interval`."""
        return _combined(self, level, lambda ends: min(self._before, *ends))


def _combined(rule: Any, level: float, combine: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """Both ends by the rule that combines the proposals; a member's proposal that has no error stands for both. Without any error there is no interval."""
    intervals = [interval_of(member, level) for member in rule.members]
    if not hasattr(rule, "proposals") or all(math.isnan(low) for low, _ in intervals):
        return NO_INTERVAL
    ends = [(proposal, proposal) if math.isnan(interval[0]) else interval for proposal, interval in zip(rule.proposals, intervals, strict=True)]
    return combine([low for low, _ in ends]), combine([high for _, high in ends])


def _wishes(members: tuple[Any, ...], moments: GradientMoments | None, loss: float, lr: float) -> list[float]:
    """Every member is asked at every step, so that its averages go on whichever proposal counts."""
    return [float(member.propose(moments, loss=loss, lr=lr)) if hasattr(member, "propose") else float(member) for member in members]


def _checked(members: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The members, and those of them that are controllers."""
    if not members:
        raise ValueError("a combination needs at least one controller or number of samples, got none")
    for member in members:
        if not hasattr(member, "propose"):
            check_positive(size=member)
    return members, tuple(member for member in members if hasattr(member, "propose"))
