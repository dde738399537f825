"""Checks of what callers pass to samplers and loaders."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, IterableDataset, Sampler

MAX_SAMPLES = 2**62


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as a Python int within ``low … high``.

    Raises:
        TypeError: ``value`` is no integer (bool and float are none either).
        ValueError: ``value`` is out of range.
    """
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return number


def is_sampler(source: object) -> bool:
    """Whether ``source`` gives an order of indices: a torch Sampler, or an iterable that is no sequence."""
    return isinstance(source, Sampler) or (isinstance(source, Iterable) and not hasattr(source, "__getitem__"))


def checked_sampler(sampler: Any) -> Iterable[int]:
    """``sampler`` itself.

    Raises:
        TypeError: it is no iterable, can be iterated only once, or yields batches.
    """
    kind = type(sampler).__name__
    if not isinstance(sampler, Iterable):
        raise TypeError(f"sampler must be an iterable of indices, got {sampler!r} of type {kind}.")
    if isinstance(sampler, Iterator):
        raise TypeError(f"sampler must start anew at each iter(), got an iterator ({kind}), which is used up after one epoch. Pass a list or a Sampler.")
    if isinstance(sampler, BatchSampler):
        raise TypeError(f"sampler must yield indices, got a batch sampler ({kind}), which yields lists of them. Pass the sampler inside it.")
    return sampler


def sample_count(source: Any) -> int:
    """Number of samples of a sized data set, or ``source`` itself where it is that number.

    Raises:
        TypeError: an iterable-style data set, or neither sized nor an integer.
        ValueError: a number out of range.
    """
    if isinstance(source, IterableDataset):
        raise TypeError(f"{type(source).__name__} is an iterable-style data set, which has no indices to sample. Pass a map-style data set.")
    if not isinstance(source, Sized):
        return checked_int("data_source must have a length, or", source, 0, MAX_SAMPLES)
    return len(source)
