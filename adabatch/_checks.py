"""Checks of arguments and states, which several folders share.

Each returns the checked value, or raises TypeError for a wrong type and ValueError for a wrong
value: what is wrong, the value got and the values allowed.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")


def integer(
    name: str, value: object, at_least: int | None = None, at_most: int | None = None
) -> int:
    """An int, or anything with `__index__` (a NumPy integer), as a plain int; bool is refused.

    Example:
        >>> integer("step_size", 0, at_least=1)
        Traceback (most recent call last):
        ValueError: step_size must be an integer >= 1, got 0
    """
    allowed = "an integer" if at_least is None else f"an integer >= {at_least}"
    allowed = allowed if at_most is None else f"an integer from {at_least} to {at_most}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    above = at_most is not None and number > at_most
    if above or (at_least is not None and number < at_least):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def integers(name: str, values: object, at_least: int) -> list[int]:
    """A list or tuple of at least one integer, as a list."""
    if not isinstance(values, (list, tuple)):
        kind = type(values).__name__
        raise TypeError(f"{name} must be a list or tuple of integers, got {values!r} ({kind})")
    if not values:
        raise ValueError(f"{name} must hold at least one integer, got {values!r}")
    return [integer(f"{name}[{i}]", value, at_least) for i, value in enumerate(values)]


def real(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None,
    at_most: float | None = None, or_else: str = "",
) -> float:
    """A finite real number as a plain int or float; bool is refused.

    Args:
        above, at_least, at_most: the range allowed.
        or_else: another value that the caller takes, for the message.

    Example:
        >>> real("gamma", -1.0, above=0)
        Traceback (most recent call last):
        ValueError: gamma must be a positive number, got -1.0
    """
    allowed = "a finite number"
    if above is not None:
        allowed = f"a number above {above}" if above else "a positive number"
    elif at_least is not None:
        allowed = f"a number >= {at_least}"
        allowed = allowed if at_most is None else f"a number from {at_least} to {at_most}"
    allowed += f" or {or_else}" if or_else else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    in_range = low <= number <= high and (above is None or number > above)
    if not (math.isfinite(number) and in_range):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def positive(name: str, value: object) -> float:
    """A positive finite number."""
    return real(name, value, above=0)


def smoothing(value: object) -> float:
    """The decay of a moving average, from 0 (no smoothing) to below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        allowed = "a number from 0 to below 1 (0.95 is usual)"
        raise ValueError(f"smoothing must be {allowed}, got {value!r}")
    return value


def level(name: str, value: object) -> float:
    """A probability, both ends excluded."""
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        allowed = "a number between 0 and 1, both excluded (0.9 is usual)"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value


def returned(what: str, value: object, hint: str = "a number") -> float:
    """What a user's function returned, as a float; TypeError: None, a text or whatever else is no
    number.

    Example:
        >>> returned("the coupling", None)
        Traceback (most recent call last):
        TypeError: the coupling must return a number, got None
    """
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch's for a tensor of several values
        pass
    raise TypeError(f"{what} must return {hint}, got {value!r}")


def takes(call: Callable[..., object], *arguments: object) -> bool:
    """Whether a function can be called with these positional arguments; True where its signature
    is not known, as of one written in C.

    Example:
        >>> takes(lambda a, b: 0.0, 1, 2), takes(lambda a: 0.0, 1, 2)
        (True, False)
    """
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def choice(name: str, value: T, allowed: Iterable[object]) -> T:
    """One of the allowed values."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def function(name: str, value: F) -> F:
    """A callable."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r} ({type(value).__name__})")
    return value


def check_version(state: object, version: int, what: str) -> None:
    """Raise for a state that is no dict (TypeError) or is of another version (ValueError)."""
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise TypeError(f"the state of {what} must be the dict that its state_dict() returned, "
                        f"got {kind}")
    found = state.get("version")
    if found != version:
        raise ValueError(f"the state of {what} has version {found!r}; this release of adabatch "
                         f"reads version {version}. Use the release that wrote it.")


def storable(name: str, value: object) -> Any:
    """A part of a state as torch.load(weights_only=True) reads it back: NumPy's numbers become
    Python's. TypeError: anything but numbers, texts, tensors, and lists, tuples and dicts of them.

    Example:
        >>> storable("counts", [np.int64(3), 0.5])
        [3, 0.5]
        >>> storable("counts", {"seen": {3}})
        Traceback (most recent call last):
        TypeError: counts['seen'] must be a number, a text, a tensor, or a list, tuple or dict of \
such, which torch.load(weights_only=True) reads, got {3}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (list, tuple):
        parts = (storable(f"{name}[{i}]", each) for i, each in enumerate(value))  # type: ignore
        return type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, dict):
        return {storable(f"a key of {name}", key): storable(f"{name}[{key!r}]", each)
                for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor):
        return value
    raise TypeError(
        f"{name} must be a number, a text, a tensor, or a list, tuple or dict of such, which "
        f"torch.load(weights_only=True) reads, got {value!r}")


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's error on an unknown keyword name the nearest known one.

    Example:
        >>> suggest_keywords(lambda *, measure=None: None)(mesure=1)
        Traceback (most recent call last):
        TypeError: <lambda>() got an unexpected keyword argument 'mesure': did you mean measure=?
    """
    signature = inspect.signature(function)
    known = [name for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in signature.parameters:
                near = difflib.get_close_matches(name, known, n=1)
                fix = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument "
                                f"{name!r}: {fix}")
        return function(*args, **kwargs)

    return checked
