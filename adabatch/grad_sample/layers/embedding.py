"""nn.Embedding: rule; nn.EmbeddingBag: its calls, as the bags may lie in one flat tensor.

Legend: N samples, T positions (all dimensions but the first; of the longest bag), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.factors.outer import OneHotOuter
from adabatch.grad_sample.layers.generic import RecomputedCall, register_call
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import register_grad_sampler


def embedding_unsupported(layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
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


@register_call(nn.EmbeddingBag)
class EmbeddingBagCall(RecomputedCall):
    """EmbeddingBag, not run again: row v of G_n is b_n Σ_{t: id_nt = v} w_nt over the bag of sample
    n, with w_nt from per_sample_weights, 1/size of the bag (mean), or whether position t holds the
    maximum (max, for each of the D). Bags are rows of ids [N, T], or lie one after the other in
    flat ids with offsets. Positions that hold padding_idx belong to no bag.

    Example:
        >>> bag = nn.EmbeddingBag(5, 2, mode="sum")
        >>> ids, offsets = torch.tensor([3, 3, 1, 4]), torch.tensor([0, 2])
        >>> args = ids, offsets
        >>> call = EmbeddingBagCall("bag", bag, ["weight"], args, {}, bag(*args), 2)
        >>> call.factors([ids, offsets], [torch.ones(2, 2)], None)["weight"].sq_norms()
        tensor([8.0000, 4.0000])
    """

    defines_samples = True

    @classmethod
    def serves(cls, layer: nn.Module) -> bool:
        own = "forward" in vars(layer) or type(layer).forward is not nn.EmbeddingBag.forward
        return not own and layer._parameters.keys() == {"weight"}

    @classmethod
    def problem(cls, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.EmbeddingBag)
        return embedding_unsupported(layer)

    def _input_layout(self, index: int, tensor: Tensor) -> Layout | None:
        return None

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        layer, b_ND = self.layer, backprops[0]
        assert isinstance(layer, nn.EmbeddingBag)
        if not layer.weight.requires_grad:
            return {}
        args, kwargs = self._arguments(tensors)
        ids_NT, w_NT = _padded_bags(layer, *args, **kwargs)
        if layer.padding_idx is not None:
            w_NT = w_NT.masked_fill(ids_NT == layer.padding_idx, 0)
        if rows is not None:
            ids_NT, w_NT, b_ND = (each.index_select(0, rows) for each in (ids_NT, w_NT, b_ND))
        right = b_ND.unsqueeze(1)
        if layer.mode == "max":
            right = right * _holds_maximum(layer.weight.detach()[ids_NT], w_NT.unsqueeze(2) > 0)
        else:
            size = w_NT.sum(1, keepdim=True).clamp(min=1) if layer.mode == "mean" else 1
            right = right * (w_NT / size).to(b_ND.dtype).unsqueeze(2)
        return {"weight": OneHotOuter(ids_NT, right, layer.num_embeddings)}


def _padded_bags(
    layer: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids [N, T] and their weights [N, T], 0 where a bag is shorter than T; arguments as in
    layer.forward."""
    wide = torch.float64 if layer.weight.dtype is torch.float64 else torch.float32
    weights = torch.ones_like(input, dtype=wide) if per_sample_weights is None else (
        per_sample_weights.to(wide))
    if offsets is None:
        return input.long(), weights
    starts, end = offsets.long(), offsets.new_tensor([len(input)]).long()
    bounds = starts if layer.include_last_offset else torch.cat((starts, end))
    starts, lengths = bounds[:-1], bounds.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    places = torch.arange(max(1, longest), device=input.device)
    inside = places < lengths.unsqueeze(1)
    if not len(input):
        return inside.long(), inside.to(wide)
    at = (starts.unsqueeze(1) + places).clamp(max=len(input) - 1)
    return input.long()[at], weights[at] * inside


def _holds_maximum(values_NTD: Tensor, counts_NT1: Tensor) -> Tensor:
    """Whether position t is the first of those that count to hold the largest value, [N, T, D]."""
    values = values_NTD.masked_fill(~counts_NT1, -torch.inf)
    highest = (values == values.amax(1, keepdim=True)) & counts_NT1
    return highest & (highest.cumsum(1) == 1)
