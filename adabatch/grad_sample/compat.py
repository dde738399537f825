"""What differs under torch.compile and autocast, without importing the compiler:
that alone would double the time to import adabatch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from adabatch._hooks import FinallyCall

P = ParamSpec("P")
R = TypeVar("R")
_UNCOMPILED = (
    "a layer without a grad_sample rule is run again sample by sample, outside compiled graphs: "
    "compile without fullgraph=True, or pass ignore=[...]"
)


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


def while_tracing(function: Callable[P, R]) -> Callable[P, R]:
    """The method, without arguments, runs while torch.compile traces a graph, and not in it."""
    vars(function).update(_dynamo_marked_constant=True)
    return function


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
