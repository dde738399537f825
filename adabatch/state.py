"""State dicts: plain numbers and tensors with a version."""

from __future__ import annotations

from typing import Any


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
