"""Weight gradients together with their per-sample moments, in plain torch: the definition of the fused kernels.

Legend: N samples, T positions, I in, O out, C channels, S positions in, S' positions out, K kernel, g groups, P elements of a scale.
Precision and autocast as in reference.py. `deterministic` is there for kernels that can add in any order; here it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adabatch.kernels.chunks import accumulation_dtype, row_sq_norms, sample_chunks
from adabatch.kernels.reference_conv import LONGEST_CHUNK, conv_grad_sample

__all__ = ["affine_grad_sample", "affine_sq_norms", "conv_weight_grad_moments", "preconditioned_trace", "weight_grad_moments"]


def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False, deterministic: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight gradient Σ_n G_n of y = W a, and in the same pass ‖G_n‖² and Σ_n G_n² (elementwise); G_n = Σ_t b_nt a_ntᵀ.

    Args:
        activations: a, [N, T, I].
        backprops: b, [N, T, O].
        second_moment: whether to return Σ_n G_n².
        deterministic: the same bits at every call, whatever the kernel; None follows torch.use_deterministic_algorithms.

    Returns:
        The weight gradient [O, I], the squared norms [N] and the second moment [O, I] or None; float32 or float64. Sums over the samples, not means.

    Example:
        >>> weight_grad_moments(torch.ones(2, 2, 4), torch.tensor([[[1.0], [1.0]], [[2.0], [2.0]]]), second_moment=True)
        (tensor([[6., 6., 6., 6.]]), tensor([16., 64.]), tensor([[20., 20., 20., 20.]]))
    """
    dtype = accumulation_dtype(activations, backprops)
    chunks = sample_chunks(activations.shape[2] * backprops.shape[2], dtype, activations, backprops)
    grads = (torch.bmm(b_NTO.to(dtype).mT, a_NTI.to(dtype)) for a_NTI, b_NTO in chunks)
    return _moments(grads, activations.new_zeros(backprops.shape[2], activations.shape[2], dtype=dtype), second_moment)


def conv_weight_grad_moments(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    second_moment: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A convolution's weight gradient Σ_n G_n, and in the same pass ‖G_n‖² and Σ_n G_n² (elementwise).

    Args:
        activations, backprops, weight_shape, stride, padding, dilation, groups: as for conv_sq_norms.
        second_moment, deterministic: as for weight_grad_moments.

    Returns:
        The weight gradient [O, C/g, *K], the squared norms [N] and the second moment [O, C/g, *K] or None; float32 or float64.

    Example:
        >>> geometry = dict(stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> conv_weight_grad_moments(torch.ones(2, 1, 5), torch.ones(2, 1, 2), (1, 1, 4), **geometry)[:2]
        (tensor([[[4., 4., 4., 4.]]]), tensor([16., 16.]))
    """
    dtype = accumulation_dtype(activations, backprops)
    chunks = sample_chunks(math.prod(weight_shape), dtype, activations, backprops, longest=LONGEST_CHUNK)
    grads = (conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups) for a, b in chunks)
    return _moments(grads, activations.new_zeros(tuple(weight_shape), dtype=dtype), second_moment)


def preconditioned_trace(activations: Tensor, backprops: Tensor, preconditioner: Tensor) -> Tensor:
    """Σ p ∘ Σ_n G_n², G_n = Σ_t b_nt a_ntᵀ: the second moment's trace in the geometry of a diagonal preconditioner p, such as Adam's 1/(√v̂ + ε).

    Args:
        activations: a, [N, T, I].
        backprops: b, [N, T, O].
        preconditioner: p, [O, I].

    Returns:
        A number, [], float32 or float64: a sum over the samples, not a mean.

    Example:
        >>> preconditioned_trace(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 1), torch.tensor([[1.0, 0.5]]))
        tensor(12.)
    """
    dtype = accumulation_dtype(activations, backprops, preconditioner)
    preconditioner = preconditioner.to(dtype)
    trace = preconditioner.new_zeros(())
    for a_NTI, b_NTO in sample_chunks(preconditioner.numel(), dtype, activations, backprops):
        a_NTI, b_NTO = a_NTI.to(dtype), b_NTO.to(dtype)
        if activations.shape[1] == 1:
            trace += ((b_NTO[:, 0].square() @ preconditioner) * a_NTI[:, 0].square()).sum()
        else:
            trace += (torch.bmm(b_NTO.mT, a_NTI).square() * preconditioner).sum()
    return trace


def affine_sq_norms(activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared norms of a normalization layer's scale and shift: ‖Σ_t b_nt ∘ x̂_nt‖² and ‖Σ_t b_nt‖², x̂ = (a − mean) · rstd.

    LayerNorm: statistics [N, T, 1]. RMSNorm: the same, mean=None. GroupNorm and BatchNorm of inputs [N, C, *S]: hand over the views
    `inputs.flatten(2).mT` [N, S, C] and statistics [N, 1, C] (each group's repeated for its channels) or [1, 1, C].

    Args:
        activations: a, [N, T, P], the layer's input.
        backprops: b, [N, T, P].
        mean: [N or 1, T, 1] or [N or 1, 1, P]; None is zero.
        rstd: 1/√(variance + ε), shaped as mean; None is one.

    Returns:
        Squared norms of the scale's and of the shift's gradients, [N] each, float32 or float64.

    Raises:
        ValueError: statistics of another shape.

    Example:
        >>> affine_sq_norms(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]]))
        (tensor([5.]), tensor([5.]))
    """
    sums = affine_grad_sample(activations, backprops, mean, rstd)
    return tuple(torch.linalg.vector_norm(sums_NP, dim=1).square() for sums_NP in sums)


def affine_grad_sample(activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients themselves of a normalization layer's scale and shift: Σ_t b_nt ∘ x̂_nt and Σ_t b_nt; the product is stored a chunk of samples at a time.

    Args:
        activations, backprops, mean, rstd: as for affine_sq_norms.

    Returns:
        [N, P] each, float32 or float64.

    Example:
        >>> affine_grad_sample(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]]), None, None)
        (tensor([[2., 3.]]), tensor([[2., 1.]]))
    """
    check_statistics(activations, mean, rstd)
    dtype = accumulation_dtype(activations, backprops)
    statistics = tuple(value.to(dtype).expand_as(activations) for value in (mean, rstd) if value is not None)
    scale, shift = [], []
    for a_NTP, b_NTP, *values in sample_chunks(math.prod(activations.shape[1:]), dtype, activations, backprops, *statistics):
        a_NTP, b_NTP = a_NTP.to(dtype), b_NTP.to(dtype)
        if mean is not None:
            a_NTP = a_NTP - values[0]
        if rstd is not None:
            a_NTP = a_NTP * values[-1]
        scale.append((a_NTP * b_NTP).sum(1))
        shift.append(b_NTP.sum(1))
    return torch.cat(scale), torch.cat(shift)


def check_statistics(activations: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    """Refuse statistics that are neither per position nor per element.

    Example:
        >>> check_statistics(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), None)
    """
    samples, positions, width = activations.shape
    for name, value in (("mean", mean), ("rstd", rstd)):
        allowed = [(n, t, p) for n in (samples, 1) for t, p in ((positions, 1), (1, width))]
        if value is not None and tuple(value.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; for activations {tuple(activations.shape)} allowed are {', '.join(map(str, dict.fromkeys(allowed)))}. "
                "Keep the reduced dimensions, and repeat a group's statistics for its channels."
            )


def _moments(grads, weight_grad: Tensor, second_moment: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of chunks [n, *shape] of per-sample gradients, added up in place."""
    second = torch.zeros_like(weight_grad) if second_moment else None
    sq_norms = []
    for chunk in grads:
        weight_grad += chunk.sum(0)
        sq_norms.append(row_sq_norms(chunk, chunk.dtype))
        if second is not None:
            second += chunk.square_().sum(0)
    return weight_grad, torch.cat(sq_norms), second
