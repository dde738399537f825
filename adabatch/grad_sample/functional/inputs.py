"""What enters the model and its layers: samples, which its tap measures, or what is the same for all of them, which is traced on through the layer.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adabatch.grad_sample.functional.tracer import ParameterTracer
from adabatch.grad_sample.layout import BatchSizeSource, Layout
from adabatch.grad_sample.taps.base import TapSite

_OPAQUE = (nn.RNNBase, nn.MultiheadAttention)


def tensors_of(values: tuple[tuple, dict[str, Any]]) -> list[Tensor]:
    """All tensors in a call's arguments and keyword arguments, in order.

    Example:
        >>> import torch
        >>> len(tensors_of(((torch.zeros(2), {"mask": torch.ones(2), "name": "a"}), {})))
        2
    """
    args, kwargs = values
    if not kwargs and len(args) == 1 and type(args[0]) is Tensor:  # the commonest call, which need not be flattened
        return [args[0]]
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def batch_size_of_inputs(
    source: BatchSizeSource | None, args: tuple, kwargs: dict[str, Any], tensors: Sequence[Tensor], traced: Collection[str]
) -> int | None:
    """N, from the model's inputs: from the source, or else from dimension 0 of the first of the tensors in them; None if there is none.

    Raises:
        RuntimeError: there is none, and parameters are to be traced.
    """
    if source is not None:
        return source.read(args, kwargs)
    first = next((tensor for tensor in tensors if tensor.dim()), None)
    if first is None and traced:
        raise RuntimeError(
            f"the number of samples, which measuring {', '.join(sorted(traced))} needs, cannot be read from the model's inputs: none of them is a tensor. "
            "Call the model with tensors, or with tuples, lists and dicts of them, or pass ignore=[...]"
        )
    return None if first is None else first.shape[0]


def has_batch_dim(site: TapSite, leaves: Sequence[Any], tracer: ParameterTracer, n_samples: int) -> bool:
    """Whether the layer is called with samples; a position table looked up without a batch dimension is not."""
    if site.layout is not Layout.BATCH_FIRST:
        return site.layout is not Layout.SHARED
    if isinstance(site.layer, _OPAQUE):
        return True
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if site.sampler is not None:
        inputs = inputs[:1]
    constant_rows = any(leaf.is_floating_point() and leaf.dim() and leaf.shape[0] == n_samples for leaf in inputs)
    return constant_rows or any(tracer.comes_from_samples(leaf) for leaf in inputs)


def row_dim(site: TapSite, tensor: Tensor, index: int, tracer: ParameterTracer, n_samples: int) -> int | None:
    """Along which dimension the layer's input number `index`, made of parameters alone, has a row for every sample; None if it has none.

    Raises:
        RuntimeError: it has none, and operations inside the layer cannot be watched.
    """
    opaque = isinstance(site.layer, _OPAQUE)
    dim = int(site.layout is Layout.BATCH_SECOND)
    if opaque:  # hidden states have their samples along dimension 1 whatever batch_first says
        dim = int(not site.layer.batch_first or (isinstance(site.layer, nn.RNNBase) and index > 0))
    if tensor.dim() > dim and tensor.shape[dim] == n_samples and (opaque or dim or tracer.recipe_of(tensor).expanded):
        return dim
    if opaque:
        raise RuntimeError(
            f"{site.name} is given a tensor of shape {tuple(tensor.shape)} that was computed from parameters alone and has no row for each of the "
            f"{n_samples} samples: expand it to the batch, or pass ignore=[...]"
        )
    return None
