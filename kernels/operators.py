"""What all kernels share: the registry of operations, their dispatch (see README.md), types, chunks
and forms.

Legend: N samples, T positions, I in, O out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

# Two cores share 2 MiB of second-level cache: chunks of 1 to 4 MiB ran fastest; smaller ones are
# dominated by the cost of their calls.
CHUNK_BYTES = 4 * 2**20
# On a CPU one float32 sum of two million squares is 8e-5 too small: small terms meet a large sum.
LONGEST_SUM = 2**14
# One pass over memory per element of a per-sample gradient costs about as much as this many
# multiplications of a matrix product (two cores with AVX-512).
PASS = 4

FORCED = os.environ.get("ADABATCH_KERNELS", "")
if FORCED not in ("", "reference"):
    raise ValueError(
        f"ADABATCH_KERNELS is {FORCED!r}; allowed are 'reference' and nothing. Unset it, or set it "
        "to 'reference', before importing adabatch."
    )

Ints = Sequence[int]
Results = Tensor | tuple[Tensor | None, ...]
Shapes = Callable[..., list[Ints]]
Function = Callable[..., Results]
F = TypeVar("F", bound=Function)
_LIBRARY = torch.library.Library("adabatch", "FRAGMENT")


class Operation(NamedTuple):
    """A registered operation.

    Attributes:
        call: what `forms` has for the first tensor's device, else `definition`.
        operator: calls torch.ops.adabatch.<name>; None without a schema.
        forms: device type, or "triton" -> the function that replaces the definition.
        compiled: the same for device types under torch.compile.
    """

    call: Function
    definition: Function
    operator: Function | None
    forms: dict[str, Function]
    compiled: dict[str, Function]


OPERATIONS: dict[str, Operation] = {}


def operation(
    schema: str = "", shapes: Shapes | None = None, opaque: tuple[str, ...] = ("cuda",)
) -> Callable[[F], F]:
    """Register a definition, which is returned as it is, under its function's name.

    Args:
        schema: the operator's, without its name; '' for an operation without a kernel.
        shapes: the operator's positional arguments -> its results' shapes. All results have the
            type sums are kept in; one that is not requested (second_moment=False) is empty.
        opaque: device types on which torch.compile keeps the operator; elsewhere it traces the
            definition.
    """

    def register(definition: F) -> F:
        forms: dict[str, Function] = {}
        compiled: dict[str, Function] = {}
        operator = None
        if schema and shapes is not None:
            operator = _define(definition, schema, shapes, forms)
            if not FORCED:
                forms["cuda"] = operator
                compiled.update(dict.fromkeys(opaque, operator))

        @functools.wraps(definition)
        def call(*args: Any, **kwargs: Any) -> Results:
            first = args[0] if args else next(iter(kwargs.values()))
            form = forms.get(first.device.type)
            if form is None:
                return definition(*args, **kwargs)
            if torch.compiler.is_compiling():
                form = compiled.get(first.device.type, definition)
            return form(*args, **kwargs)

        name = definition.__name__
        OPERATIONS[name] = Operation(call, definition, operator, forms, compiled)
        return definition

    return register


def implements(
    backend: Literal["cpu", "triton"], takes: Callable[..., bool] | None = None
) -> Callable[[F], F]:
    """Register a faster form, returned as it is, of the operation with the function's name;
    positional arguments for which `takes` is False are left to the definition."""

    def register(form: F) -> F:
        operation = OPERATIONS[form.__name__]

        @functools.wraps(form)
        def checked(*args: object, **kwargs: object) -> Results:
            taken = takes is None or takes(*args)
            return (form if taken else operation.definition)(*args, **kwargs)

        if backend == "triton" or not FORCED:
            operation.forms[backend] = form if takes is None else checked
        return form

    return register


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether tensors on this device have another form than the definition.

    Example:
        >>> has_kernel("weight_grad_moments", torch.zeros(1)) and not FORCED
        True
        >>> has_kernel("outer_dot", torch.zeros(1))
        False
    """
    return tensor.device.type in OPERATIONS[name].forms


@functools.cache
def load_triton() -> bool:
    """Import adabatch.kernels.triton, for a GPU's tensors; False, with a warning, if that fails."""
    try:
        importlib.import_module("adabatch.kernels.triton")
    except (ImportError, AttributeError) as error:  # an old Triton lacks names that are used
        warnings.warn(
            f"The Triton kernels cannot be loaded ({error}); measuring with plain torch instead, "
            "which is slower and needs more memory. Install a Triton that fits your torch "
            "(pip install 'adabatch[triton]'), or set ADABATCH_KERNELS=reference to choose plain "
            "torch.",
            stacklevel=4,
        )
        return False
    return True


def _define(
    definition: Function, schema: str, shapes: Shapes, forms: dict[str, Function]
) -> Function:
    """Define the torch operator; gives a caller with the definition's signature."""
    name = definition.__name__

    def run(form: Function, first: Tensor, *args: object, **kwargs: bool) -> Results:
        results = form(first, *args, **kwargs)
        if isinstance(results, Tensor):
            return results
        # None, which an operator cannot return, is an empty tensor.
        empty = first.new_empty(0, dtype=accumulation_dtype(first, *args))
        return tuple(empty if each is None else each for each in results)

    def on_gpu(first: Tensor, *args: object, **kwargs: bool) -> Results:
        return run(forms["triton"] if load_triton() else definition, first, *args, **kwargs)

    def fake(first: Tensor, *args: object, second_moment: bool = True, **_: bool) -> Results:
        dtype = accumulation_dtype(first, *args)
        sizes = [tuple(shape) for shape in shapes(first, *args)]
        if not second_moment:
            sizes[-1] = (0,)
        results = tuple(first.new_empty(size, dtype=dtype) for size in sizes)
        return results if len(results) > 1 else results[0]

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, functools.partial(run, definition), "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"adabatch::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.adabatch, name).default
    if "second_moment" not in schema:
        return functools.wraps(definition)(lambda *args, **kwargs: operator(*args, **kwargs))

    @functools.wraps(definition)
    def with_moments(
        *args: object, second_moment: bool = False, deterministic: bool | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Determinism is settled where the call is traced."""
        kwargs["deterministic"] = follows_determinism(deterministic)
        grad, norms, second = operator(*args, second_moment=second_moment, **kwargs)
        return grad, norms, second if second_moment else None

    return with_moments


def follows_determinism(deterministic: bool | None) -> bool:
    """The caller's choice, or torch's own switch."""
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    return deterministic


def accumulation_dtype(*tensors: object) -> torch.dtype:
    """The type sums are kept in: float32, or float64 if any of the tensors is float64.

    Example:
        >>> accumulation_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1))
        torch.float32
        >>> accumulation_dtype(torch.zeros(1, dtype=torch.float64), torch.zeros(1))
        torch.float64
    """
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def sample_chunks(
    numel_per_sample: int, dtype: torch.dtype, *tensors: Tensor, longest: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Views of the tensors [N, ...] in runs of at most `longest` samples, whose intermediate
    results, numel_per_sample of dtype, fit CHUNK_BYTES.

    Under torch.compile there is one chunk: a loop over a number of samples that changes would be
    unrolled, and compiled again for each number.

    Example:
        >>> [len(rows) for rows, in sample_chunks(2**19, torch.float32, torch.zeros(5))]
        [2, 2, 1]
    """
    if torch.compiler.is_compiling():
        return [tensors]
    length = max(1, CHUNK_BYTES // max(1, numel_per_sample * dtype.itemsize))
    if longest is not None:
        length = min(length, longest)
    return list(zip(*(tensor.split(length) for tensor in tensors), strict=True))


def row_sq_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ rows² over all dimensions but the first, added in `dtype`: [N, ...] -> [N].

    The squares are never stored, whatever the input's type. Long sums on a CPU take two stages.

    Example:
        >>> row_sq_norms(torch.ones(2, 3, 4), torch.float32)
        tensor([12., 12.])
    """
    norm, numel = torch.linalg.vector_norm, rows.shape[1:].numel()
    if rows.dim() > 2 and rows.device.type == "cpu" and numel > LONGEST_SUM:
        rows = norm(rows.flatten(2), dim=2, dtype=dtype)
    rows = rows.reshape(rows.shape[0], rows.shape[1:].numel())
    return norm(rows, dim=1, dtype=dtype).square()


_forced_form: list[str] = []


@contextlib.contextmanager
def forced_form(form: str) -> Iterator[None]:
    """Within it outer_form and conv_form give this form wherever it can serve: for timing them.

    Example:
        >>> with forced_form("gram"):
        ...     outer_form(256, 256, 1024)
        'gram'
    """
    _forced_form.append(form)
    try:
        yield
    finally:
        _forced_form.pop()


def is_forced(*forms: str) -> bool:
    """Whether the form in force, if any, is one of these."""
    return bool(_forced_form) and _forced_form[-1] in forms


def outer_form(
    positions: float, width_in: int, width_out: int, *, with_gradient: bool = False,
    halved: bool = False,
) -> Literal["rows", "gram", "gradients"]:
    """How ‖G_n‖² of G_n = Σ_t b_nt a_ntᵀ is found from T = `positions`: the cheaper of

    "rows", T = 1: ‖a_n‖² ‖b_n‖²;
    "gram": T² (I + O) multiplications, or T (T + 1) / 2 (I + O) where symmetry halves them;
    "gradients": G_n, T I O multiplications, or 2 PASS passes of I O with the weight gradient.

    Args:
        with_gradient: Σ_n G_n is computed as well, by one product for all samples.
        halved: the Gram matrices' lower triangle suffices (the Triton kernel).

    Example:
        >>> outer_form(1, 256, 1024), outer_form(128, 256, 1024), outer_form(256, 256, 1024)
        ('rows', 'gram', 'gradients')
        >>> outer_form(128, 256, 1024, with_gradient=True)
        'gradients'
    """
    if positions == 1:
        return "rows"
    if is_forced("gram", "gradients"):
        return "gram" if is_forced("gram") else "gradients"
    pairs = positions * (positions + 1) / 2 if halved else positions**2
    gradients = 2 * PASS if with_gradient else positions
    gram = pairs * (width_in + width_out) < gradients * width_in * width_out
    return "gram" if gram else "gradients"
