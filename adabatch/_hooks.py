"""Hooks on users' modules that copies of these modules do not get."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

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
