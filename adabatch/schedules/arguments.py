"""Checks of the arguments of schedules: each returns the checked value, or says what is wrong, the value got and the values allowed."""

import math
import numbers
import operator
from collections.abc import Callable, Iterable


def integer(name: str, value: object, at_least: int | None = None) -> int:
    """Check an integer.

    Args:
        name: the argument's name, for the message.
        value: an int, or anything with ``__index__`` (a NumPy integer).
        at_least: the smallest value allowed; None allows all.

    Returns:
        ``value`` as a plain int.

    Raises:
        TypeError: ``value`` is no integer; bool counts as none.
        ValueError: ``value`` is below ``at_least``.

    Example:
        >>> integer("step_size", 30, at_least=1)
        30
        >>> integer("step_size", 0, at_least=1)
        Traceback (most recent call last):
        ValueError: step_size must be an integer of at least 1, got 0.
    """
    wanted = "an integer" if at_least is None else f"an integer of at least {at_least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__}).")
    number = operator.index(value)
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be {wanted}, got {number}.")
    return number


def real(name: str, value: object, above: float | None = None) -> float:
    """Check a finite real number, greater than ``above`` where that is given.

    Returns:
        ``value`` as a plain int if it is integral, else as a plain float.

    Raises:
        TypeError: ``value`` is no real number.
        ValueError: ``value`` is not finite, or not greater than ``above``.

    Example:
        >>> real("gamma", 1.5, above=0)
        1.5
        >>> real("gamma", -1.0, above=0)
        Traceback (most recent call last):
        ValueError: gamma must be a finite number greater than 0, got -1.0.
    """
    wanted = "a finite number" if above is None else f"a finite number greater than {above}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__}).")
    if not math.isfinite(value) or (above is not None and not value > above):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def function(name: str, value: object) -> Callable:
    """Check a callable.

    Raises:
        TypeError: ``value`` cannot be called.

    Example:
        >>> function("bs_lambda", abs)
        <built-in function abs>
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r} ({type(value).__name__}).")
    return value


def choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Check one word out of several.

    Raises:
        ValueError: ``value`` is none of ``allowed``.

    Example:
        >>> choice("mode", "min", ("min", "max"))
        'min'
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def integers(name: str, values: object, at_least: int) -> list[int]:
    """Check a non-empty list or tuple of integers.

    Raises:
        TypeError: ``values`` is no list or tuple, or one of them is no integer.
        ValueError: ``values`` is empty, or one of them is below ``at_least``.

    Example:
        >>> integers("milestones", (25, 80), at_least=1)
        [25, 80]
    """
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of integers, got {values!r} ({type(values).__name__}).")
    if not values:
        raise ValueError(f"{name} must hold at least one integer, got {values!r}.")
    return [integer(f"{name}[{i}]", value, at_least) for i, value in enumerate(values)]
