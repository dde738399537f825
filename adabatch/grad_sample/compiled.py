"""Whether modules are compiled, without importing the compiler: that alone would double the time to import adabatch."""

from __future__ import annotations

import sys

from torch import nn


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
