"""nn.PReLU: rule. Legend: N samples, C channels, S positions after the channels."""

from __future__ import annotations

from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.registry import register_grad_sampler
from adabatch.kernels import accumulation_dtype


@register_grad_sampler(nn.PReLU, parameters=("weight",))
def prelu_grad_sample(
    layer: nn.PReLU, activations: Tensor, backprops: Tensor
) -> dict[str, Factor]:
    """PReLU, y = max(0, a) + weight ∘ min(0, a): G_n = Σ b_n ∘ min(0, a_n) over the positions, and
    over the channels if they share one weight.

    Args:
        activations, backprops: a and b, [N, C, *S]; any shape [N, ...] with a single weight.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, -2.0], [-1.0, -1.0]])
        >>> prelu_grad_sample(nn.PReLU(), a, torch.ones(2, 2))["weight"].dense().T
        tensor([[-2., -2.]])
    """
    if not layer.weight.requires_grad:
        return {}
    dtype = accumulation_dtype(activations, backprops)
    products = backprops.to(dtype) * activations.to(dtype).clamp(max=0)
    if layer.num_parameters == 1:
        flat = products.reshape(products.shape[0], products[:1].numel())
        return {"weight": Dense(flat.sum(1, keepdim=True))}
    positions = tuple(range(2, products.dim()))
    return {"weight": Dense(products.sum(positions) if positions else products)}
