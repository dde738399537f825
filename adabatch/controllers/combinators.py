"""Controllers made of controllers: bounds, a mean, one way only, a pace of growth, confidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from adabatch import interfaces
from adabatch._checks import level as checked_level, positive, real
from adabatch.controllers.base import Controller, Input
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import NO_INTERVAL, RunContext

Operand: TypeAlias = interfaces.Controller | float


class _Combinator(Controller):
    """Holds operands, controllers or positive numbers of samples, and their latest proposals."""

    def __init__(self, *operands: Operand):
        if not operands:
            raise ValueError(f"{type(self).__name__} needs at least one controller or number of "
                             "samples, got none")
        for operand in operands:
            if not isinstance(operand, interfaces.Controller):
                positive("size", operand)
        self.children = tuple(x for x in operands if isinstance(x, interfaces.Controller))
        self.operands, self.proposals = operands, list[float]()

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return self._rule(*self._ask(moments, loss, lr))

    def _ask(self, moments: GradientMoments | None, loss: float, lr: float) -> list[float]:
        """The operands' proposals. All are called, so that the averages of each are updated."""
        self.proposals = [
            x.propose(moments, loss=loss, lr=lr) if isinstance(x, interfaces.Controller)
            else float(x) for x in self.operands
        ]
        return self.proposals

    def _inputs(self, level: float) -> list[Input]:
        return [
            (x, *(part.interval(level) if isinstance(part, interfaces.Controller) else NO_INTERVAL))
            for part, x in zip(self.operands, self.proposals, strict=False)
        ]

    def __repr__(self) -> str:
        name, named = type(self).__name__, super().__repr__()
        arguments = [*map(repr, self.operands), named[len(name) + 1 : -1]]
        return f"{name}({', '.join(filter(None, arguments))})"


class AtLeast(_Combinator):
    """The largest of several proposals, each a controller's or a number of samples.

    Example:
        >>> from adabatch.controllers import PadaDamp
        >>> AtLeast(PadaDamp(16, rate=1.0), 64).propose(None, loss=1.0, lr=0.1)
        64.0
    """

    def _rule(self, *inputs: float) -> float:
        return max(inputs)


class AtMost(_Combinator):
    """The smallest of several proposals, each a controller's or a number of samples.

    Example:
        >>> from adabatch.controllers import PadaDamp
        >>> AtMost(PadaDamp(16, rate=1.0), 64).propose(None, loss=1.0, lr=0.1)
        16.0
    """

    def _rule(self, *inputs: float) -> float:
        return min(inputs)


class Average(_Combinator):
    """The weighted arithmetic mean of several proposals, Σ w_i m_i / Σ w_i, each a controller's or
    a number of samples; by default all w_i are 1.

    It is a mean over controllers, not over time: each smooths its own numerator and denominator,
    and an average of ratios would mislead. One infinite proposal makes the mean infinite.

    Example:
        >>> Average(64, 16, weights=(1, 3)).propose(None, loss=1.0, lr=0.1)
        28.0
    """

    init_args = ("weights",)

    def __init__(self, *operands: Operand, weights: Sequence[float] | None = None):
        super().__init__(*operands)
        self.weights = None
        if weights is not None:
            self.weights = tuple(positive("weight", weight) for weight in weights)
            if len(weights) != len(operands):
                raise ValueError(f"weights must have one number for each of the {len(operands)} "
                                 f"operands, got {len(weights)}")

    def _rule(self, *inputs: float) -> float:
        weights = self.weights or (1,) * len(inputs)
        return sum(w * x for w, x in zip(weights, inputs, strict=True)) / sum(weights)


class Monotone(_Combinator):
    """The largest proposal so far, and not less than the largest batch used: it never shrinks. NaN
    where the operand proposes NaN.

    Example:
        >>> from adabatch.controllers import AdaDamp
        >>> rule = Monotone(AdaDamp(16, smoothing=0.0))
        >>> [rule.propose(None, loss=loss, lr=0.1) for loss in (2.0, 1.0, 4.0)]
        [16.0, 32.0, 32.0]
    """

    state_attrs = ("largest",)

    def __init__(self, operand: Operand):
        super().__init__(operand)
        self.largest = self._before = 0.0

    def on_step(self, *, samples: int, epoch: int) -> None:
        super().on_step(samples=samples, epoch=epoch)
        self.largest = max(self.largest, float(samples))

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        [proposal] = self._ask(moments, loss, lr)
        if math.isnan(proposal):
            return proposal
        self._before, self.largest = self.largest, max(self.largest, proposal)
        return self.largest

    def _rule(self, *inputs: float) -> float:
        return max(self._before, *inputs)


class Warmup(_Combinator):
    """Grows by at most `growth` every `samples` samples: min(proposal, limit·growth^(n/samples)).

    n is the size of the step, limit the last proposal of this controller, or the size in use where
    that is larger. It may fall at any rate. NaN where the operand proposes NaN.

    Example:
        >>> rule = Warmup(1024, growth=2.0, samples=64)
        >>> for samples in (64, 128):
        ...     rule.on_step(samples=samples, epoch=0)
        ...     print(rule.propose(None, loss=1.0, lr=0.1))
        128.0
        512.0
    """

    init_args = ("growth", "samples")
    state_attrs = ("limit",)

    def __init__(self, operand: Operand, growth: float = 2.0, samples: int = 10_000):
        self.growth, self.samples = real("growth", growth, above=1), positive("samples", samples)
        super().__init__(operand)
        self.limit, self._before = 0.0, math.inf

    def on_step(self, *, samples: int, epoch: int) -> None:
        super().on_step(samples=samples, epoch=epoch)
        # The exponent is bounded: a step of many times `samples` must not overflow.
        exponent = min(samples / self.samples, 990 / math.log2(self.growth))
        self.limit = min(1e300, max(self.limit, float(samples)) * self.growth**exponent)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        [proposal] = self._ask(moments, loss, lr)
        if math.isnan(proposal):
            return proposal
        self._before = self.limit if self.limit else math.inf
        self.limit = min(proposal, self._before)
        return self.limit

    def _rule(self, *inputs: float) -> float:
        return min(self._before, *inputs)


class Confident(_Combinator):
    """Keeps the size in force while `Controller.interval(level)` of the proposal holds it.

    A proposal whose error is not known yet moves nothing; one that has none is followed. The size
    in force is read through `RunContext.batch_size`; without it every proposal is followed.

    Example:
        >>> import torch
        >>> from adabatch.controllers import NoiseScale
        >>> moments = GradientMoments(4, torch.tensor([1.0, 2.0, 3.0, 4.0]), grad_sq_norm=2.0)
        >>> rule, optimizer = Confident(NoiseScale()), torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> rule.bind(RunContext(optimizer, batch_size=lambda: 16))
        >>> rule.propose(moments, loss=1.0, lr=0.1)  # no error is known after one step
        16.0
    """

    init_args = ("level",)

    def __init__(self, operand: Operand, level: float = 0.9):
        self.level = checked_level("level", level)
        super().__init__(operand)
        self._batch_size: Callable[[], float] = lambda: math.nan

    def bind(self, context: RunContext) -> None:
        super().bind(context)
        self._batch_size = context.batch_size or self._batch_size

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        [proposal] = self._ask(moments, loss, lr)
        low, high = self.interval(self.level)
        size = self._batch_size()
        return float(size) if low <= size <= high and not math.isnan(proposal) else proposal

    def _rule(self, *inputs: float) -> float:
        return inputs[0]
