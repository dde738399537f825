"""The kernels' definition in plain torch: every other backend must agree with it.

Legend: N samples, T positions, I in, O out, D embedding width, V rows of an embedding, P numel.

Inputs may be float16, bfloat16, float32 or float64, also mixed. Sums are kept, and results returned, in float32, or float64 if any input is float64;
low-precision inputs are converted a chunk of samples at a time. Call outside autocast, which would round the products.
G_n is the gradient of one parameter through sample n; whether it carries the 1/m of a mean loss is the caller's matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adabatch.kernels.chunks import accumulation_dtype, outer_form, row_sq_norms, sample_chunks
from adabatch.kernels.reference_conv import conv_dot, conv_grad_sample, conv_second_moment, conv_sq_norms
from adabatch.kernels.reference_moments import affine_grad_sample, affine_sq_norms, conv_weight_grad_moments, preconditioned_trace, weight_grad_moments

__all__ = [
    "affine_grad_sample",
    "affine_sq_norms",
    "conv_dot",
    "conv_grad_sample",
    "conv_second_moment",
    "conv_sq_norms",
    "conv_weight_grad_moments",
    "dense_dot",
    "dense_second_moment",
    "dense_sq_norms",
    "embedding_dot",
    "embedding_second_moment",
    "embedding_sq_norms",
    "outer_dot",
    "outer_second_moment",
    "outer_sq_norms",
    "preconditioned_trace",
    "weight_grad_moments",
]


def outer_sq_norms(activations: Tensor, backprops: Tensor) -> Tensor:
    """Squared norms ‖G_n‖², G_n = Σ_t b_nt a_ntᵀ, without the [N, O, I] tensor of all G.

    T = 1: ‖a_n‖² ‖b_n‖². T > 1, whichever costs less: the Gram form Σ_{t,s} (a_nt·a_ns)(b_nt·b_ns), N T² (I + O) multiplications; or G_n itself, N T I O,
    a chunk of samples at a time.

    Args:
        activations: a, [N, T, I].
        backprops: b, [N, T, O].

    Returns:
        [N], float32 or float64.

    Example:
        >>> outer_sq_norms(torch.ones(2, 1, 4), torch.tensor([[[1.0]], [[2.0]]]))
        tensor([ 4., 16.])
    """
    dtype = accumulation_dtype(activations, backprops)
    positions, width_in, width_out = activations.shape[1], activations.shape[2], backprops.shape[2]
    form = outer_form(positions, width_in, width_out)
    if form == "rows":
        return row_sq_norms(activations, dtype) * row_sq_norms(backprops, dtype)
    gram = form == "gram"
    numel = 2 * positions**2 if gram else width_in * width_out
    sq_norms = []
    for a_NTI, b_NTO in sample_chunks(numel, dtype, activations, backprops):
        a_NTI, b_NTO = a_NTI.to(dtype), b_NTO.to(dtype)
        if gram:
            sq_norms.append((torch.bmm(a_NTI, a_NTI.mT) * torch.bmm(b_NTO, b_NTO.mT)).sum((1, 2)))
        else:
            sq_norms.append(row_sq_norms(torch.bmm(b_NTO.mT, a_NTI), dtype))
    return torch.cat(sq_norms)


def outer_second_moment(activations: Tensor, backprops: Tensor) -> Tensor:
    """Elementwise Σ_n G_n², G_n = Σ_t b_nt a_ntᵀ; for T = 1 that is (b²)ᵀ a².

    Args:
        activations: a, [N, T, I].
        backprops: b, [N, T, O].

    Returns:
        [O, I], float32 or float64: a sum over the samples, not a mean.

    Example:
        >>> outer_second_moment(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 1))
        tensor([[10.,  4.]])
    """
    dtype = accumulation_dtype(activations, backprops)
    width_in, width_out = activations.shape[2], backprops.shape[2]
    moment_OI = activations.new_zeros(width_out, width_in, dtype=dtype)
    if activations.shape[1] == 1:
        for a_NTI, b_NTO in sample_chunks(width_in + width_out, dtype, activations, backprops):
            moment_OI += b_NTO[:, 0].to(dtype).square().T @ a_NTI[:, 0].to(dtype).square()
        return moment_OI
    for a_NTI, b_NTO in sample_chunks(width_in * width_out, dtype, activations, backprops):
        moment_OI += torch.bmm(b_NTO.to(dtype).mT, a_NTI.to(dtype)).square().sum(0)
    return moment_OI


def outer_dot(activations: Tensor, backprops: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ_t b_ntᵀ other a_nt, without any G_n.

    Args:
        activations: a, [N, T, I].
        backprops: b, [N, T, O].
        other: [O, I], for instance the batch gradient.

    Returns:
        [N], float32 or float64.

    Example:
        >>> outer_dot(torch.ones(1, 2, 3), torch.ones(1, 2, 1), torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([12.])
    """
    dtype = accumulation_dtype(activations, backprops, other)
    other_IO = other.to(dtype).T
    chunks = sample_chunks(activations.shape[1] * backprops.shape[2], dtype, activations, backprops)
    return torch.cat([((a_NTI.to(dtype) @ other_IO) * b_NTO).sum((1, 2)) for a_NTI, b_NTO in chunks])


def embedding_sq_norms(ids: Tensor, backprops: Tensor) -> Tensor:
    """Squared norms ‖G_n‖² of an embedding's gradient: Σ_v ‖Σ_{t: id_nt = v} b_nt‖².

    Equal ids of a sample are summed in slots found by sorting: N T D memory a chunk, neither [N, V, D] nor [N, T, T].

    Args:
        ids: [N, T], integers.
        backprops: b, [N, T, D]; rows that must not count, such as padding, are zero.

    Returns:
        [N], float32 or float64.

    Example:
        >>> embedding_sq_norms(torch.tensor([[7, 7], [7, 2]]), torch.tensor([[[1.0], [1.0]], [[3.0], [4.0]]]))
        tensor([ 4., 25.])
    """
    dtype = accumulation_dtype(backprops)
    if ids.shape[1] == 1:
        return row_sq_norms(backprops, dtype)
    chunks = sample_chunks(backprops.shape[1] * backprops.shape[2], dtype, ids, backprops)
    return torch.cat([row_sq_norms(_slot_sums(ids_NT, b_NTD, dtype)[1], dtype) for ids_NT, b_NTD in chunks])


def embedding_second_moment(ids: Tensor, backprops: Tensor, num_embeddings: int) -> Tensor:
    """Elementwise Σ_n G_n² of an embedding's gradient.

    Args:
        ids: [N, T], integers in [0, V).
        backprops: b, [N, T, D]; rows that must not count, such as padding, are zero.
        num_embeddings: V.

    Returns:
        [V, D], float32 or float64: a sum over the samples, not a mean.

    Example:
        >>> embedding_second_moment(torch.tensor([[2, 2], [2, 0]]), torch.ones(2, 2, 1), 3).T
        tensor([[1., 0., 5.]])
    """
    dtype = accumulation_dtype(backprops)
    moment_VD = backprops.new_zeros(num_embeddings, backprops.shape[2], dtype=dtype)
    for ids_NT, b_NTD in sample_chunks(backprops.shape[1] * backprops.shape[2], dtype, ids, backprops):
        slot_ids_NT, sums_NTD = _slot_sums(ids_NT, b_NTD, dtype)
        moment_VD.index_add_(0, slot_ids_NT.flatten(), sums_NTD.flatten(0, 1).square())
    return moment_VD


def embedding_dot(ids: Tensor, backprops: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ_t b_nt · other[id_nt] of an embedding's gradient.

    Args:
        ids: [N, T], integers in [0, V).
        backprops: b, [N, T, D].
        other: [V, D].

    Returns:
        [N], float32 or float64.

    Example:
        >>> embedding_dot(torch.tensor([[0, 2]]), torch.ones(1, 2, 1), torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([4.])
    """
    dtype = accumulation_dtype(backprops, other)
    chunks = sample_chunks(backprops.shape[1] * backprops.shape[2], dtype, ids, backprops)
    return torch.cat([(other[ids_NT].to(dtype) * b_NTD).sum((1, 2)) for ids_NT, b_NTD in chunks])


def dense_sq_norms(grad: Tensor) -> Tensor:
    """Squared norms ‖G_n‖² of gradients that are at hand.

    Args:
        grad: G, [N, *shape].

    Returns:
        [N], float32 or float64.

    Example:
        >>> dense_sq_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([25.,  1.])
    """
    return row_sq_norms(grad, accumulation_dtype(grad))


def dense_second_moment(grad: Tensor) -> Tensor:
    """Elementwise Σ_n G_n² of gradients that are at hand: [N, *shape] -> [*shape], a sum over the samples, float32 or float64.

    Example:
        >>> dense_second_moment(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([10., 16.])
    """
    dtype = accumulation_dtype(grad)
    moment = grad.new_zeros(grad.shape[1:], dtype=dtype)
    for (rows,) in sample_chunks(math.prod(grad.shape[1:]), dtype, grad):
        moment += rows.to(dtype).square().sum(0)
    return moment


def dense_dot(grad: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ of gradients that are at hand: [N, *shape], [*shape] -> [N], float32 or float64.

    Example:
        >>> dense_dot(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([2.0, 1.0]))
        tensor([10.,  2.])
    """
    dtype = accumulation_dtype(grad, other)
    chunks = sample_chunks(other.numel(), dtype, grad)
    return torch.cat([rows.reshape(rows.shape[0], other.numel()).to(dtype) @ other.reshape(-1).to(dtype) for (rows,) in chunks])


def _slot_sums(ids: Tensor, backprops: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of backprops over equal ids of a sample: (id of each slot [N, T], sums [N, T, D]); a sample with fewer than T distinct ids leaves slots of zeros."""
    samples, positions = ids.shape
    sorted_NT, order_NT = ids.sort(dim=1)
    sorted_slots_NT = torch.zeros_like(order_NT)
    sorted_slots_NT[:, 1:] = (sorted_NT[:, 1:] != sorted_NT[:, :-1]).cumsum(1)
    slots_NT = torch.empty_like(order_NT).scatter_(1, order_NT, sorted_slots_NT)
    slot_ids_NT = torch.zeros_like(ids).scatter_(1, slots_NT, ids)
    rows = (slots_NT + positions * torch.arange(samples, device=ids.device).unsqueeze(1)).flatten()
    sums = backprops.new_zeros(samples * positions, backprops.shape[2], dtype=dtype)
    sums.index_add_(0, rows, backprops.flatten(0, 1).to(dtype))
    return slot_ids_NT, sums.view(samples, positions, backprops.shape[2])
