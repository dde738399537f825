"""Rule for Linear. Legend: N samples, T positions (all dimensions between the first and the last), I in, O out."""

from __future__ import annotations

from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Dense, Factor, Outer
from adabatch.grad_sample.registry import register_grad_sampler
from adabatch.kernels.chunks import accumulation_dtype


@register_grad_sampler(nn.Linear, parameters=("weight", "bias"))
def linear_grad_sample(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """Linear, y = W a + bias: G_n = Σ_t b_nt a_ntᵀ for the weight, Σ_t b_nt for the bias.

    Args:
        layer: the layer.
        activations: a, [N, ..., I], any number of dimensions between.
        backprops: b, [N, ..., O].

    Raises:
        ValueError: the input has no batch dimension.

    Example:
        >>> import torch
        >>> factors = linear_grad_sample(nn.Linear(3, 1), torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[2.0]]))
        >>> factors["weight"].sq_norms(), factors["bias"].sq_norms()
        (tensor([36.]), tensor([4.]))
    """
    if activations.dim() < 2:
        raise ValueError(
            f"Linear got an input of shape {tuple(activations.shape)}: without a batch dimension there are no samples to tell apart. "
            "Allowed are two or more dimensions, samples first. Add one with inputs.unsqueeze(0), or stack several samples."
        )
    a_NTI = activations.unsqueeze(1) if activations.dim() == 2 else activations.flatten(1, -2)
    b_NTO = backprops.unsqueeze(1) if backprops.dim() == 2 else backprops.flatten(1, -2)
    factors: dict[str, Factor] = {}
    if layer.weight.requires_grad:
        factors["weight"] = Outer(left=b_NTO, right=a_NTI)
    if layer.bias is not None and layer.bias.requires_grad:
        factors["bias"] = Dense(b_NTO[:, 0] if b_NTO.shape[1] == 1 else b_NTO.sum(1, dtype=accumulation_dtype(b_NTO)))
    return factors

