"""What measuring a layer costs, as a share of what its own weight gradient costs: multiplications counted, memory traffic not.

Legend: N samples, T positions, I in, O out, P output positions of a convolution.
"""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from adabatch.check.listening import Call
from adabatch.grad_sample.layout import Layout

_ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase, nn.PReLU)


def relative_cost(layer: nn.Module, calls: list[Call], layout: Layout | None, n_samples: int) -> float:
    """Multiplications of the per-sample norms over those of the layer's weight gradient; NaN where it is not known.

    Linear: (I + O)/(I·O) for T = 1, else min(T(I + O)/(I·O), 1 + 1/T), the Gram form or the gradient itself. Convolution: 1 + 1/P. Embedding: 1 for T = 1,
    else 2. Normalization and other elementwise parameters: 1 + 1/T. Positions of several calls add up.

    Example:
        >>> import torch
        >>> relative_cost(nn.Linear(100, 100), [Call(shapes=[torch.Size((8, 10, 100))])], Layout.BATCH_FIRST, 8)
        0.2
    """
    samples = 1 if layout is Layout.SHARED else n_samples
    numel = sum(math.prod(call.shapes[0]) for call in calls if call.shapes) / samples
    if layout is None or not numel:
        return math.nan
    if isinstance(layer, nn.Linear):
        positions = numel / layer.out_features
        gram = (layer.in_features + layer.out_features) / (layer.in_features * layer.out_features)
        return gram if positions <= 1 else min(positions * gram, 1 + 1 / positions)
    if isinstance(layer, _ConvNd):
        return 1 + layer.out_channels / numel
    if isinstance(layer, nn.Embedding):
        return 1.0 if numel <= layer.embedding_dim else 2.0
    if isinstance(layer, _ELEMENTWISE) and layer.weight is not None:
        return 1 + min(1.0, layer.weight.numel() / numel)
    return math.nan
