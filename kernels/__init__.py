"""Gradient-moment kernels: per-sample squared norms, second moments and inner products, straight from a layer's activations and output gradients.

Legend: N samples, T positions, I in, O out, C channels, D embedding width, V rows of an embedding, K kernel, P numel.

`adabatch.kernels.<op>` picks the backend; `adabatch.kernels.reference.<op>` is the definition in plain torch, `adabatch.kernels.triton.<op>` the GPU's kernel,
with the same name and signature. ADABATCH_KERNELS=reference, read at import, forces the definition everywhere. Kernels import nothing of adabatch but each
other, and see no layers.

Example:
    >>> import torch
    >>> outer_sq_norms(torch.ones(2, 1, 4), torch.ones(2, 1, 1))
    tensor([4., 4.])
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from adabatch.kernels import cpu, operators, reference
from adabatch.kernels.chunks import CHUNK_BYTES, accumulation_dtype, outer_form, sample_chunks

__all__ = ["CHUNK_BYTES", *reference.__all__, "accumulation_dtype", "outer_form", "reference", "sample_chunks"]

# Device type -> the modules asked for an operation, first come first served; what none of them has is the reference's.
# ROCm calls its devices "cuda" as well.
BACKENDS: dict[str, tuple[ModuleType, ...]] = {"cpu": (cpu,), "cuda": (operators,)}
FORCED = os.environ.get("ADABATCH_KERNELS", "")
if FORCED not in ("", "reference"):
    raise ValueError(f"ADABATCH_KERNELS is {FORCED!r}; allowed are 'reference' and nothing. Unset it, or set it to 'reference', before importing adabatch.")


def __getattr__(name: str) -> ModuleType:
    """adabatch.kernels.triton, imported when asked for: Triton need not be installed, and takes its time to import."""
    if name == "triton":
        return importlib.import_module("adabatch.kernels.triton")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether an operation on tensors of this one's device is done by a kernel for that device, and not by its definition.

    Example:
        >>> import torch
        >>> has_kernel("weight_grad_moments", torch.zeros(1)) and not FORCED, has_kernel("outer_dot", torch.zeros(1))
        (True, False)
    """
    return not FORCED and any(hasattr(backend, name) for backend in BACKENDS.get(tensor.device.type, ()))


def _dispatched(definition: Callable) -> Callable:
    """The operation as users call it: the first backend for the first tensor's device that has it, else its definition."""
    name = definition.__name__

    @functools.wraps(definition)
    def operation(*args, **kwargs):
        if not FORCED:
            first = args[0] if args else next(iter(kwargs.values()))
            for backend in BACKENDS.get(first.device.type, ()):
                if hasattr(backend, name):
                    return getattr(backend, name)(*args, **kwargs)
        return definition(*args, **kwargs)

    return operation


outer_sq_norms = _dispatched(reference.outer_sq_norms)
outer_second_moment = _dispatched(reference.outer_second_moment)
outer_dot = _dispatched(reference.outer_dot)
embedding_sq_norms = _dispatched(reference.embedding_sq_norms)
embedding_second_moment = _dispatched(reference.embedding_second_moment)
embedding_dot = _dispatched(reference.embedding_dot)
dense_sq_norms = _dispatched(reference.dense_sq_norms)
dense_second_moment = _dispatched(reference.dense_second_moment)
dense_dot = _dispatched(reference.dense_dot)
conv_sq_norms = _dispatched(reference.conv_sq_norms)
conv_second_moment = _dispatched(reference.conv_second_moment)
conv_dot = _dispatched(reference.conv_dot)
conv_grad_sample = _dispatched(reference.conv_grad_sample)
weight_grad_moments = _dispatched(reference.weight_grad_moments)
conv_weight_grad_moments = _dispatched(reference.conv_weight_grad_moments)
affine_grad_sample = _dispatched(reference.affine_grad_sample)
affine_sq_norms = _dispatched(reference.affine_sq_norms)
preconditioned_trace = _dispatched(reference.preconditioned_trace)
