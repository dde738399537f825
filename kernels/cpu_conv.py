"""Forms of a convolution's kernels that are faster on a CPU: Gram matrices of positions, products
with copied windows, and calls with the samples as groups or alone. Each agrees with its definition.

Legend: N samples, C channels in, O channels out, S positions in (with their padding), S' positions
out, P positions out in total, K kernel, g groups.

For images of few positions and many channels, ‖G_n‖² = Σ over positions out p, q of
(b_np · b_nq) Σ_k (a_n,p+k · a_n,q+k): the inner products of all positions in, S × S, are computed
once, and the sum over k shifts both of their positions, one dimension after the other. No G_n is
formed: at 512 channels and 3 × 3 it has two million elements, where 7 × 7 positions have 2,401
pairs.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch.kernels import conv_timings
from adabatch.kernels.cpu import sum_moments
from adabatch.kernels.operators import (
    Ints, accumulation_dtype, implements, is_forced, row_sq_norms, sample_chunks,
)
from adabatch.kernels.reference_conv import LONGEST_CHUNK, conv_grad_sample

# G_n of one call: larger results are new memory at every call, whose pages cost more than the
# products.
CALL_BYTES = 2 * 2**20
LONGEST_BAND = 96  # rows of the output, for band_grads
MOST_SHIFTED = 144  # positions of the output, for shift_grads
# What a form may keep of one sample: copied windows of large images are larger.
KEPT_BYTES = 16 * 2**20

Form = Literal["gram", "windows", "groups", "calls"]


def conv_form(
    activations_shape: Ints, backprops_shape: Ints, weight_shape: Ints, padding: Ints, groups: int,
    *, with_gradient: bool, second_moment: bool = False,
) -> Form:
    """How ‖G_n‖² of a convolution is found on a CPU, from its arguments' shapes: the form that
    takes the least time by conv_times; "groups" where there is more than one group.

    Example:
        >>> few, many = (64, 128, 8, 8), (64, 32, 32, 32)
        >>> conv_form(few, few, (128, 128, 3, 3), (1, 1), 1, with_gradient=False)
        'gram'
        >>> conv_form(many, many, (32, 32, 3, 3), (1, 1), 1, with_gradient=True)
        'groups'
        >>> conv_form((64, 3, 16, 16), (64, 64, 16, 16), (64, 3, 7, 7), (3, 3), 1,
        ...           with_gradient=True)
        'windows'
    """
    if groups != 1 or not activations_shape[0]:
        return "groups"
    times = conv_times(
        tuple(activations_shape[1:]), tuple(backprops_shape[1:]), tuple(weight_shape),
        tuple(padding), with_gradient)
    allowed: list[Form] = [form for form in times if form != "gram" or not second_moment]
    forced = [form for form in allowed if is_forced(form)]
    return forced[0] if forced else min(allowed, key=times.__getitem__)


@functools.lru_cache(maxsize=4096)
def conv_times(
    image: Ints, image_out: Ints, weight_shape: Ints, padding: Ints, with_gradient: bool
) -> dict[Form, float]:
    """Microseconds of one core in which each form finds a sample's norm, and with_gradient its part
    of the weight's gradient, of a convolution with one group: "gram", from Gram matrices;
    "windows", products with copied windows of the input; "groups", weight-gradient calls with the
    samples as groups; "calls", one such call a sample, which serves images of few channels, of
    which groups are slow. Interpolated in logarithms between measured shapes.

    Args:
        image, image_out: (C, *S) and (O, *S').
        weight_shape: (O, C, *K).
    """
    kernel, positions = math.prod(weight_shape[2:]), math.prod(image_out[1:])
    shape = (image[0], image_out[0], kernel, positions)
    times: dict[Form, float] = {
        "groups": _interpolated(conv_timings.GROUPS, shape),
        "calls": (conv_timings.CALL + conv_timings.RETURNED * math.prod(weight_shape)
                  + weight_grad_time(image, image_out, weight_shape))}
    if 4 * image[0] * kernel * positions <= KEPT_BYTES:
        times["windows"] = _interpolated(conv_timings.WINDOWS, shape)
    products, pairs = gram_counts(image, image_out, weight_shape, padding)
    if max(image[1:], default=1) > 1 and 2 * pairs <= KEPT_BYTES:
        times["gram"] = (conv_timings.GRAM * products + conv_timings.ADDED * pairs
                         + conv_timings.CALLS)
        if with_gradient:
            times["gram"] += weight_grad_time(image, image_out, weight_shape)
    return times


@functools.lru_cache(maxsize=4096)
def weight_grad_time(image: Ints, image_out: Ints, weight_shape: Ints) -> float:
    """Microseconds of one core for a sample's part of the weight's gradient; arguments as for
    conv_times."""
    shape = (image[0], image_out[0], math.prod(weight_shape[2:]), math.prod(image_out[1:]))
    return _interpolated(conv_timings.WEIGHT_GRADIENT, shape)


def _interpolated(table: Any, point: Ints) -> float:
    """Between the values of the table nested along conv_timings.AXES, linear in logarithms; in
    proportion to what is beyond its end."""

    def logarithm(part: Any, dim: int) -> float:
        if dim == len(point):
            return math.log(part)
        axis = conv_timings.AXES[dim]
        at = min(max(1, point[dim]), axis[-1])
        beyond = math.log(max(1, point[dim] / axis[-1]))
        index = min(max(bisect.bisect_right(axis, at) - 1, 0), len(axis) - 2)
        low, high = axis[index : index + 2]
        share = math.log(at / low) / math.log(high / low)
        return (beyond + (1 - share) * logarithm(part[index], dim + 1)
                + share * logarithm(part[index + 1], dim + 1))

    return math.exp(logarithm(table, 0))


def gram_counts(
    image: Ints, image_out: Ints, weight_shape: Ints, padding: Ints
) -> tuple[int, int]:
    """Multiply-adds of a sample's Gram matrices, and the elements added to their table; arguments
    as for conv_times."""
    (channels, *size), (width_out, *size_out) = image, image_out
    lengths = [length + 2 * amount for length, amount in zip(size, padding, strict=True)]
    pairs = 2 * math.prod(lengths) ** 2  # computed, and copied into the table
    for dim, length in enumerate(weight_shape[2:]):
        lengths[dim] = size_out[dim]
        pairs += length * math.prod(lengths) ** 2
    return channels * math.prod(size) ** 2 + width_out * math.prod(size_out) ** 2, pairs


@implements("cpu")
def conv_weight_grad_moments(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, *, second_moment: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the form that conv_form chooses."""
    dtype, samples = accumulation_dtype(activations, backprops), activations.shape[0]
    geometry = (stride, padding, dilation)
    shapes = activations.shape, backprops.shape, weight_shape
    form = conv_form(*shapes, padding, groups, with_gradient=True, second_moment=second_moment)
    if form == "gram":
        norms = gram_sq_norms(activations, backprops, weight_shape[2:], *geometry)
        total = weight_grad(activations.to(dtype), backprops.to(dtype), weight_shape, *geometry)
        return total, norms, None
    if form in ("groups", "calls"):
        total = activations.new_zeros(tuple(weight_shape), dtype=dtype)
        grads = group_grads(activations, backprops, weight_shape, *geometry, groups, form)
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
    shapes = activations.shape, backprops.shape, weight_shape
    form = conv_form(*shapes, padding, groups, with_gradient=False)
    if form == "gram":
        return gram_sq_norms(activations, backprops, kernel, *geometry)
    if form == "windows":
        grads = window_grads(activations, backprops, kernel, *geometry)
    else:
        grads = group_grads(activations, backprops, weight_shape, *geometry, groups, form)
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
    dilation: Ints, groups: int, form: Form = "groups",
) -> Iterator[Tensor]:
    """G_n, a chunk [n, O, C/g, *K] at a time: in chunks of equal size where N allows, or "calls"
    of one sample."""
    if _has_bands(activations, backprops, weight_shape, groups):
        few = math.prod(backprops.shape[2:]) <= MOST_SHIFTED
        grads = shift_grads if few else band_grads
        yield from grads(activations, backprops, weight_shape, stride, padding, dilation)
        return
    dtype, samples = accumulation_dtype(activations, backprops), len(activations)
    fitting = CALL_BYTES // max(1, dtype.itemsize * math.prod(weight_shape))
    most = max(1, min(LONGEST_CHUNK, fitting)) if form == "groups" else 1
    length = next((n for n in range(most, most // 2, -1) if samples % n == 0), most)
    for a, b in zip(activations.split(length), backprops.split(length), strict=True):
        yield conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups)


def _has_bands(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, groups: int
) -> bool:
    """Whether shift_grads or band_grads is faster: torch has a kernel of its own for 3 × 3."""
    depthwise = groups == activations.shape[1] == weight_shape[0] and len(weight_shape) == 4
    return depthwise and min(weight_shape[2:]) > 3 and backprops.shape[2] <= LONGEST_BAND


def band_grads(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> Iterator[Tensor]:
    """G_n, a chunk [n, C, 1, *K] at a time, of a depthwise convolution in two dimensions.

    For each channel one matrix product gives M[i, l, h] = Σ_w a[i, w + l] b[h, w], of every row of
    the input with every row of the output; G[k, l] is the sum of M along the diagonal i = h + k.
    That multiplies more than is needed, but as a matrix product: torch's own weight gradient is
    several times slower.
    """
    dtype = accumulation_dtype(activations, backprops)
    (channels, _, rows, columns), (height, width) = weight_shape, backprops.shape[2:]
    padded = [amount for amount in reversed(padding) for _ in range(2)]
    lines = activations.shape[2] + 2 * padding[0]
    numel = channels * lines * columns * (width + height)
    for a, b in sample_chunks(numel, dtype, activations, backprops):
        image = F.pad(a.to(dtype), padded).contiguous()
        count, line = len(a) * channels, image.shape[3]  # strides of one-wide dimensions may lie
        windows = image.as_strided(
            (count, lines, columns, width), (lines * line, line, dilation[1], stride[1]))
        products = torch.bmm(windows.reshape(count, lines * columns, width),
                             b.to(dtype).reshape(count, height, width).mT)
        step = columns * height  # from a row of the input to the next
        diagonals = products.as_strided(
            (count, rows, columns, height),
            (lines * step, dilation[0] * step, height, stride[0] * step + 1))
        yield diagonals.sum(3).view(len(a), channels, 1, rows, columns)


def shift_grads(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> Iterator[Tensor]:
    """G_n, a chunk [n, C, 1, *K] at a time, of a depthwise convolution in two dimensions.

    G[k, l] is the sum over the positions where output and shifted input meet, all samples and
    channels at once, with positions first: for small images, whose bands are too many too small
    products, and where much of a large kernel meets nothing but padding.
    """
    dtype, (channels, _, *kernel) = accumulation_dtype(activations, backprops), weight_shape
    size, size_out = activations.shape[2:], backprops.shape[2:]
    meeting = [[_meeting(k * dilation[d] - padding[d], stride[d], size[d], size_out[d])
                for k in range(kernel[d])] for d in range(2)]
    numel = channels * (math.prod(size) + 2 * math.prod(size_out))
    for a, b in sample_chunks(numel, dtype, activations, backprops):
        a_SE, b_SE = (_positions_first(each.to(dtype)) for each in (a, b))
        buffer, grads = torch.empty_like(b_SE), a_SE.new_zeros(*kernel, a_SE.shape[-1])
        for (row, rows), (column, columns) in itertools.product(*map(enumerate, meeting)):
            own = a_SE[rows[0], columns[0]]
            if own.numel():
                products = buffer.view(-1)[: own.numel()].view(own.shape)
                torch.mul(own, b_SE[rows[1], columns[1]], out=products)
                torch.sum(products, (0, 1), out=grads[row, column])
        yield grads.flatten(0, 1).T.contiguous().view(len(a), channels, 1, *kernel)


def _meeting(offset: int, stride: int, length: int, length_out: int) -> tuple[slice, slice]:
    """Where input and output of one dimension meet, in at · stride + offset."""
    first = max(0, -(offset // stride))
    count = max(0, min(length_out, (length - 1 - offset) // stride + 1) - first)
    start = first * stride + offset
    return slice(start, start + count * stride, stride), slice(first, first + count)


def _positions_first(images: Tensor) -> Tensor:
    """[N, C, H, W] as [H, W, N C]."""
    samples, channels, *size = images.shape
    if images.is_contiguous():  # as a matrix, which torch transposes fast
        return images.view(samples * channels, -1).T.contiguous().view(*size, -1)
    return images.permute(2, 3, 0, 1).reshape(*size, -1)


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
        last = a.to(dtype).movedim(1, -1)
        last = (F.pad(last, padded) if any(padded) else last).contiguous()
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
