"""Forms of a convolution's kernels that are faster on a CPU: Gram matrices of positions, products
with copied windows, and calls with the samples as groups. Each agrees with its definition.

Legend: N samples, C channels in, O channels out, S positions in (with their padding), S' positions
out, P positions out in total, K kernel, g groups.

For images of few positions and many channels, ‖G_n‖² = Σ over positions out p, q of
(b_np · b_nq) Σ_k (a_n,p+k · a_n,q+k): the inner products of all positions in, S × S, are computed
once, and the sum over k shifts both of their positions, one dimension after the other. No G_n is
formed: at 512 channels and 3 × 3 it has two million elements, where 7 × 7 positions have 2,401
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch.kernels.cpu import sum_moments
from adabatch.kernels.operators import (
    Ints, accumulation_dtype, implements, is_forced, row_sq_norms, sample_chunks,
)
from adabatch.kernels.reference_conv import LONGEST_CHUNK, conv_grad_sample

# G_n of one call: larger results are new memory at every call, whose pages cost more than the
# products.
CALL_BYTES = 2 * 2**20
# In multiply-adds of a matrix product, measured at 1.5 to 15 million a sample: one element of G_n
# formed besides the batch's gradient (computed, reordered, summed, squared), and one element of a
# table of pairs of positions added to another (short rows).
FORMED, ADDED = 70, 25


def conv_form(
    activations_shape: Ints, backprops_shape: Ints, weight_shape: Ints, padding: Ints, groups: int,
    *, second_moment: bool = False,
) -> Literal["gram", "windows", "groups"]:
    """How ‖G_n‖² of a convolution is found on a CPU, from its arguments' shapes: "gram", from Gram
    matrices, where that costs less than forming G_n and there is no second moment to compute;
    "windows", products with copied windows of the input, for few channels in a small kernel;
    "groups", weight-gradient calls with the samples as groups.

    Example:
        >>> few, many = (64, 128, 8, 8), (64, 32, 32, 32)
        >>> conv_form(few, few, (128, 128, 3, 3), (1, 1), 1)
        'gram'
        >>> conv_form(many, many, (32, 32, 3, 3), (1, 1), 1)
        'groups'
        >>> conv_form((64, 3, 32, 32), many, (32, 3, 3, 3), (1, 1), 1)
        'windows'
    """
    (samples, channels, *size), (_, width_out, *size_out) = activations_shape, backprops_shape
    kernel = weight_shape[2:]
    if groups != 1 or is_forced("groups"):
        return "groups"
    if is_forced("windows") or (is_forced("gram") and not second_moment):
        return "windows" if is_forced("windows") else "gram"
    if samples and max(size, default=1) > 1 and not second_moment:
        lengths = [length + 2 * amount for length, amount in zip(size, padding, strict=True)]
        pairs = 2 * math.prod(lengths) ** 2  # computed, and copied into the table
        for dim, length in enumerate(kernel):
            lengths[dim] = size_out[dim]
            pairs += length * math.prod(lengths) ** 2
        products = channels * math.prod(size) ** 2 + width_out * math.prod(size_out) ** 2
        if products + ADDED * pairs < FORMED * math.prod(kernel) * channels * width_out:
            return "gram"
    return "windows" if channels <= 4 and 1 < math.prod(kernel) <= 9 else "groups"


@implements("cpu")
def conv_weight_grad_moments(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, *, second_moment: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the form that conv_form chooses."""
    dtype, samples = accumulation_dtype(activations, backprops), activations.shape[0]
    geometry = (stride, padding, dilation)
    shapes = activations.shape, backprops.shape, weight_shape
    form = conv_form(*shapes, padding, groups, second_moment=second_moment)
    if form == "gram":
        norms = gram_sq_norms(activations, backprops, weight_shape[2:], *geometry)
        total = weight_grad(activations.to(dtype), backprops.to(dtype), weight_shape, *geometry)
        return total, norms, None
    if form == "groups":
        total = activations.new_zeros(tuple(weight_shape), dtype=dtype)
        grads = group_grads(activations, backprops, weight_shape, *geometry, groups)
        return sum_moments(grads, samples, total, second_moment)
    width_out, channels, *kernel = weight_shape
    total = activations.new_zeros(math.prod(kernel) * channels, width_out, dtype=dtype)
    grads = window_grads(activations, backprops, kernel, *geometry)
    grad, sq_norms, second = sum_moments(grads, samples, total, second_moment)

    def restored(moment: Tensor) -> Tensor:
        return moment.view(*kernel, channels, width_out).movedim((-1, -2), (0, 1)).contiguous()

    return restored(grad), sq_norms, None if second is None else restored(second)


@implements("cpu")
def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """In the form that conv_form chooses."""
    kernel, geometry = weight_shape[2:], (stride, padding, dilation)
    form = conv_form(activations.shape, backprops.shape, weight_shape, padding, groups)
    if form == "gram":
        return gram_sq_norms(activations, backprops, kernel, *geometry)
    if form == "windows":
        grads = window_grads(activations, backprops, kernel, *geometry)
    else:
        grads = group_grads(activations, backprops, weight_shape, *geometry, groups)
    return torch.cat([row_sq_norms(chunk, chunk.dtype) for chunk in grads])


def gram_sq_norms(
    activations: Tensor, backprops: Tensor, kernel: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> Tensor:
    """‖G_n‖², [N], from Gram matrices: one group, any number of dimensions, a chunk of samples at a
    time; padding is symmetric, with zeros."""
    dtype, dims = accumulation_dtype(activations, backprops), len(kernel)
    size, size_out = activations.shape[2:], backprops.shape[2:]
    lengths = [length + 2 * amount for length, amount in zip(size, padding, strict=True)]
    unpadded = [slice(at, at + length) for length, at in zip(size, padding, strict=True)]
    inside = (slice(None), *unpadded, *unpadded)
    chunks = sample_chunks(4 * math.prod(lengths) ** 2, dtype, activations, backprops)
    table = activations.new_zeros(len(chunks[0][0]), *lengths, *lengths, dtype=dtype)
    sq_norms = []
    for a, b in chunks:
        a_NCS, b_NOS = a.to(dtype).flatten(2), b.to(dtype).flatten(2)
        pairs, gram = table[: len(a)], torch.bmm(a_NCS.mT, a_NCS)
        pairs[inside] = gram.view(len(a), *size, *size)
        for dim in range(dims):
            reach, gap = stride[dim] * (size_out[dim] - 1) + 1, dilation[dim]
            steps = [slice(k * gap, k * gap + reach, stride[dim]) for k in range(kernel[dim])]
            before, between = [slice(None)] * (dim + 1), [slice(None)] * (dims - 1)
            at = [(*before, step, *between, step) for step in steps]
            shifted = [pairs[each] for each in at]
            pairs = shifted[0].clone() if len(shifted) == 1 else shifted[0] + shifted[1]
            for another in shifted[2:]:
                pairs += another
        gram = torch.bmm(b_NOS.mT, b_NOS)
        sq_norms.append(torch.linalg.vecdot(pairs.flatten(1), gram.flatten(1)))
    return torch.cat(sq_norms)


def group_grads(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Iterator[Tensor]:
    """G_n, a chunk [n, O, C/g, *K] at a time; chunks of equal size where N allows."""
    dtype, samples = accumulation_dtype(activations, backprops), len(activations)
    fitting = CALL_BYTES // max(1, dtype.itemsize * math.prod(weight_shape))
    most = max(1, min(LONGEST_CHUNK, fitting))
    length = next((n for n in range(most, most // 2, -1) if samples % n == 0), most)
    for a, b in zip(activations.split(length), backprops.split(length), strict=True):
        yield conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups)


def window_grads(
    activations: Tensor, backprops: Tensor, kernel: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> Iterator[Tensor]:
    """G_n as [n, K C, O], one group, a chunk at a time: the windows that the kernel meets,
    [P, K C], are copied from the input with its channels last."""
    dtype = accumulation_dtype(activations, backprops)
    positions, channels = math.prod(backprops.shape[2:]), activations.shape[1]
    reads = math.prod(kernel) * channels
    numel = reads * (positions + backprops.shape[1])
    padded = [0, 0, *(amount for amount in reversed(padding) for _ in range(2))]
    for a, b in sample_chunks(numel, dtype, activations, backprops):
        last = F.pad(a.to(dtype).movedim(1, -1), padded).contiguous()
        batch, *steps, unit = last.stride()
        size = (len(a), *backprops.shape[2:], *kernel, channels)
        moves = [by * step for by, step in zip((*stride, *dilation), (*steps, *steps), strict=True)]
        windows = last.as_strided(size, (batch, *moves, unit)).reshape(len(a), positions, reads)
        yield torch.bmm(windows.mT, b.to(dtype).flatten(2).mT)


def weight_grad(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> Tensor:
    """Σ_n G_n by one call, one group."""
    weight = activations.new_empty(()).expand(tuple(weight_shape))  # its values do not matter
    return torch.ops.aten.convolution_backward(
        backprops, activations, weight, None, list(stride), list(padding), list(dilation), False,
        [0] * len(stride), 1, [False, True, False],
    )[1]
