"""The definition of the kernels for the scale and shift of normalization layers, in plain torch.

Legend: N samples, T positions, P elements of a scale. Precision and autocast as in reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adabatch.kernels.operators import accumulation_dtype, operation, sample_chunks


@operation(
    "(Tensor activations, Tensor backprops, Tensor? mean, Tensor? rstd) -> (Tensor, Tensor)",
    lambda a, b, mean, rstd: [(a.shape[0],)] * 2,
)
def affine_sq_norms(
    activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared norms ‖Σ_t b_nt ∘ x̂_nt‖² of a scale's gradients and ‖Σ_t b_nt‖² of a shift's, [N]
    each, x̂ = (a − mean)·rstd.

    LayerNorm: statistics [N, T, 1]. RMSNorm: the same, mean=None. GroupNorm and BatchNorm of inputs
    [N, C, *S]: pass the views `inputs.flatten(2).mT` [N, S, C] and statistics [N, 1, C] (each
    group's repeated for its channels) or [1, 1, C].

    Args:
        activations, backprops: a, the layer's input, and b, [N, T, P].
        mean: [N or 1, T, 1] or [N or 1, 1, P]; None is zero.
        rstd: 1/√(variance + ε), shaped as mean; None is one.

    Raises:
        ValueError: statistics of another shape.

    Example:
        >>> a, b = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]])
        >>> affine_sq_norms(a, b, mean=torch.tensor([[[2.0]]]), rstd=torch.tensor([[[1.0]]]))
        (tensor([5.]), tensor([5.]))
    """
    scale_NP, shift_NP = affine_grad_sample(activations, backprops, mean, rstd)
    norm = torch.linalg.vector_norm
    return norm(scale_NP, dim=1).square(), norm(shift_NP, dim=1).square()


@operation()
def affine_grad_sample(
    activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients Σ_t b_nt ∘ x̂_nt of a scale and Σ_t b_nt of a shift, [N, P] each; the product is
    stored a chunk of samples at a time. Arguments as for affine_sq_norms.

    Example:
        >>> a, b = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]])
        >>> affine_grad_sample(a, b, None, None)
        (tensor([[2., 3.]]), tensor([[2., 1.]]))
    """
    check_statistics(activations, mean, rstd)
    dtype = accumulation_dtype(activations, backprops)
    given = [value for value in (mean, rstd) if value is not None]
    statistics = [value.to(dtype).expand_as(activations) for value in given]
    numel = math.prod(activations.shape[1:])
    scale, shift = [], []
    for a_NTP, b_NTP, *values in sample_chunks(numel, dtype, activations, backprops, *statistics):
        a_NTP, b_NTP = a_NTP.to(dtype), b_NTP.to(dtype)
        if mean is not None:
            a_NTP = a_NTP - values[0]
        if rstd is not None:
            a_NTP = a_NTP * values[-1]
        scale.append((a_NTP * b_NTP).sum(1))
        shift.append(b_NTP.sum(1))
    return torch.cat(scale), torch.cat(shift)


def check_statistics(activations: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    """Raise for statistics that are neither per position nor per element."""
    samples, positions, width = activations.shape
    allowed = [(n, t, p) for n in (samples, 1) for t, p in ((positions, 1), (1, width))]
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value is not None and tuple(value.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; for activations "
                f"{tuple(activations.shape)} allowed are "
                f"{', '.join(map(str, dict.fromkeys(allowed)))}. Keep the reduced dimensions, and "
                "repeat a group's statistics for its channels."
            )
