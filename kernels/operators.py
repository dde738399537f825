"""The Triton kernels as torch operators, `torch.ops.adabatch.<op>`: opaque to torch.compile, which learns shapes from the fake implementations.

Each runs the Triton kernel on CUDA (and ROCm) tensors and the definition on CPU tensors; where Triton cannot be imported, the definition on the GPU too, with
one warning. Triton itself is imported at the first call that needs it. Names and signatures are those of the definitions in reference.py.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from adabatch.kernels import reference

__all__ = [
    "affine_sq_norms",
    "conv_second_moment",
    "conv_sq_norms",
    "conv_weight_grad_moments",
    "embedding_sq_norms",
    "outer_second_moment",
    "outer_sq_norms",
    "preconditioned_trace",
    "weight_grad_moments",
]

_GEOMETRY = "SymInt[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
_LIBRARY = torch.library.Library("adabatch", "FRAGMENT")


@functools.cache
def triton_kernels() -> ModuleType | None:
    """adabatch.kernels.triton, or None, with a warning the first time, where it cannot be imported.

    Triton is asked for on a GPU only, so a CPU never hears of it.
    """
    try:
        return importlib.import_module("adabatch.kernels.triton")
    except (ImportError, AttributeError) as error:  # an old Triton lacks names that the kernels use
        warnings.warn(
            f"The Triton kernels cannot be loaded ({error}); measuring with plain torch instead, which is slower and needs more memory. "
            "Install a Triton that fits your torch (pip install 'adabatch[triton]'), or set ADABATCH_KERNELS=reference to choose plain torch.",
            stacklevel=4,
        )
        return None


def _register(schema: str, fake: Callable) -> None:
    """Define an operator whose results are those of the definition of the same name, None given as an empty tensor."""
    name = schema.split("(")[0]

    def run(module: ModuleType, *args, second_moment: bool | None = None, deterministic: bool | None = None):
        if second_moment is None:
            return getattr(module, name)(*args)
        results = getattr(module, name)(*args, second_moment=second_moment, deterministic=deterministic)
        return tuple(args[0].new_empty(0, dtype=torch.float32) if result is None else result for result in results)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, functools.partial(run, reference), "CPU")
    _LIBRARY.impl(name, lambda *args, **kwargs: run(triton_kernels() or reference, *args, **kwargs), "CUDA")
    torch.library.register_fake(f"adabatch::{name}", fake, lib=_LIBRARY)


def _sums(like: Tensor, *others: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in (like, *others) if tensor is not None} else torch.float32


def _norms(activations: Tensor, backprops: Tensor, *_) -> Tensor:
    return activations.new_empty(activations.shape[0], dtype=_sums(activations, backprops))


def _embedding_norms(ids: Tensor, backprops: Tensor) -> Tensor:
    return backprops.new_empty(ids.shape[0], dtype=_sums(backprops))


def _affine_norms(activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    return _norms(activations, backprops), _norms(activations, backprops)


def _outer_moment(activations: Tensor, backprops: Tensor) -> Tensor:
    return activations.new_empty(backprops.shape[2], activations.shape[2], dtype=_sums(activations, backprops))


def _conv_moment(activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], *_) -> Tensor:
    return activations.new_empty(tuple(weight_shape), dtype=_sums(activations, backprops))


def _trace(activations: Tensor, backprops: Tensor, preconditioner: Tensor) -> Tensor:
    return activations.new_empty((), dtype=_sums(activations, backprops, preconditioner))


def _moments(moment: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def fake(*args, second_moment: bool, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        second = moment(*args) if second_moment else args[0].new_empty(0, dtype=torch.float32)
        return moment(*args), _norms(*args), second

    return fake


_register(
    "weight_grad_moments(Tensor activations, Tensor backprops, *, bool second_moment, bool deterministic) -> (Tensor, Tensor, Tensor)", _moments(_outer_moment)
)
_register("outer_sq_norms(Tensor activations, Tensor backprops) -> Tensor", _norms)
_register("outer_second_moment(Tensor activations, Tensor backprops) -> Tensor", _outer_moment)
_register("preconditioned_trace(Tensor activations, Tensor backprops, Tensor preconditioner) -> Tensor", _trace)
_register("affine_sq_norms(Tensor activations, Tensor backprops, Tensor? mean, Tensor? rstd) -> (Tensor, Tensor)", _affine_norms)
_register("embedding_sq_norms(Tensor ids, Tensor backprops) -> Tensor", _embedding_norms)
_register(
    f"conv_weight_grad_moments(Tensor activations, Tensor backprops, {_GEOMETRY}, *, bool second_moment, bool deterministic) -> (Tensor, Tensor, Tensor)",
    _moments(_conv_moment),
)
_register(f"conv_sq_norms(Tensor activations, Tensor backprops, {_GEOMETRY}) -> Tensor", _norms)
_register(f"conv_second_moment(Tensor activations, Tensor backprops, {_GEOMETRY}) -> Tensor", _conv_moment)


def _operation(name: str) -> Callable:
    """The operator with its definition's signature: None for what was not asked for, determinism resolved where the call is traced."""
    definition = getattr(reference, name)

    @functools.wraps(definition)
    def operation(*args, **kwargs):
        return getattr(torch.ops.adabatch, name)(*args, **kwargs)

    @functools.wraps(definition)
    def operation_with_moments(*args, second_moment: bool = False, deterministic: bool | None = None, **kwargs):
        fixed = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
        grad, norms, second = getattr(torch.ops.adabatch, name)(*args, **kwargs, second_moment=second_moment, deterministic=fixed)
        return grad, norms, second if second_moment else None

    return operation_with_moments if definition.__kwdefaults__ else operation


affine_sq_norms = _operation("affine_sq_norms")
conv_second_moment = _operation("conv_second_moment")
conv_sq_norms = _operation("conv_sq_norms")
conv_weight_grad_moments = _operation("conv_weight_grad_moments")
embedding_sq_norms = _operation("embedding_sq_norms")
outer_second_moment = _operation("outer_second_moment")
outer_sq_norms = _operation("outer_sq_norms")
preconditioned_trace = _operation("preconditioned_trace")
weight_grad_moments = _operation("weight_grad_moments")
