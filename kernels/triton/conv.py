"""Triton kernel for the weight of a convolution in one or two dimensions: weight gradient and
moments in one pass, as an implicit product; nothing is unfolded.

Legend: N samples, C channels in, O channels out, H × W positions in, P positions out, KH × KW
kernel, g groups, J = KH·KW·C/g elements that one output reads.
G_n[o, c, kh, kw] = Σ_p b_n[o, p] a_n[c, p·stride + k·dilation − padding]. Any strides, channels
last among them; offsets are 64 bits wide.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels.operators import Ints, follows_determinism, implements
from adabatch.kernels.triton import outer, tuning
from adabatch.kernels.triton.outer import add_partial_sums, partial_sums, store_tile
from adabatch.kernels.triton.tuning import config

# Configurations that spilled on sm_80 or sm_90 are not in these lists.
CONV = [
    config(8, 3, O=64, J=64, P=32), config(8, 3, O=128, J=64, P=32), config(4, 3, O=64, J=64, P=16),
    config(4, 2, O=64, J=32, P=32), config(4, 2, O=32, J=64, P=32), config(4, 2, O=16, J=16, P=32),
]
CONV_TF32 = [
    config(8, 3, O=64, J=64, P=32), config(4, 3, O=32, J=64, P=32), config(4, 2, O=16, J=16, P=32)
]
CONV_IEEE = [
    config(4, 2, O=32, J=64, P=16), config(4, 2, O=32, J=32, P=16), config(4, 2, O=16, J=16, P=16)
]


@triton.jit
def conv_kernel(
    a_ptr, b_ptr, grad_ptr, second_ptr, norms_ptr,
    n_samples, height, width, n_positions, width_out, channels, outs, n_groups, samples_per_split,
    a_stride_n, a_stride_c, a_stride_h, a_stride_w, b_stride_n, b_stride_o, b_stride_h, b_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GRAD: tl.constexpr, SECOND: tl.constexpr, NORMS: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """As weight_grad_kernel, a tile of one group's [O/g, J] per program; `channels` and `outs` are
    of a group. J runs over channels fastest, so that activations with channels last are read in
    rows."""
    reach = channels * KH * KW
    tiles_o, tiles_j = tl.cdiv(outs, BLOCK_O), tl.cdiv(reach, BLOCK_J)
    tile = tl.program_id(0) % (n_groups * tiles_o * tiles_j)
    split = tl.program_id(0) // (n_groups * tiles_o * tiles_j)
    group = tile // (tiles_o * tiles_j)
    o = (tile // tiles_j % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = (tile % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    c, k = j % channels, j // channels
    row = (group * outs + o).to(tl.int64)
    column = (group * channels + c).to(tl.int64)
    o_in, j_in = (o < outs)[None, :], (j < reach)[None, :]
    first = split * samples_per_split
    a_sample = a_ptr + first.to(tl.int64) * a_stride_n + column[None, :] * a_stride_c
    b_sample = b_ptr + first.to(tl.int64) * b_stride_n + row[None, :] * b_stride_o
    grad = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    for n in range(first, tl.minimum(first + samples_per_split, n_samples)):
        sample = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
        for start in range(0, n_positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            p_in = (p < n_positions)[:, None]
            y, x = (p // width_out)[:, None], (p % width_out)[:, None]
            h = y * STRIDE_H + (k // KW * DILATION_H - PAD_H)[None, :]
            w = x * STRIDE_W + (k % KW * DILATION_W - PAD_W)[None, :]
            inside = p_in & j_in & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            a_ptrs = a_sample + h.to(tl.int64) * a_stride_h + w.to(tl.int64) * a_stride_w
            b_ptrs = b_sample + y.to(tl.int64) * b_stride_h + x.to(tl.int64) * b_stride_w
            a = tl.load(a_ptrs, mask=inside, other=0).to(DTYPE)
            b = tl.load(b_ptrs, mask=p_in & o_in, other=0).to(DTYPE)
            sample = tl.dot(tl.trans(b), a, sample, input_precision=PRECISION)
        if GRAD:
            grad += sample
        if SECOND:
            second += sample * sample
        if NORMS:
            tl.store(norms_ptr + tile.to(tl.int64) * n_samples + n, tl.sum(sample * sample))
        a_sample += a_stride_n
        b_sample += b_stride_n
    offsets = row[:, None] * reach + (c * (KH * KW) + k)[None, :]
    inside = (o < outs)[:, None] & j_in
    place = split.to(tl.int64) * outs * n_groups * reach
    store_tile(grad_ptr, grad, offsets, inside, place, GRAD, ATOMIC)
    store_tile(second_ptr, second, offsets, inside, place, SECOND, ATOMIC)


def _takes(activations: Tensor, *rest: object) -> bool:
    return tuning.supports(activations, *rest) and activations.dim() in (3, 4)


@implements("triton", _takes)
def conv_weight_grad_moments(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, *, second_moment: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one and two dimensions."""
    inputs = (activations, backprops, weight_shape, stride, padding, dilation, groups)
    if (views := _as_matrix(*inputs)) is not None:
        grad, norms, second = outer.weight_grad_moments(
            *views, second_moment=second_moment, deterministic=deterministic)
    else:
        grad, partial_norms, second = _implicit(
            *inputs, grad=True, second=second_moment, norms=True, deterministic=deterministic)
        norms = partial_norms.sum(0)
    shape = tuple(weight_shape)
    return (grad.view(shape), norms,
            second.view(shape) if second_moment and second is not None else None)


@implements("triton", _takes)
def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """In one and two dimensions."""
    inputs = (activations, backprops, weight_shape, stride, padding, dilation, groups)
    if (views := _as_matrix(*inputs)) is not None:
        return outer.outer_sq_norms(*views)
    return _implicit(*inputs, norms=True)[1].sum(0)


@implements("triton", _takes)
def conv_second_moment(
    activations: Tensor, backprops: Tensor, weight_shape: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:
    """In one and two dimensions."""
    inputs = (activations, backprops, weight_shape, stride, padding, dilation, groups)
    if (views := _as_matrix(*inputs)) is not None:
        return outer.outer_second_moment(*views).view(tuple(weight_shape))
    return _implicit(*inputs, second=True)[2].view(tuple(weight_shape))


def _as_matrix(
    a: Tensor, b: Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> tuple[Tensor, Tensor] | None:
    """A 1 × 1 convolution is a matrix that multiplies its input: the views [N, S, C] and [N, S, O];
    None for others, and where the views would be copies."""
    one = math.prod(weight_shape[2:]) == 1 and all(step == 1 for step in stride)
    if groups != 1 or not one or any(padding):
        return None
    for each in (a, b):
        gapless = each.dim() == 3 or each.stride(2) == each.shape[3] * each.stride(3)
        if not gapless and each.shape[3] > 1:
            return None
    return a.flatten(2).mT, b.flatten(2).mT


def _implicit(
    a: Tensor, b: Tensor, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, *, grad: bool = False, second: bool = False, norms: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is wanted of (weight gradient, norms by tile [tiles, N], second moment), the rest being
    empty tensors."""
    if a.dim() == 3:
        a, b, weight_shape = a.unsqueeze(2), b.unsqueeze(2), (*weight_shape[:2], 1, weight_shape[2])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    samples, _, height, width = a.shape
    (all_outs, channels, kh, kw), (height_out, width_out) = weight_shape, b.shape[2:]
    outs, fixed = all_outs // groups, follows_determinism(deterministic)
    dtype = tuning.compute_type(a, b)
    rounding = tuning.precision(dtype)
    empty = a.new_empty(0, dtype=torch.float32)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles_j = triton.cdiv(channels * kh * kw, config.kwargs["BLOCK_J"])
        tiles = groups * triton.cdiv(outs, config.kwargs["BLOCK_O"]) * tiles_j
        per_split, splits = tuning.split_samples(samples, tiles, a.device)
        atomic = splits > 1 and not fixed
        grads = partial_sums(empty, grad, weight_shape, splits, atomic)
        seconds = partial_sums(empty, second, weight_shape, splits, atomic)
        partial_norms = empty.new_empty(tiles, samples) if norms else empty
        if tiles * splits:
            conv_kernel[(tiles * splits,)](
                a, b, grads, seconds, partial_norms, samples, height, width,
                height_out * width_out, width_out, channels, outs, groups, per_split,
                *a.stride(), *b.stride(), KH=kh, KW=kw, STRIDE_H=stride[0], STRIDE_W=stride[1],
                PAD_H=padding[0], PAD_W=padding[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
                GRAD=grad, SECOND=second, NORMS=norms, ATOMIC=atomic,
                PRECISION=rounding, DTYPE=dtype, **tuning.OPTIONS, **config.all_kwargs(),
            )
        return add_partial_sums(grads), partial_norms, add_partial_sums(seconds)

    sizes = (tuning.bucket(samples), height, width, *weight_shape, *stride, *dilation, groups)
    types = (a.stride(1) == 1, a.dtype, b.dtype, rounding, a.device)
    key = ("conv", *sizes, *types, grad, second, norms)
    return tuning.launch(key, configurations(dtype, rounding), run, fixed)


def configurations(dtype: tl.dtype, rounding: str) -> list[Config]:
    """For a type that products are formed in."""
    return tuning.by_precision(dtype, rounding, CONV, CONV_TF32, CONV_IEEE)
