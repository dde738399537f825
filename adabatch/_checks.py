"""Checks that several folders share: versions of state dicts, names of keywords."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def check_version(state: dict[str, Any], version: int, what: str) -> None:
    """Refuse a state of another version.

    Raises:
        TypeError: no dict.
        ValueError: the state's version is not `version`, or it has none.

    Example:
        >>> check_version({"version": 1}, 1, "CABS")
    """
    if not isinstance(state, dict):
        raise TypeError(f"the state of {what} must be the dict that its state_dict() returned, got {type(state).__name__}")
    found = state.get("version")
    if found != version:
        raise ValueError(f"the state of {what} has version {found!r}; this release of adabatch reads version {version}. Use the release that wrote it.")


def check_controller(state: dict[str, Any], version: int, name: str) -> None:
    """Refuse a state of another version, or of a controller of another class. States written before they named their controller carry no name and pass.

    Raises:
        TypeError: no dict.
        ValueError: another version, or another controller.

    Example:
        >>> check_controller({"version": 1, "controller": "CABS"}, 1, "CABS")
        >>> check_controller({"version": 1}, 1, "CABS")
    """
    check_version(state, version, name)
    found = state.get("controller", name)
    if found != name:
        raise ValueError(
            f"the state is that of a controller {found}, and was to be loaded into {name}: go on with {found}, or begin without the controller's state"
        )


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as a Python int within low … high.

    Raises:
        TypeError: not an integer (bool and float are refused too).
        ValueError: out of range.

    Example:
        >>> checked_int("batch_size", 8, 1)
        8
    """
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or type(value).__name__ in ("bool", "bool_"):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return number


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
