"""Rule for PReLU. Legend: N samples, C channels, S positions after the channels."""

from __future__ import annotations

from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.registry import register_grad_sampler
from adabatch.kernels.chunks import accumulation_dtype


@register_grad_sampler(nn.PReLU, parameters=("weight",))
def prelu_grad_sample(layer: nn.PReLU, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """PReLU, y = max(0, a) + weight ∘ min(0, a): G_n = Σ b_n ∘ min(0, a_n) over the positions, and over the channels if one weight serves them all.

    Args:
        layer: the layer.
        activations: a, [N, C, *S], or any shape with N first if the layer has one weight.
        backprops: b, as activations.

    Example:
        >>> import torch
        >>> prelu_grad_sample(nn.PReLU(), torch.tensor([[1.0, -2.0], [-1.0, -1.0]]), torch.ones(2, 2))["weight"].dense().T
        tensor([[-2., -2.]])
    """
    if not layer.weight.requires_grad:
        return {}
    dtype = accumulation_dtype(activations, backprops)
    products = backprops.to(dtype) * activations.to(dtype).clamp(max=0)
    if layer.num_parameters == 1:
        return {"weight": Dense(products.reshape(products.shape[0], products[:1].numel()).sum(1, keepdim=True, dtype=dtype))}
    return {"weight": Dense(products.sum(tuple(range(2, products.dim())), dtype=dtype) if products.dim() > 2 else products)}
