"""What is put on users' modules, and copies of these modules do not get."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class UncopiedHook:
    """A hook that deep copies and pickles of its module do not have: in its place they have a
    function of the standard library that does nothing, so that they load without adabatch.

    Args:
        function: the hook itself.
        copies: collects the handles of what deep copies have in its place, to be removed.
        owner: what the hook keeps alive.

    Example:
        >>> import torch
        >>> layer, copies = torch.nn.Linear(1, 1), []
        >>> hook = UncopiedHook(lambda module, args, output: print("called"), copies)
        >>> handle = hook.held(layer.register_forward_hook(hook))
        >>> copied = copy.deepcopy(layer)
        >>> _ = copied(torch.ones(1)), layer(torch.ones(1))
        called
        >>> copies.pop().remove()
        >>> len(copied._forward_hooks), len(layer._forward_hooks)
        (0, 1)
    """

    def __init__(
        self, function: Callable[..., object], copies: list[RemovableHandle], owner: object = None
    ):
        self._function, self._copies, self.owner = function, copies, owner
        self._handle: RemovableHandle | None = None

    def held(self, handle: RemovableHandle) -> RemovableHandle:
        """The hook's own handle, which is kept."""
        self._handle = handle
        return handle

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., object]:
        if self._handle is not None:
            self._copies.append(copy.deepcopy(self._handle, memo))  # of the copied dictionary
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (nullcontext(), "__exit__")


class FinallyCall:
    """Does something after every call of a module: in a forward hook it would not be done where
    KeyboardInterrupt ends the call. It takes the place that module.compile() writes to, which
    copies and pickles of the module are without.
    """

    def __init__(self, module: nn.Module, finally_do: Callable[[], None]):
        self._module, self._finally_do = weakref.ref(module), weakref.WeakMethod(finally_do)
        self.place()

    def place(self) -> None:
        """Put it on the module, unless that is compiled."""
        module = self._module()
        if module is not None and module._compiled_call_impl is None:
            module._compiled_call_impl = self

    @property
    def placed(self) -> bool:
        """Whether the module's calls run through it."""
        module = self._module()
        return module is not None and module._compiled_call_impl is self

    def __call__(self, *args: object, **kwargs: object) -> object:
        module = self._module()
        assert module is not None
        if torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            method = self._finally_do()
            if method is not None:
                method()

    def remove(self) -> None:
        """Take it off the module."""
        module = self._module()
        if module is not None and module._compiled_call_impl is self:
            del module._compiled_call_impl
