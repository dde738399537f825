"""Rule for convolutions in one, two and three dimensions.

Legend: N samples, C channels in, O channels out, S and S' positions in and out, K kernel, g groups.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from adabatch.grad_sample.factors.base import ConvOuter, Dense, Factor
from adabatch.grad_sample.registry import register_grad_sampler
from adabatch.kernels.chunks import accumulation_dtype

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register_grad_sampler(nn.Conv1d, nn.Conv2d, nn.Conv3d, parameters=("weight", "bias"))
def conv_grad_sample(layer: _Conv, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """Convolution with any stride, padding, padding mode, dilation and groups: a ConvOuter for the weight, Σ over positions of b_n for the bias.

    Args:
        layer: the layer.
        activations: a, [N, C, *S].
        backprops: b, [N, O, *S'].

    Raises:
        ValueError: the input has no batch dimension.

    Example:
        >>> import torch
        >>> factors = conv_grad_sample(nn.Conv1d(1, 1, kernel_size=4), torch.ones(2, 1, 6), torch.ones(2, 1, 3))
        >>> factors["weight"].sq_norms(), factors["bias"].sq_norms()
        (tensor([36., 36.]), tensor([9., 9.]))
    """
    dims = len(layer.kernel_size)
    if activations.dim() != dims + 2:
        raise ValueError(
            f"{type(layer).__name__} got an input of shape {tuple(activations.shape)}: without a batch dimension there are no samples to tell apart. "
            f"Allowed are {dims + 2} dimensions, samples first. Add one with inputs.unsqueeze(0), or stack several samples."
        )
    factors: dict[str, Factor] = {}
    if layer.weight.requires_grad:
        padding = symmetric_padding(layer)
        if padding is None:
            activations, padding = _pad(layer, activations), (0,) * dims
        shape = tuple(layer.weight.shape)
        factors["weight"] = ConvOuter(activations, backprops, shape, tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
    if layer.bias is not None and layer.bias.requires_grad:
        factors["bias"] = Dense(backprops.flatten(2).sum(2, dtype=accumulation_dtype(backprops)))
    return factors


def symmetric_padding(layer: _Conv) -> tuple[int, ...] | None:
    """The layer's padding with zeros, one number per dimension, or None where it is of another kind or unequal on the two sides.

    Example:
        >>> symmetric_padding(nn.Conv1d(1, 1, 3, padding="same")), symmetric_padding(nn.Conv1d(1, 1, 4, padding="same"))
        ((1,), None)
    """
    sides = _padding_sides(layer)
    return None if layer.padding_mode != "zeros" or any(left != right for left, right in sides) else tuple(left for left, right in sides)


def _padding_sides(layer: _Conv) -> list[tuple[int, int]]:
    """Padding (left, right) of each dimension; 'same' with an even reach puts the odd one on the right, as torch does."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [dilation * (length - 1) for length, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in layer.padding]


def _pad(layer: _Conv, activations: Tensor) -> Tensor:
    amounts = [amount for sides in reversed(_padding_sides(layer)) for amount in sides]
    return F.pad(activations, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
