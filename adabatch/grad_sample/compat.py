"""Whether modules are compiled, without importing the compiler: that alone would double the time to import adabatch; and a context that costs little."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

# Names of this module: each look-up along torch's large modules reads memory that the step has just evicted from the caches.
is_compiling, _is_grad_enabled, _is_tracing = torch.compiler.is_compiling, torch.is_grad_enabled, torch.jit.is_tracing
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none
_transforms = torch._C._functorch.peek_interpreter_stack

_NOTHING = nullcontext()


def can_measure() -> bool:
    """Whether gradients are taken of what runs now: not under no_grad, nor while a model is exported, traced or transformed by torch.func.

    Example:
        >>> with torch.no_grad():
        ...     can_measure()
        False
    """
    return _is_grad_enabled() and not _is_exporting() and (is_compiling() or not (_is_tracing() or _transforms() is not None))


def autocast_disabled(device: torch.device) -> AbstractContextManager:
    """A context in which autocast changes no types; entering torch.autocast costs as much as three small operations, so it is left out where none is on.

    Example:
        >>> with autocast_disabled(torch.device("cpu")):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    if is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether the module is what torch.compile(model) returns.

    Example:
        >>> is_compiled_wrapper(nn.Linear(1, 1))
        False
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs compiled code: it is such a wrapper, or module.compile() was called."""
    return is_compiled_wrapper(module) or getattr(module, "_compiled_call_impl", None) is not None
