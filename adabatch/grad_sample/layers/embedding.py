"""nn.Embedding: rule. Legend: N samples, T positions (all dimensions but the first), D width."""

from __future__ import annotations

from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.factors.outer import OneHotOuter
from adabatch.grad_sample.registry import register_grad_sampler


def embedding_unsupported(layer: nn.Embedding) -> str | None:
    """Why this embedding cannot be measured, with the fix, or None.

    Example:
        >>> print(embedding_unsupported(nn.Embedding(5, 2, sparse=True)))
        sparse=True gives a sparse gradient, whose norm is not read; set layer.sparse = False
    """
    reasons = []
    if layer.scale_grad_by_freq:
        reasons.append(
            "scale_grad_by_freq=True makes a sample's gradient depend on the ids of the others; "
            "set layer.scale_grad_by_freq = False")
    if layer.sparse:
        reasons.append(
            "sparse=True gives a sparse gradient, whose norm is not read; set layer.sparse = False")
    return "; ".join(reasons) or None


@register_grad_sampler(nn.Embedding, unsupported=embedding_unsupported, parameters=("weight",))
def embedding_grad_sample(
    layer: nn.Embedding, activations: Tensor, backprops: Tensor
) -> dict[str, Factor]:
    """Embedding: row v of G_n is Σ_{t: id_nt = v} b_nt, without the positions that hold
    padding_idx. With max_norm it is the gradient of the table as the forward pass left it.

    Args:
        activations, backprops: ids, [N, ...], integers, and b, [N, ..., D]; without a batch
            dimension it raises a ValueError.

    Example:
        >>> import torch
        >>> layer, ids = nn.Embedding(5, 1, padding_idx=0), torch.tensor([[3, 3], [3, 0]])
        >>> embedding_grad_sample(layer, ids, torch.ones(2, 2, 1))["weight"].sq_norms()
        tensor([4., 1.])
    """
    if activations.dim() < 1:
        raise ValueError(
            "Embedding got a single id, without a batch dimension. It needs ids of shape [N, ...]. "
            "Add one with ids.unsqueeze(0).")
    if not layer.weight.requires_grad:
        return {}
    ids_NT = activations.unsqueeze(1) if activations.dim() == 1 else activations.flatten(1)
    b_NTD = backprops.unsqueeze(1) if backprops.dim() == 2 else backprops.flatten(1, -2)
    if layer.padding_idx is not None:
        b_NTD = b_NTD.masked_fill((ids_NT == layer.padding_idx).unsqueeze(2), 0)
    return {"weight": OneHotOuter(ids_NT, b_NTD, layer.num_embeddings)}
