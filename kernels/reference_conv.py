"""Per-sample weight gradients of convolutions in one, two or three dimensions, and their moments, in plain torch.

Legend: N samples, C channels in, O channels out, S positions in, S' positions out (one to three dimensions each), K kernel, g groups.
The weight is [O, C/g, *K]; G_n is its gradient through sample n. Precision and autocast as in reference.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch.kernels.chunks import accumulation_dtype, row_sq_norms, sample_chunks

__all__ = ["conv_dot", "conv_grad_sample", "conv_second_moment", "conv_sq_norms"]

# More samples as groups of one call gained nothing, and slowed wide layers threefold.
LONGEST_CHUNK = 16
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Squared norms ‖G_n‖² of a convolution's weight gradient, a chunk of samples at a time.

    Args:
        activations: [N, C, *S]; padding other than with zeros, or unequal on the two sides, is already in it.
        backprops: [N, O, *S'].
        weight_shape: (O, C/g, *K).
        stride, padding, dilation: one number per dimension; padding with zeros, on both sides alike.
        groups: g.

    Returns:
        [N], float32 or float64.

    Example:
        >>> conv_sq_norms(torch.ones(2, 1, 6), torch.ones(2, 1, 3), (1, 1, 4), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([36., 36.])
    """
    dtype = accumulation_dtype(activations, backprops)
    sq_norms = []
    for a, b in sample_chunks(math.prod(weight_shape), dtype, activations, backprops, longest=LONGEST_CHUNK):
        grads = conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups)
        sq_norms.append(row_sq_norms(grads, dtype))
    return torch.cat(sq_norms)


def conv_second_moment(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Elementwise Σ_n G_n² of a convolution's weight gradient, exact: the cross terms between positions are in it.

    Args:
        activations, backprops, weight_shape, stride, padding, dilation, groups: as for conv_sq_norms.

    Returns:
        [*weight_shape], float32 or float64: a sum over the samples, not a mean.

    Example:
        >>> conv_second_moment(torch.ones(2, 1, 4), torch.ones(2, 1, 3), (1, 1, 2), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([[[18., 18.]]])
    """
    dtype = accumulation_dtype(activations, backprops)
    moment = activations.new_zeros(tuple(weight_shape), dtype=dtype)
    for a, b in sample_chunks(math.prod(weight_shape), dtype, activations, backprops, longest=LONGEST_CHUNK):
        moment += conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups).square().sum(0)
    return moment


def conv_dot(
    activations: Tensor, backprops: Tensor, other: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ over outputs of b_n · conv(a_n; other): a convolution, without any G_n.

    Args:
        activations, backprops, stride, padding, dilation, groups: as for conv_sq_norms.
        other: [O, C/g, *K].

    Returns:
        [N], float32 or float64.

    Example:
        >>> conv_dot(torch.ones(2, 1, 4), torch.ones(2, 1, 3), torch.tensor([[[1.0, 2.0]]]), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([9., 9.])
    """
    dtype = accumulation_dtype(activations, backprops, other)
    convolution = _CONVOLUTIONS[other.dim() - 2]
    other = other.to(dtype)
    inner_products = []
    for a, b in sample_chunks(math.prod(backprops.shape[1:]), dtype, activations, backprops):
        outputs = convolution(a.to(dtype), other, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        inner_products.append((outputs * b).flatten(1).sum(1))
    return torch.cat(inner_products)


def conv_grad_sample(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The per-sample weight gradients G themselves.

    In eager mode one weight-gradient call with the samples as groups. Under torch.compile, where the number of groups would be compiled in, one product per
    position of the kernel: G[:, :, :, k] = Σ over outputs of b ⊗ the inputs that position k meets.

    Args:
        activations, backprops, weight_shape, stride, padding, dilation, groups: as for conv_sq_norms.

    Returns:
        [N, *weight_shape], float32 or float64.

    Example:
        >>> conv_grad_sample(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2), (1, 1, 2), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([[[[3., 5.]]]])
    """
    dtype = accumulation_dtype(activations, backprops)
    a, b = activations.to(dtype), backprops.to(dtype)
    # One-wide images pass for channels-last ones, and in float64 torch refuses its own gradient of that order.
    one_wide = max(a.shape[2:], default=1) == 1
    if torch.compiler.is_compiling() or one_wide:
        return _products_by_kernel_position(a, b, weight_shape, stride, padding, dilation, groups)
    samples, (width_out, *weight_rest) = a.shape[0], weight_shape
    if samples == 0:
        return a.new_zeros(0, *weight_shape)
    _, grads, _ = torch.ops.aten.convolution_backward(
        b.reshape(1, -1, *b.shape[2:]),
        a.reshape(1, -1, *a.shape[2:]),
        a.new_empty(samples * width_out, *weight_rest),
        None,
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0] * len(stride),
        samples * groups,
        [False, True, False],
    )
    return grads.reshape(samples, *weight_shape)


def _products_by_kernel_position(
    a: Tensor, b: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    samples, width_out, channels, kernel = a.shape[0], weight_shape[0], weight_shape[1], weight_shape[2:]
    padded = F.pad(a, [amount for amount in reversed(padding) for _ in range(2)])
    b = b.reshape(samples * groups, width_out // groups, -1)
    products = []
    for position in itertools.product(*(range(length) for length in kernel)):
        window = padded
        for dim, (offset, step, gap) in enumerate(zip(position, stride, dilation, strict=True)):
            reach = (padded.shape[dim + 2] - gap * (kernel[dim] - 1) - 1) // step * step + 1
            window = window[(slice(None),) * (dim + 2) + (slice(offset * gap, offset * gap + reach, step),)]
        products.append(torch.bmm(b, window.reshape(samples * groups, channels, -1).mT))
    return torch.stack(products, dim=-1).reshape(samples, *weight_shape)
