"""The definition of the kernels for convolutions in one, two or three dimensions, in plain torch.

Legend: N samples, C channels in, O channels out, S positions in, S' positions out (one to three
dimensions each), K kernel, g groups. The weight is [O, C/g, *K]; G_n is its gradient through
sample n. Precision and autocast as in reference.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch.kernels.operators import (
    Ints, accumulation_dtype, operation, row_sq_norms, sample_chunks,
)
from adabatch.kernels.reference import sum_moments

# More samples as groups of one call gained nothing, and slowed wide layers threefold.
LONGEST_CHUNK = 16
_INPUTS = (
    "(Tensor activations, Tensor backprops, "
    "SymInt[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
)


@operation(f"{_INPUTS}) -> Tensor", lambda a, *_: [(a.shape[0],)])
def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """Squared norms ‖G_n‖² [N] of a convolution's weight gradient, a chunk of samples at a time.

    Args:
        activations: [N, C, *S]; padding that is not zero, or not symmetric, is already in it.
        backprops: [N, O, *S'].
        weight_shape: (O, C/g, *K).
        stride, padding, dilation: one number per dimension; symmetric padding with zeros.
        groups: g.

    Example:
        >>> geometry = dict(stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> conv_sq_norms(torch.ones(2, 1, 6), torch.ones(2, 1, 3), (1, 1, 4), **geometry)
        tensor([36., 36.])
    """
    grads = _chunks(activations, backprops, weight_shape, stride, padding, dilation, groups)
    return torch.cat([row_sq_norms(chunk, chunk.dtype) for chunk in grads])


@operation(f"{_INPUTS}) -> Tensor", lambda a, b, weight_shape, *_: [weight_shape])
def conv_second_moment(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """Elementwise Σ_n G_n² [*weight_shape] of a convolution's weight gradient, with the cross terms
    between positions. Arguments as for conv_sq_norms.

    Example:
        >>> geometry = dict(stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> conv_second_moment(torch.ones(2, 1, 4), torch.ones(2, 1, 3), (1, 1, 2), **geometry)
        tensor([[[18., 18.]]])
    """
    dtype = accumulation_dtype(activations, backprops)
    moment = activations.new_zeros(tuple(weight_shape), dtype=dtype)
    for grads in _chunks(activations, backprops, weight_shape, stride, padding, dilation, groups):
        moment += grads.square().sum(0)
    return moment


@operation(
    f"{_INPUTS}, *, bool second_moment, bool deterministic) -> (Tensor, Tensor, Tensor)",
    lambda a, b, weight_shape, *_: [weight_shape, (a.shape[0],), weight_shape],
    opaque=("cpu", "cuda"),
)
def conv_weight_grad_moments(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, *, second_moment: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A convolution's weight gradient Σ_n G_n [*weight_shape], and in the same pass ‖G_n‖² [N] and
    Σ_n G_n² [*weight_shape] or None. Arguments as for conv_sq_norms and weight_grad_moments.

    Example:
        >>> geometry = dict(stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> a, b = torch.ones(2, 1, 5), torch.ones(2, 1, 2)
        >>> conv_weight_grad_moments(a, b, (1, 1, 4), **geometry)[:2]
        (tensor([[[4., 4., 4., 4.]]]), tensor([16., 16.]))
    """
    dtype = accumulation_dtype(activations, backprops)
    grads = _chunks(activations, backprops, weight_shape, stride, padding, dilation, groups)
    total = activations.new_zeros(tuple(weight_shape), dtype=dtype)
    return sum_moments(grads, total, second_moment)


@operation()
def conv_dot(
    activations: Tensor, backprops: Tensor, other: Tensor, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """Inner products ⟨G_n, other⟩ = Σ over outputs of b_n · conv(a_n; other) [N], without any G_n;
    other [O, C/g, *K], the rest as for conv_sq_norms.

    Example:
        >>> a, b, other = torch.ones(2, 1, 4), torch.ones(2, 1, 3), torch.tensor([[[1.0, 2.0]]])
        >>> conv_dot(a, b, other, stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([9., 9.])
    """
    dtype = accumulation_dtype(activations, backprops, other)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[other.dim() - 3]
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    weight = other.to(dtype)
    inner_products = []
    for a, b in sample_chunks(math.prod(backprops.shape[1:]), dtype, activations, backprops):
        outputs = convolution(a.to(dtype), weight, None, *geometry)
        inner_products.append((outputs * b).flatten(1).sum(1))
    return torch.cat(inner_products)


@operation()
def conv_grad_sample(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """The per-sample weight gradients G [N, *weight_shape]; arguments as for conv_sq_norms.

    In eager mode one weight-gradient call with the samples as groups. Under torch.compile, where
    the number of groups would be compiled in, one product per position of the kernel:
    G[:, :, :, k] = Σ over outputs of b ⊗ the inputs that position k meets.

    Example:
        >>> a, geometry = torch.tensor([[[1.0, 2.0, 3.0]]]), ((1,), (0,), (1,), 1)
        >>> conv_grad_sample(a, torch.ones(1, 1, 2), (1, 1, 2), *geometry)
        tensor([[[[3., 5.]]]])
    """
    dtype = accumulation_dtype(activations, backprops)
    a, b = activations.to(dtype), backprops.to(dtype)
    # One-wide images pass for channels-last ones, and in float64 torch refuses its own gradient
    # of that order.
    one_wide = max(a.shape[2:], default=1) == 1
    if torch.compiler.is_compiling() or one_wide:
        geometry = (weight_shape, stride, padding, dilation, groups)
        return _products_by_kernel_position(a, b, *geometry)
    samples, (width_out, *weight_rest) = a.shape[0], weight_shape
    if samples == 0:
        return a.new_zeros(0, *weight_shape)
    _, grads, _ = torch.ops.aten.convolution_backward(
        b.reshape(1, -1, *b.shape[2:]), a.reshape(1, -1, *a.shape[2:]),
        a.new_empty(samples * width_out, *weight_rest), None, list(stride), list(padding),
        list(dilation), False, [0] * len(stride), samples * groups, [False, True, False],
    )
    return grads.reshape(samples, *weight_shape)


def _chunks(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Iterator[Tensor]:
    """G_n, a chunk [n, *weight_shape] at a time."""
    dtype, numel = accumulation_dtype(activations, backprops), math.prod(weight_shape)
    geometry = (weight_shape, stride, padding, dilation, groups)
    chunks = sample_chunks(numel, dtype, activations, backprops, longest=LONGEST_CHUNK)
    return (conv_grad_sample(a, b, *geometry) for a, b in chunks)


def _products_by_kernel_position(
    a: Tensor, b: Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Tensor:
    samples, (width_out, channels, *kernel) = a.shape[0], weight_shape
    padded = F.pad(a, [amount for amount in reversed(padding) for _ in range(2)])
    b = b.reshape(samples * groups, width_out // groups, -1)
    products = []
    for position in itertools.product(*(range(length) for length in kernel)):
        window = padded
        for dim, (at, step, gap) in enumerate(zip(position, stride, dilation, strict=True)):
            length = padded.shape[dim + 2] - gap * (kernel[dim] - 1)
            last = at * gap + (length - 1) // step * step + 1
            window = window[(slice(None),) * (dim + 2) + (slice(at * gap, last, step),)]
        products.append(torch.bmm(b, window.reshape(samples * groups, channels, -1).mT))
    return torch.stack(products, dim=-1).reshape(samples, *weight_shape)
