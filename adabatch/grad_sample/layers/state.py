"""The state of a layer that is run again: what its forward pass reads is as it was before the call,
what it sets, counts, appends or draws is undone."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in a module: no state of the layer's own, and copied in vain.
TORCHS = {*vars(nn.Module()), "_compiled_call_impl"} - {
    "training", "_parameters", "_buffers", "_non_persistent_buffers_set"}
# What needs no copy: it cannot change, or belongs to others.
SHARED = frozenset((
    int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size,
    FunctionType, BuiltinFunctionType, ModuleType, nn.Parameter,
))
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
RandomState = tuple[Tensor, Tensor | None]
COPIED = (dict, list, deque, set, bytearray, np.ndarray, *GENERATORS)
# Longer containers are copied without what is in them: a history grows all through a training.
MOST_ITEMS = 256
MOST_LEVELS = 4
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: not of a class written in C


class LayerState:
    """All that a module and its submodules hold before a call.

    Buffers and tensors among the attributes are copied, and so are containers and plain objects;
    parameters are not. What lies outside (globals, class attributes) is no part of it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.calls = []
        >>> before = LayerState(layer)
        >>> layer.calls.append("first")
        >>> with before.restored():
        ...     layer.calls.append("again")
        ...     print(layer.calls)
        ['again']
        >>> layer.calls
        ['first']
    """

    def __init__(self, layer: nn.Module):
        self._states = [(module, _copied_state(vars(module), {}, Tensor.detach))
                        for module in layer.modules()]

    @contextmanager
    def restored(
        self, parameters: Mapping[nn.Parameter, Tensor] | None = None,
        widened: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> Iterator[None]:
        """The module as it was, without hooks, and with {own parameter: tensor} replaced; other
        tensors `widened`. Afterwards it is as it was before."""
        now = [(module, vars(module)) for module, _ in self._states]
        copies: dict[int, object] = {id(own): each for own, each in (parameters or {}).items()}
        try:
            for module, state in self._states:
                own = _copied_state(state, copies, widened)
                own.update((name, OrderedDict()) for name in HOOKS)
                _set_state(module, own)
            yield
        finally:
            for module, state in now:
                _set_state(module, state)


def _set_state(module: nn.Module, state: dict[str, object]) -> None:
    object.__setattr__(module, "__dict__", state)


def _copied_state(
    state: Mapping[str, object], copies: dict[int, object], widened: Callable[[Tensor], Tensor]
) -> dict[str, object]:
    """A copy of a module's attributes, in which `copies` {id of an object: its copy} are used."""
    new: dict[str, object] = {}
    for name, value in state.items():
        if name in TORCHS or type(value) in SHARED:
            new[name] = value
        elif name == "_buffers" and isinstance(value, dict):
            new[name] = {key: _copied_tensor(each, copies, widened) for key, each in value.items()}
        else:
            new[name] = _copied_tensor(value, copies, widened)
    return new


def _copied_tensor(
    value: Any, copies: dict[int, object], widened: Callable[[Tensor], Tensor]
) -> object:
    """A copy of an attribute, which may be a tensor."""
    kind: type[Any] = type(value)
    if issubclass(kind, Tensor) and kind is not nn.Parameter and id(value) not in copies:
        copies[id(value)] = widened(value.detach()).clone()
    return _copied(value, copies)


def _copied(value: Any, copies: dict[int, object], levels: int = MOST_LEVELS) -> object:
    """A copy of a container, generator of random numbers or plain object with what is in it; any
    other value as it is."""
    kind: type[Any] = type(value)  # an object's __class__ may be slow code of its own
    if id(value) in copies:
        return copies[id(value)]
    if kind in SHARED or not levels or issubclass(kind, (Tensor, nn.Module)):
        return value
    if kind is tuple:
        return tuple(_copied(each, copies, levels - 1) for each in value)
    if not issubclass(kind, COPIED) and not _is_plain(kind):
        return value
    try:
        if kind in (dict, list, set):
            new = value.copy()  # a third of copy.copy's time
        else:
            new = copy.deepcopy(value) if issubclass(kind, GENERATORS) else copy.copy(value)
    except Exception:  # of the object's own code, or what cannot be copied: shared
        return value
    copies[id(value)] = new
    _copy_items(new, copies, levels - 1)
    return new


def _copy_items(new: Any, copies: dict[int, object], levels: int) -> None:
    """Copy what is in a new container or object."""
    kind: type[Any] = type(new)
    if issubclass(kind, (list, deque)):
        items: Iterable[tuple[Any, object]] = enumerate(new)
    elif issubclass(kind, dict) or (kind.__dictoffset__ and _is_plain(kind)):
        new = new if issubclass(kind, dict) else vars(new)
        items = new.items()
    else:
        return
    if len(new) <= MOST_ITEMS:
        for key, each in list(items):
            copied = _copied(each, copies, levels)
            if copied is not each:
                new[key] = copied


def _is_plain(kind: type[Any]) -> bool:
    """Whether objects of this class are what their attributes are: it is written in Python, without
    code of its own for copies, pickling or the end of an object's life."""
    own_code = ("__copy__", "__reduce__", "__reduce_ex__", "__setstate__", "__del__")
    known = kind in (SimpleNamespace, itertools.count, itertools.cycle)
    if known or not kind.__flags__ & HEAP_TYPE or issubclass(kind, type):
        return known
    return not any(name in vars(base) for base in kind.__mro__[:-1] for name in own_code)


def random_state(device: torch.device) -> RandomState:
    """Of torch's random numbers, on the host and on the device."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextmanager
def draws_taken_back(device: torch.device) -> Iterator[list[str]]:
    """Takes back what is drawn of torch's, Python's and NumPy's random numbers; the list then names
    whose was."""
    drawn: list[str] = []
    before = _streams(device)
    try:
        yield drawn
    finally:
        after = _streams(device)
        for name, (state, put_back) in before.items():
            if not _equal(state, after[name][0]):
                put_back(state)
                drawn.append(name)


def _streams(device: torch.device) -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """{name: (state, what sets it)} of the random numbers that a layer may draw."""
    streams: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "torch": (torch.get_rng_state(), torch.set_rng_state),
        "random": (random.getstate(), random.setstate),
        "numpy": (np.random.get_state(), np.random.set_state)}  # noqa: NPY002 the global ones
    if device.type == "cuda":
        streams["cuda"] = (torch.cuda.get_rng_state(device),
                           functools.partial(torch.cuda.set_rng_state, device=device))
    return streams


def _equal(state: Any, other: Any) -> bool:
    """Whether two states of random numbers are the same."""
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, dict):  # of a NumPy bit generator that was exchanged
        return repr(state) == repr(other)
    return all(np.array_equal(one, two) for one, two in zip(state, other, strict=True))
