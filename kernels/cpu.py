"""Forms of the kernels for matrices and normalization layers that are faster on a CPU: a chunk of
per-sample gradients is added to the weight gradient and squared while it lies in the cache.

Legend: N samples, T positions, I in, O out, P elements of a scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adabatch.kernels import reference, reference_affine
from adabatch.kernels.operators import (
    LONGEST_SUM, accumulation_dtype, implements, outer_form, sample_chunks,
)

# From this size on, one product a sample into one buffer beat batches of them.
ALONE_BYTES = 2**19
# Sums over dimension 0 of fewer rows are slow.
FEW = 8


@implements("cpu")
def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One product, and norms without G_n where T is small, else a product a sample."""
    (samples, positions, width_in), width_out = activations.shape, backprops.shape[2]
    dtype = accumulation_dtype(activations, backprops)
    form = outer_form(positions, width_in, width_out, with_gradient=True)
    if form != "gradients" and not second_moment:
        grad = backprops.flatten(0, 1).to(dtype).T @ activations.flatten(0, 1).to(dtype)
        return grad, reference.outer_sq_norms(activations, backprops), None
    total = activations.new_zeros(width_out, width_in, dtype=dtype)
    return sum_moments(_products(activations, backprops, dtype), samples, total, second_moment)


@implements("cpu")
def affine_grad_sample(
    activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Without statistics the products of all chunks share one buffer."""
    if mean is not None or rstd is not None:
        return reference_affine.affine_grad_sample(activations, backprops, mean, rstd)
    dtype = accumulation_dtype(activations, backprops)
    if activations.shape[1] == 1:
        shift = backprops[:, 0].to(dtype)
        return activations[:, 0].to(dtype) * shift, shift
    scale = activations.new_empty(activations.shape[0], activations.shape[2], dtype=dtype)
    numel = activations[:1].numel()
    chunks = sample_chunks(numel, dtype, activations, backprops, scale)
    buffer = torch.empty_like(chunks[0][0], dtype=dtype)
    for a_NTP, b_NTP, sums_NP in chunks:
        products = torch.mul(a_NTP.to(dtype), b_NTP, out=buffer[: len(a_NTP)])
        torch.sum(products, 1, out=sums_NP)
    return scale, backprops.sum(1, dtype=dtype)


@implements("cpu")
def affine_sq_norms(
    activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Norms of the sums above."""
    scale_NP, shift_NP = affine_grad_sample(activations, backprops, mean, rstd)
    norm = torch.linalg.vector_norm
    return norm(scale_NP, dim=1).square(), norm(shift_NP, dim=1).square()


def sum_moments(
    grads: Iterator[Tensor], samples: int, total: Tensor, second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.sum_moments` of chunks whose number of samples is known. Long sums of squares take
    two stages, the second one for all chunks at once."""
    second = torch.zeros_like(total) if second_moment else None
    rows = total.shape[0] if total.numel() > LONGEST_SUM else 1
    norms, start = total.new_empty(samples, rows), 0
    for chunk in grads:
        count = len(chunk)
        if count < FEW:
            for grad in chunk.unbind():
                total += grad
        else:
            total += chunk.sum(0)
        flat = chunk.reshape(count, rows, total.numel() // max(1, rows))
        torch.linalg.vector_norm(flat, dim=2, out=norms[start : start + count])
        start += count
        if second is not None:
            second += chunk.square_().sum(0)
    total_norms = norms[:, 0] if rows == 1 else torch.linalg.vector_norm(norms, dim=1)
    return total, total_norms.square(), second


def _products(activations: Tensor, backprops: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """G_n, a chunk [n, O, I] at a time; a chunk is overwritten by the next."""
    width_in, width_out = activations.shape[2], backprops.shape[2]
    if width_in * width_out * dtype.itemsize >= ALONE_BYTES:
        buffer = activations.new_empty(1, width_out, width_in, dtype=dtype)
        for a_TI, b_TO in zip(activations, backprops, strict=True):
            torch.mm(b_TO.to(dtype).T, a_TI.to(dtype), out=buffer[0])
            yield buffer
        return
    for a_NTI, b_NTO in sample_chunks(width_in * width_out, dtype, activations, backprops):
        yield torch.bmm(b_NTO.to(dtype).mT, a_NTI.to(dtype))
