"""Convolutions in one, two and three dimensions: rule, fused backward pass and cost.

Legend: N samples, C channels in, O channels out, S and S' positions in and out, K kernel, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn, ops
from torch.nn import functional as F

from adabatch import kernels
from adabatch.grad_sample.cost import PASS, LayerCost, elements_per_sample
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.conv import ConvOuter
from adabatch.grad_sample.layers.linear import no_batch_dimension, weight_and_bias
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import FusedBackward, FusedResult, register_grad_sampler
from adabatch.kernels import accumulation_dtype
from adabatch.kernels.conv_timings import PRODUCTS
from adabatch.kernels.cpu_conv import conv_times, weight_grad_time

# Time of per-sample weight gradients over that of one for the batch.
FACTOR = 1.4

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvBackward(FusedBackward):
    """The weight gradient is summed from the per-sample ones, or both share one call."""

    def supports(
        self, layer: Conv, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        plain = layout is Layout.BATCH_FIRST and inputs.dim() == len(layer.kernel_size) + 2
        return plain and output.requires_grad and _symmetric_padding(layer) is not None

    def backward(
        self, layer: Conv, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        inputs, dtype, has_bias = saved[0], weight.dtype, layer.bias is not None
        stride, padding, dilation, groups = geometry = _geometry(layer)
        grad_inputs, grads = None, {}
        if needs_inputs or not norms:
            grad_inputs, grads["weight"], _ = ops.aten.convolution_backward(
                backprops, inputs.to(backprops.dtype), weight.to(backprops.dtype), None,
                list(stride), list(padding), list(dilation), False, [0] * len(padding), groups,
                [needs_inputs, not norms, False])
        if not norms:
            if has_bias:
                grads["bias"] = backprops.sum([0, *range(2, backprops.dim())])
            return FusedResult(grad_inputs, {name: grad.to(dtype) for name, grad in grads.items()})
        moments = kernels.conv_weight_grad_moments(
            inputs, backprops, tuple(weight.shape), *geometry, second_moment=second_moment)
        bias = _position_sums(backprops) if has_bias else None
        return weight_and_bias(grad_inputs, moments, bias, dtype)


def conv_cost(layer: Conv, input_shape: Sequence[int], output_shape: Sequence[int]) -> LayerCost:
    """With one group by measured times: three times that of the weight's gradient, and those of the
    norms' fastest forms. Else as a Linear of T = S' positions, I = C K / g, with FACTOR T I O for
    per-sample gradients."""
    positions, numel = math.prod(output_shape[2:]), layer.weight.numel()
    width_out = layer.out_channels
    product, bias = positions * numel, PASS * positions * width_out
    training = 3 * product + 2 * PASS * elements_per_sample(input_shape, output_shape)
    _, padding, _, groups = _geometry(layer)
    if groups == 1 and len(input_shape) == len(layer.kernel_size) + 2:
        shapes = tuple(input_shape[1:]), tuple(output_shape[1:]), tuple(layer.weight.shape)
        gradient = PRODUCTS * weight_grad_time(*shapes)
        beside, both = (PRODUCTS * min(conv_times(*shapes, padding, with_gradient).values())
                        for with_gradient in (False, True))
        training = 3 * gradient + 2 * PASS * elements_per_sample(input_shape, output_shape)
        return LayerCost(training, bias + beside, bias + max(0.0, both - gradient),
                         FACTOR * product, numel)
    formed = bias + 2 * PASS * numel
    passthrough, fused = formed + FACTOR * product, formed + (FACTOR - 1) * product
    return LayerCost(training, passthrough, fused, FACTOR * product, numel)


@register_grad_sampler(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, parameters=("weight", "bias"), fused=ConvBackward(),
    cost=conv_cost,
)
def conv_grad_sample(layer: Conv, activations: Tensor, backprops: Tensor) -> dict[str, Factor]:
    """Convolution with any stride, padding, padding mode, dilation and groups: a ConvOuter for the
    weight, Σ over positions of b_n for the bias.

    Args:
        activations, backprops: a, [N, C, *S], and b, [N, O, *S']; without a batch dimension it
            raises a ValueError.

    Example:
        >>> import torch
        >>> layer = nn.Conv1d(1, 1, kernel_size=4)
        >>> factors = conv_grad_sample(layer, torch.ones(2, 1, 6), torch.ones(2, 1, 3))
        >>> factors["weight"].sq_norms(), factors["bias"].sq_norms()
        (tensor([36., 36.]), tensor([9., 9.]))
    """
    dims = len(layer.kernel_size)
    if activations.dim() != dims + 2:
        raise no_batch_dimension(layer, activations, str(dims + 2))
    factors: dict[str, Factor] = {}
    if layer.weight.requires_grad:
        stride, padding, dilation, groups = _geometry(layer)
        if _symmetric_padding(layer) is None:
            activations, padding = _pad(layer, activations), (0,) * dims
        factors["weight"] = ConvOuter(
            activations, backprops, tuple(layer.weight.shape), stride, padding, dilation, groups)
    if layer.bias is not None and layer.bias.requires_grad:
        factors["bias"] = Dense(_position_sums(backprops))
    return factors


def _position_sums(backprops: Tensor) -> Tensor:
    return backprops.flatten(2).sum(2, dtype=accumulation_dtype(backprops))


def _symmetric_padding(layer: Conv) -> tuple[int, ...] | None:
    """The padding with zeros of each dimension; None where it pads otherwise or unequally."""
    sides = _padding_sides(layer)
    if layer.padding_mode != "zeros" or any(left != right for left, right in sides):
        return None
    return tuple(left for left, _ in sides)


def _geometry(layer: Conv) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, padding (zeros where it is not symmetric), dilation and groups."""
    padding = _symmetric_padding(layer) or (0,) * len(layer.kernel_size)
    return tuple(layer.stride), padding, tuple(layer.dilation), layer.groups


def _padding_sides(layer: Conv) -> list[tuple[int, int]]:
    """(left, right) of each dimension; of an odd total, torch puts the extra one on the right."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [dilation * (length - 1)
                  for length, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(amount), int(amount)) for amount in layer.padding]


def _pad(layer: Conv, activations: Tensor) -> Tensor:
    amounts = [amount for sides in reversed(_padding_sides(layer)) for amount in sides]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(activations, amounts, mode=mode)
