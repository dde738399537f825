"""What controllers share: state, repr, children, the generic interval."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

from adabatch import interfaces
from adabatch._types import Part
from adabatch._checks import check_version
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import NO_INTERVAL, EffectiveLr, RunContext, State

Input: TypeAlias = tuple[float, float, float]


class Controller(interfaces.Controller):
    """Base of the controllers; a subclass defines propose(moments, *, loss, lr).

    A constructor raises TypeError or ValueError for an argument of the wrong type or out of range;
    propose ValueError for moments that lack what the rule needs (a batch of one has no variance).
    `smoothing` is always the decay μ of the moving averages, 0 <= μ < 1, of a step: where one step
    in k is measured, a measurement's is lower, so that rules stay quick (`MovingAverage.space`).

    Attributes:
        init_args: names of the constructor's arguments, kept under the same names; by default
            those that are.
        state_attrs: names of the attributes that make up the state: plain numbers, lists of them,
            or objects with state_dict and load_state_dict.
        children: controllers inside this one; their states and requirements count as its own.

    Example:
        >>> class Doubled(Controller):
        ...     init_args = ("size",)
        ...     def __init__(self, size):
        ...         self.size = size
        ...     def propose(self, moments, *, loss, lr):
        ...         return 2.0 * self.size
        >>> Doubled(8), Doubled(8).state_dict()
        (Doubled(size=8), {'version': 1, 'controller': 'Doubled'})
    """

    version = 1
    init_args: tuple[str, ...] = ()
    state_attrs: tuple[str, ...] = ()
    children: tuple[interfaces.Controller, ...] = ()
    _first_batch_size: float | None = None  # None: that of the first child

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(child.requires for child in self.children))

    @property
    def needs_effective_lr(self) -> bool:
        return any(child.needs_effective_lr for child in self.children)

    @property
    def needs_moments(self) -> bool:
        return not self.children or any(child.needs_moments for child in self.children)

    @property
    def effective_lr(self) -> EffectiveLr | None:
        given = (child.effective_lr for child in self.children)
        return next((function for function in given if function is not None), None)

    @property
    def first_batch_size(self) -> float | None:
        if self._first_batch_size is None and self.children:
            return self.children[0].first_batch_size
        return self._first_batch_size

    def bind(self, context: RunContext) -> None:
        for child in self.children:
            child.bind(context)

    def on_step(self, *, samples: int, epoch: int) -> None:
        for child in self.children:
            child.on_step(samples=samples, epoch=epoch)

    def on_measurement(self, *, steps: int) -> None:
        for name in self.state_attrs:
            value = getattr(self, name)
            if isinstance(value, MovingAverage):
                value.space(steps)
        for child in self.children:
            child.on_measurement(steps=steps)

    def on_optimizer_step(self, lr: float) -> None:
        for child in self.children:
            child.on_optimizer_step(lr)

    def lr_factor(self) -> Callable[[int], float] | None:
        for child in self.children:
            factor = child.lr_factor()
            if factor is not None:
                return factor
        return None

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for child in self.children:
            found |= child.metrics()
        return found

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high): the least and the largest that `_rule` gives with each of `_inputs` at
        either end of its interval. It is right for rules monotone in each input, and never too
        short; inputs that err together make it too long. (NaN, NaN) where no input has an error.
        """
        inputs = self._inputs(level)
        if not inputs or all(math.isnan(low) for _, low, _ in inputs):
            return NO_INTERVAL
        ends = [(x,) if math.isnan(low) else (low, high) for x, low, high in inputs]
        corners = [self._rule(*corner) for corner in itertools.product(*ends)]
        known = [corner for corner in corners if not math.isnan(corner)]  # not ∞/∞
        return min(known), max(known)

    def _inputs(self, level: float) -> list[Input]:
        """(value, low, high) of what the latest proposal was computed from."""
        return []

    def _rule(self, *inputs: float) -> float:
        """The proposal as a function of its inputs."""
        raise NotImplementedError

    def _state(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.state_attrs}

    def state_dict(self) -> State:
        """The class's name, and averages and counts as plain numbers."""
        state: State = {"version": self.version, "controller": type(self).__name__}
        for name, value in self._state().items():
            state[name] = value.state_dict() if isinstance(value, Part) else copy.copy(value)
        if self.children:
            state["children"] = [child.state_dict() for child in self.children]
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version, or the state of another controller, here or in a child;
                nothing is loaded then.
        """
        self.check_state(state)
        for name, value in self._state().items():
            if isinstance(value, Part):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, copy.copy(state[name]))
        for child, saved in zip(self.children, state.get("children", ()), strict=True):
            child.load_state_dict(saved)

    def check_state(self, state: State) -> None:
        """Raise ValueError where load_state_dict() would."""
        name = type(self).__name__
        check_version(state, self.version, name)
        if state.get("controller") != name:
            raise ValueError(f"the state of a controller {state.get('controller')} cannot be "
                             f"loaded into {name}: build the controller that was saved, or "
                             "start without its state")
        saved, fields = state.get("children", ()), {"version", "controller", *self.state_attrs}
        missing = sorted(fields - state.keys())
        others = sorted(state.keys() - fields - {"children"})
        problems = [f"lacks {missing}"] if missing else []
        problems += [f"has {others} as well"] if others else []
        if len(saved) != len(self.children):
            problems.append(f"has {len(saved)} children, not {len(self.children)}")
        if problems:
            raise ValueError(f"the state of {name} {' and '.join(problems)}: pass what "
                             "state_dict() of such a controller returned")
        for child, part in zip(self.children, saved, strict=True):
            if isinstance(child, Controller):
                child.check_state(part)

    def __repr__(self) -> str:
        names = self.init_args or [
            name for name, each in inspect.signature(type(self)).parameters.items()
            if name in vars(self) and each.kind is not each.VAR_POSITIONAL]
        named = (f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({', '.join(named)})"


def measured(moments: GradientMoments | None) -> GradientMoments:
    """The moments; ValueError where there are none."""
    if moments is None:
        raise ValueError("this controller needs the moments of a measured step, got None")
    return moments


def ends_of(average: MovingAverage, level: float) -> Input:
    """(value, low, high) of an average, as an input of an interval."""
    return (average.average, *average.interval(level))


def ratio(numerator: float, denominator: float) -> float:
    """numerator/denominator of smoothed estimates, clamped after smoothing: 0 for a numerator that
    is not positive, infinity for a denominator that is not.

    Example:
        >>> ratio(6.0, 2.0), ratio(6.0, -1.0), ratio(-1.0, 2.0)
        (3.0, inf, 0.0)
    """
    if numerator <= 0:
        return 0.0
    return numerator / denominator if denominator > 0 else math.inf
