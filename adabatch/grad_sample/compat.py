"""What differs under torch.compile and autocast, without importing the compiler:
that alone would double the time to import adabatch."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")
_transforms = torch._C._functorch.peek_interpreter_stack
_UNCOMPILED = (
    "a layer without a grad_sample rule is run again sample by sample, outside compiled graphs: "
    "compile without fullgraph=True, or pass ignore=[...]"
)


def is_transformed() -> bool:
    """Whether what runs now is transformed by torch.func or differentiated in forward mode, for
    which taps have no derivative."""
    return _transforms() is not None or forward_ad._current_level >= 0


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether the module is what torch.compile(model) returns."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs compiled code: of such a wrapper, or of module.compile()."""
    call = module._compiled_call_impl
    return is_compiled_wrapper(module) or not (call is None or isinstance(call, FinallyCall))


def compiles_frames() -> bool:
    """Whether torch.compile compiles the frames that run now: a function mode would change them."""
    if "torch._dynamo" not in sys.modules:
        return False
    return bool(torch._C._dynamo.eval_frame.get_eval_frame_callback())


class FinallyCall:
    """Does something after every call of a module: in a forward hook it would not be done where
    KeyboardInterrupt ends the call. It takes the place that module.compile() writes to, which
    copies and pickles of the module are without.
    """

    def __init__(self, module: nn.Module, finally_do: Callable[[], None]):
        self._module, self._finally_do = weakref.ref(module), weakref.WeakMethod(finally_do)
        if module._compiled_call_impl is None:
            module._compiled_call_impl = self

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


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable(function), which imports the compiler, deferred until something else
    has imported it."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=_UNCOMPILED))
        return disabled[0](*args, **kwargs)

    # The marks of torch.compiler.disable, which the compiler looks for before it traces a function.
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_UNCOMPILED)
    return call
