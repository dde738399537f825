"""How the reference kernels walk over samples: accumulation type and cache-sized chunks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Two cores with 2 MiB of second-level cache between them: products of 1 to 4 MiB a chunk ran fastest, smaller ones paid for their calls.
CHUNK_BYTES = 4 * 2**20

# On a CPU one float32 sum of two million squares is 8e-5 too small: many small terms meet a large sum.
LONGEST_SUM = 2**14

# One pass over memory per element of a per-sample gradient costs about as much as this many
# multiplications of a matrix product (two cores with AVX-512).
PASS = 4

__all__ = ["CHUNK_BYTES", "accumulation_dtype", "outer_form", "row_sq_norms", "sample_chunks"]


def outer_form(
    positions: float, width_in: int, width_out: int, *, with_gradient: bool = False, halved: bool = False
) -> Literal["rows", "gram", "gradients"]:
    """How ‖G_n‖² of G_n = Σ_t b_nt a_ntᵀ is found from T = `positions`: the cheaper of

    "rows", T = 1: ‖a_n‖² ‖b_n‖²;
    "gram": T² (I + O) multiplications, or T (T + 1) / 2 (I + O) where symmetry halves them;
    "gradients": G_n, T I O multiplications, or 2 PASS passes of I O with the weight gradient.

    Args:
        positions, width_in, width_out: T, I, O.
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
    pairs = positions * (positions + 1) / 2 if halved else positions**2
    gradients = 2 * PASS if with_gradient else positions
    products = width_in * width_out
    return "gram" if pairs * (width_in + width_out) < gradients * products else "gradients"


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The type sums are kept in: float32, or float64 if any of the tensors is float64.

    Example:
        >>> accumulation_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1))
        torch.float32
        >>> accumulation_dtype(torch.zeros(1, dtype=torch.float64), torch.zeros(1))
        torch.float64
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def sample_chunks(numel_per_sample: int, dtype: torch.dtype, *tensors: Tensor, longest: int | None = None) -> list[tuple[Tensor, ...]]:
    """Views of the tensors along dimension 0, in runs of samples whose intermediate result fits CHUNK_BYTES.

    Under torch.compile there is one chunk: a loop over a number of samples that changes would be unrolled, and compiled anew for each number.

    Args:
        numel_per_sample: elements of the intermediate result that one sample makes.
        dtype: type of the intermediate result.
        tensors: [N, ...] each.
        longest: the most samples in a chunk.

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
    """Σ over all dimensions but the first of rows², [N]; the squares are never stored, whatever the input's type. Long sums on a CPU take two stages.

    Args:
        rows: [N, ...].
        dtype: in which to add.

    Example:
        >>> row_sq_norms(torch.ones(2, 3, 4), torch.float32)
        tensor([12., 12.])
    """
    shape = rows.shape[1:]
    if rows.dim() > 2 and rows.device.type == "cpu" and shape.numel() > LONGEST_SUM:
        rows = torch.linalg.vector_norm(rows.flatten(2), dim=2, dtype=dtype)
    return torch.linalg.vector_norm(rows.reshape(rows.shape[0], rows.shape[1:].numel()), dim=1, dtype=dtype).square()
