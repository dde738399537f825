"""The definition of the kernels in plain torch: every other form must agree with it. Matrices,
embeddings, and gradients that exist already; see reference_conv.py and reference_affine.py too.

Legend: N samples, T positions, I in, O out, D embedding width, V rows of an embedding; a is
`activations` [N, T, I], b is `backprops` [N, T, O]. G_n is the gradient of one parameter through
sample n, with or without the 1/m of a mean loss; sums over samples are not means.

Inputs may be float16, bfloat16, float32 or float64, also mixed. Sums are kept, and results
returned, in float32, or in float64 if any input is float64; low-precision inputs are converted a
chunk of samples at a time. Call outside autocast, which would round the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from adabatch.kernels.operators import (
    accumulation_dtype, operation, outer_form, row_sq_norms, sample_chunks,
)


@operation("(Tensor activations, Tensor backprops) -> Tensor", lambda a, b: [(a.shape[0],)])
def outer_sq_norms(activations: Tensor, backprops: Tensor) -> Tensor:
    """Squared norms ‖G_n‖² [N], G_n = Σ_t b_nt a_ntᵀ, without the [N, O, I] tensor of all G.

    T = 1: ‖a_n‖² ‖b_n‖². T > 1: the Gram form Σ_{t,s} (a_nt·a_ns)(b_nt·b_ns), N T² (I + O)
    multiplications, or G_n itself, N T I O, a chunk of samples at a time, whichever costs less.

    Example:
        >>> outer_sq_norms(torch.ones(2, 1, 4), torch.tensor([[[1.0]], [[2.0]]]))
        tensor([ 4., 16.])
    """
    dtype = accumulation_dtype(activations, backprops)
    positions, width_in, width_out = activations.shape[1], activations.shape[2], backprops.shape[2]
    form = outer_form(positions, width_in, width_out)
    if form == "rows":
        return row_sq_norms(activations, dtype) * row_sq_norms(backprops, dtype)
    numel = 2 * positions**2 if form == "gram" else width_in * width_out
    sq_norms = []
    for a_NTI, b_NTO in sample_chunks(numel, dtype, activations, backprops):
        a_NTI, b_NTO = a_NTI.to(dtype), b_NTO.to(dtype)
        if form == "gram":
            gram = torch.bmm(a_NTI, a_NTI.mT) * torch.bmm(b_NTO, b_NTO.mT)
            sq_norms.append(gram.sum((1, 2)))
        else:
            sq_norms.append(row_sq_norms(torch.bmm(b_NTO.mT, a_NTI), dtype))
    return torch.cat(sq_norms)


@operation(
    "(Tensor activations, Tensor backprops) -> Tensor", lambda a, b: [(b.shape[2], a.shape[2])]
)
def outer_second_moment(activations: Tensor, backprops: Tensor) -> Tensor:
    """Elementwise Σ_n G_n² [O, I], G_n = Σ_t b_nt a_ntᵀ; for T = 1 that is (b²)ᵀ a².

    Example:
        >>> a = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
        >>> outer_second_moment(a, torch.ones(2, 1, 1))
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


@operation()
def outer_dot(activations: Tensor, backprops: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ_t b_ntᵀ other a_nt [N], without any G_n; other [O, I], for
    instance the batch gradient.

    Example:
        >>> outer_dot(torch.ones(1, 2, 3), torch.ones(1, 2, 1), torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([12.])
    """
    dtype = accumulation_dtype(activations, backprops, other)
    other_IO = other.to(dtype).T
    numel = activations.shape[1] * backprops.shape[2]
    chunks = sample_chunks(numel, dtype, activations, backprops)
    return torch.cat([((a.to(dtype) @ other_IO) * b).sum((1, 2)) for a, b in chunks])


@operation(
    "(Tensor activations, Tensor backprops, *, bool second_moment, bool deterministic)"
    " -> (Tensor, Tensor, Tensor)",
    lambda a, b: [(b.shape[2], a.shape[2]), (a.shape[0],), (b.shape[2], a.shape[2])],
    opaque=("cpu", "cuda"),
)
def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight gradient Σ_n G_n [O, I] of y = W a, G_n = Σ_t b_nt a_ntᵀ, and in the same pass
    ‖G_n‖² [N] and Σ_n G_n² [O, I] (elementwise), or None in its place.

    Args:
        second_moment: whether to return Σ_n G_n².
        deterministic: the same bits at every call, with every kernel; None follows
            torch.use_deterministic_algorithms. It changes nothing in plain torch.

    Example:
        >>> b = torch.tensor([[[1.0], [1.0]], [[2.0], [2.0]]])
        >>> weight_grad_moments(torch.ones(2, 2, 4), b, second_moment=True)
        (tensor([[6., 6., 6., 6.]]), tensor([16., 64.]), tensor([[20., 20., 20., 20.]]))
    """
    dtype = accumulation_dtype(activations, backprops)
    width_in, width_out = activations.shape[2], backprops.shape[2]
    chunks = sample_chunks(width_in * width_out, dtype, activations, backprops)
    grads = (torch.bmm(b_NTO.to(dtype).mT, a_NTI.to(dtype)) for a_NTI, b_NTO in chunks)
    total = activations.new_zeros(width_out, width_in, dtype=dtype)
    return sum_moments(grads, total, second_moment)


@operation(
    "(Tensor activations, Tensor backprops, Tensor preconditioner) -> Tensor", lambda a, b, p: [()]
)
def preconditioned_trace(activations: Tensor, backprops: Tensor, preconditioner: Tensor) -> Tensor:
    """Σ p ∘ Σ_n G_n², a number, G_n = Σ_t b_nt a_ntᵀ: the second moment's trace in the geometry of
    a diagonal preconditioner p [O, I], such as Adam's 1/(√v̂ + ε).

    Example:
        >>> a, p = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.tensor([[1.0, 0.5]])
        >>> preconditioned_trace(a, torch.ones(2, 1, 1), p)
        tensor(12.)
    """
    dtype = accumulation_dtype(activations, backprops, preconditioner)
    preconditioner = preconditioner.to(dtype)
    trace = preconditioner.new_zeros(())
    for a_NTI, b_NTO in sample_chunks(preconditioner.numel(), dtype, activations, backprops):
        a_NTI, b_NTO = a_NTI.to(dtype), b_NTO.to(dtype)
        if activations.shape[1] == 1:
            weighted = b_NTO[:, 0].square() @ preconditioner
            trace += (weighted * a_NTI[:, 0].square()).sum()
        else:
            trace += (torch.bmm(b_NTO.mT, a_NTI).square() * preconditioner).sum()
    return trace


@operation("(Tensor ids, Tensor backprops) -> Tensor", lambda ids, b: [(ids.shape[0],)])
def embedding_sq_norms(ids: Tensor, backprops: Tensor) -> Tensor:
    """Squared norms ‖G_n‖² [N] of an embedding's gradient: Σ_v ‖Σ_{t: id_nt = v} b_nt‖².

    Equal ids of a sample are summed in slots found by sorting: N T D memory a chunk, neither
    [N, V, D] nor [N, T, T].

    Args:
        ids: [N, T], integers.
        backprops: b, [N, T, D]; rows that must not count, such as padding, are zero.

    Example:
        >>> b = torch.tensor([[[1.0], [1.0]], [[3.0], [4.0]]])
        >>> embedding_sq_norms(torch.tensor([[7, 7], [7, 2]]), b)
        tensor([ 4., 25.])
    """
    dtype = accumulation_dtype(backprops)
    if ids.shape[1] == 1:
        return row_sq_norms(backprops, dtype)
    chunks = sample_chunks(backprops.shape[1] * backprops.shape[2], dtype, ids, backprops)
    return torch.cat([row_sq_norms(_slot_sums(i, b, dtype)[1], dtype) for i, b in chunks])


@operation()
def embedding_second_moment(ids: Tensor, backprops: Tensor, num_embeddings: int) -> Tensor:
    """Elementwise Σ_n G_n² [V, D] of an embedding's gradient; arguments as for embedding_sq_norms.

    Example:
        >>> embedding_second_moment(torch.tensor([[2, 2], [2, 0]]), torch.ones(2, 2, 1), 3).T
        tensor([[1., 0., 5.]])
    """
    dtype = accumulation_dtype(backprops)
    moment_VD = backprops.new_zeros(num_embeddings, backprops.shape[2], dtype=dtype)
    numel = backprops.shape[1] * backprops.shape[2]
    for ids_NT, b_NTD in sample_chunks(numel, dtype, ids, backprops):
        slot_ids_NT, sums_NTD = _slot_sums(ids_NT, b_NTD, dtype)
        moment_VD.index_add_(0, slot_ids_NT.flatten(), sums_NTD.flatten(0, 1).square())
    return moment_VD


@operation()
def embedding_dot(ids: Tensor, backprops: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ_t b_nt · other[id_nt] [N] of an embedding's gradient with
    other [V, D]; the rest as for embedding_sq_norms.

    Example:
        >>> other = torch.tensor([[1.0], [2.0], [3.0]])
        >>> embedding_dot(torch.tensor([[0, 2]]), torch.ones(1, 2, 1), other)
        tensor([4.])
    """
    dtype = accumulation_dtype(backprops, other)
    chunks = sample_chunks(backprops.shape[1] * backprops.shape[2], dtype, ids, backprops)
    return torch.cat([(other[ids_NT].to(dtype) * b_NTD).sum((1, 2)) for ids_NT, b_NTD in chunks])


@operation()
def dense_sq_norms(grad: Tensor) -> Tensor:
    """Squared norms ‖G_n‖² [N] of gradients G [N, *shape] that exist already.

    Example:
        >>> dense_sq_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([25.,  1.])
    """
    return row_sq_norms(grad, accumulation_dtype(grad))


@operation()
def dense_second_moment(grad: Tensor) -> Tensor:
    """Elementwise Σ_n G_n² [*shape] of gradients G [N, *shape] that exist already.

    Example:
        >>> dense_second_moment(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([10., 16.])
    """
    dtype = accumulation_dtype(grad)
    moment = grad.new_zeros(grad.shape[1:], dtype=dtype)
    for (rows,) in sample_chunks(math.prod(grad.shape[1:]), dtype, grad):
        moment += rows.to(dtype).square().sum(0)
    return moment


@operation()
def dense_dot(grad: Tensor, other: Tensor) -> Tensor:
    """Inner products ⟨G_n, other⟩ [N] of gradients G [N, *shape] that exist already.

    Example:
        >>> dense_dot(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([2.0, 1.0]))
        tensor([10.,  2.])
    """
    dtype, numel = accumulation_dtype(grad, other), other.numel()
    flat = other.reshape(-1).to(dtype)
    chunks = sample_chunks(numel, dtype, grad)
    return torch.cat([rows.reshape(rows.shape[0], numel).to(dtype) @ flat for (rows,) in chunks])


def sum_moments(
    grads: Iterable[Tensor], total: Tensor, second_moment: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ G_n (added to `total`), ‖G_n‖² and Σ G_n² of chunks [n, *shape], which are overwritten."""
    second = torch.zeros_like(total) if second_moment else None
    sq_norms = []
    for chunk in grads:
        total += chunk.sum(0)
        sq_norms.append(row_sq_norms(chunk, chunk.dtype))
        if second is not None:
            second += chunk.square_().sum(0)
    return total, torch.cat(sq_norms), second


def _slot_sums(ids: Tensor, backprops: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of backprops over equal ids of a sample: (id of each slot [N, T], sums [N, T, D]); a
    sample with fewer than T distinct ids leaves slots of zeros."""
    samples, positions = ids.shape
    sorted_NT, order_NT = ids.sort(dim=1)
    sorted_slots_NT = torch.zeros_like(order_NT)
    sorted_slots_NT[:, 1:] = (sorted_NT[:, 1:] != sorted_NT[:, :-1]).cumsum(1)
    slots_NT = torch.empty_like(order_NT).scatter_(1, order_NT, sorted_slots_NT)
    slot_ids_NT = torch.zeros_like(ids).scatter_(1, slots_NT, ids)
    firsts_N1 = positions * torch.arange(samples, device=ids.device).unsqueeze(1)
    sums = backprops.new_zeros(samples * positions, backprops.shape[2], dtype=dtype)
    sums.index_add_(0, (slots_NT + firsts_N1).flatten(), backprops.flatten(0, 1).to(dtype))
    return slot_ids_NT, sums.view(samples, positions, backprops.shape[2])
