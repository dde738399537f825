"""What controllers share: the state, the repr, and the ratio that is never taken of single estimates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from adabatch._checks import check_controller
from adabatch.estimators.intervals import NO_INTERVAL


class Controller:
    """Base of the controllers. A subclass computes the proposed batch size in propose(moments, *, loss, lr), unrounded and unbounded.

    Class attributes a subclass sets:
        arguments: names of the constructor's arguments, kept under the same names.
        saved: names of the attributes that make up the state: plain numbers, lists of them, or objects with state_dict and load_state_dict.
        needs: what the hooks must measure beside norms: 'inner_products', 'second_moment', 'preconditioned_trace'. wrap() hands it to GradSampleHooks.
        needs_effective_lr: whether the lr means a step per unit of gradient.
        needs_moments: False for a rule that is asked at every step, measured or not.

    Attributes:
        parts: controllers inside this one; their states and needs count as its own.
        members: leading arguments of the constructor, for the repr.

    Example:
        >>> class Doubled(Controller):
        ...     arguments = ("size",)
        ...     def __init__(self, size):
        ...         self.size = size
        ...     def propose(self, moments, *, loss, lr):
        ...         return 2.0 * self.size
        >>> Doubled(8), Doubled(8).state_dict()
        (Doubled(size=8), {'version': 1, 'controller': 'Doubled'})
    """

    version = 1
    arguments: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    parts: tuple[Any, ...] = ()
    members: tuple[Any, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """What the hooks must measure beside norms."""
        return frozenset().union(*(getattr(part, "needs", ()) for part in self.parts))

    @property
    def needs_effective_lr(self) -> bool:
        """Whether propose takes the lr as a step per unit of gradient."""
        return any(getattr(part, "needs_effective_lr", False) for part in self.parts)

    @property
    def needs_moments(self) -> bool:
        """Whether propose needs moments; without parts it does."""
        return not self.parts or any(getattr(part, "needs_moments", True) for part in self.parts)

    @property
    def first_batch_size(self) -> Any:
        """The size to start with, that of the first part; None leaves it to the loader."""
        return getattr(self.parts[0], "first_batch_size", None) if self.parts else None

    def bind(self, optimizer: Optimizer, effective_lr: Any = None, parameters: dict[str, Any] | None = None) -> None:
        """Called by wrap() and the scheduler before anything is measured.

        Args:
            optimizer: what steps; its class may decide the rule, its state a preconditioner. It is never written to.
            effective_lr: what the user gave, or None.
            parameters: {name: parameter} of what is measured, once that is known.
        """
        for part in self.parts:
            if hasattr(part, "bind"):
                part.bind(optimizer, effective_lr, parameters)

    def clips(self, max_grad_norm: float) -> None:
        """Called by wrap(max_grad_norm=): optimizer.step() clips the gradient to this norm."""
        for part in self.parts:
            if hasattr(part, "clips"):
                part.clips(max_grad_norm)

    def lr_rule(self) -> Callable[[int], float] | None:
        """A function of the batch size, giving the factor on the lr of the steps to come, which stays as it is when the controller goes on; or None."""
        rules = [part.lr_rule() for part in self.parts if hasattr(part, "lr_rule")]
        return next((rule for rule in rules if rule is not None), None)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) of the latest proposal: which sizes the rule may ask for, as far as is known what it measures. (NaN, NaN): the proposal has no error, or none
        that is known. (0, ∞): it has one, which is not known yet.

        Ratios of averages have Fieller's interval (`adabatch.estimators.intervals.fieller`), with t quantiles and the covariance of the averages; powers are
        taken to first order. Where theory is thin: a drift of what is averaged, a falling loss above all, counts as noise where errors come from residuals,
        which makes the interval too long; that a rule's own past sizes depend on the same measurements is left out.

        Args:
            level: probability with which intervals of this kind hold what the rule would ask for if it knew its averages without error.
        """
        return NO_INTERVAL

    def readings(self) -> dict[str, float]:
        """What the rule estimates beside its proposal, for the history: f_star, preconditioned_trace_ema and their _std_error, where it has them."""
        return {name: value for part in self.parts if hasattr(part, "readings") for name, value in part.readings().items()}

    def advance(self, *, samples: int, epoch: int) -> None:
        """Called by the scheduler at every step, before propose.

        Args:
            samples: of the batch just stepped.
            epoch: how many epochs have ended.
        """
        for part in self.parts:
            if hasattr(part, "advance"):
                part.advance(samples=samples, epoch=epoch)

    def state_dict(self) -> dict[str, Any]:
        """The class's name, and the averages and counts as plain numbers."""
        state = {"version": self.version, "controller": type(self).__name__, **{name: _plain(getattr(self, name)) for name in self.saved}}
        return state | {"parts": [part.state_dict() for part in self.parts]} if self.parts else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version, or the state of another controller, here or in a part. Nothing is loaded then.
        """
        self._check_state(state)
        for name in self.saved:
            present = getattr(self, name)
            if hasattr(present, "load_state_dict"):
                present.load_state_dict(state[name])
            else:
                setattr(self, name, _plain(state[name]))
        for part, saved in zip(self.parts, state.get("parts", ()), strict=True):
            part.load_state_dict(saved)

    def _check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that is not of such a controller with such parts."""
        check_controller(state, self.version, type(self).__name__)
        missing = [name for name in self.saved if name not in state]
        if missing or len(state.get("parts", ())) != len(self.parts):
            lacking = f"lacks {missing}" if missing else f"has {len(state.get('parts', ()))} parts, not {len(self.parts)}"
            raise ValueError(f"the state of {type(self).__name__} {lacking}: pass what state_dict() of such a controller returned")
        for part, saved in zip(self.parts, state.get("parts", ()), strict=True):
            if hasattr(part, "_check_state"):
                part._check_state(saved)

    def __repr__(self) -> str:
        given = [*map(repr, self.members), *(f"{name}={getattr(self, name)!r}" for name in self.arguments)]
        return f"{type(self).__name__}({', '.join(given)})"


def interval_of(controller: Any, level: float = 0.9) -> tuple[float, float]:
    """The interval of a controller's latest proposal; (NaN, NaN) for any object that has none.

    Example:
        >>> interval_of(object())
        (nan, nan)
    """
    return controller.proposal_interval(level) if hasattr(controller, "proposal_interval") else NO_INTERVAL


def ratio(numerator: float, denominator: float) -> float:
    """numerator/denominator of smoothed estimates, clamped after smoothing: a numerator not above 0 gives 0, a denominator not above 0 infinity.

    Example:
        >>> ratio(6.0, 2.0), ratio(6.0, -1.0), ratio(-1.0, 2.0)
        (3.0, inf, 0.0)
    """
    if numerator <= 0:
        return 0.0
    return numerator / denominator if denominator > 0 else math.inf


def check_positive(**values: float) -> None:
    """Refuse what is no positive finite number.

    Raises:
        ValueError: naming the argument and the value.

    Example:
        >>> check_positive(scale=1.0)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse what is not among the allowed.

    Raises:
        ValueError: naming the argument, the value and the allowed ones.

    Example:
        >>> check_choice("signal", "raw", ("raw", "smoothed"))
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _plain(value: Any) -> Any:
    """A snapshot: nothing in a state changes as the run goes on."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return list(value) if isinstance(value, (list, tuple)) else dict(value) if isinstance(value, dict) else value
