"""Triton kernel for the weight of a two-dimensional convolution: weight gradient and moments in one pass, as an implicit product; nothing is unfolded.

Legend: N samples, C channels in, O channels out, H × W positions in, P positions out, KH × KW kernel, g groups, J = KH·KW·C/g elements that one output reads.
G_n[o, c, kh, kw] = Σ_p b_n[o, p] a_n[c, p·stride + k·dilation − padding]. Any strides, channels last among them; offsets are 64 bits wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels import reference
from adabatch.kernels.triton_outer import outer_second_moment, outer_sq_norms, weight_grad_moments
from adabatch.kernels.triton_sums import add_partial_sums, partial_sums, store_tile
from adabatch.kernels.triton_tuning import OPTIONS, bucket, compute_type, follows_determinism, launch, precision, split_samples, supports

__all__ = ["conv_second_moment", "conv_sq_norms", "conv_weight_grad_moments"]


def _config(block_o: int, block_j: int, block_p: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_O": block_o, "BLOCK_J": block_j, "BLOCK_P": block_p}, num_warps=warps, num_stages=stages)


# What spilled on sm_80 or sm_90 is not in these lists.
CONV = [
    _config(64, 64, 32, 8, 3), _config(128, 64, 32, 8, 3), _config(64, 64, 16, 4, 3), _config(64, 32, 32, 4, 2), _config(32, 64, 32, 4, 2),
    _config(16, 16, 32, 4, 2),
]  # fmt: skip
CONV_TF32 = [_config(64, 64, 32, 8, 3), _config(32, 64, 32, 4, 3), _config(16, 16, 32, 4, 2)]
CONV_IEEE = [_config(32, 64, 16, 4, 2), _config(32, 32, 16, 4, 2), _config(16, 16, 16, 4, 2)]


@triton.jit
def conv_kernel(
    a_ptr, b_ptr, grad_ptr, second_ptr, norms_ptr, n_samples, height, width, n_positions, width_out, channels, outs, n_groups, samples_per_split,
    a_stride_n, a_stride_c, a_stride_h, a_stride_w, b_stride_n, b_stride_o, b_stride_h, b_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GRAD: tl.constexpr, SECOND: tl.constexpr, NORMS: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """As weight_grad_kernel, a tile of one group's [O/g, J] per program; `channels` and `outs` are of a group.

    J runs over channels fastest, so that activations with channels last are read in rows.
    """
    reach = channels * KH * KW
    tiles_o, tiles_j = tl.cdiv(outs, BLOCK_O), tl.cdiv(reach, BLOCK_J)
    tile = tl.program_id(0) % (n_groups * tiles_o * tiles_j)
    split = tl.program_id(0) // (n_groups * tiles_o * tiles_j)
    group = tile // (tiles_o * tiles_j)
    o = (tile // tiles_j % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    j = (tile % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    c, k = j % channels, j // channels
    row = (group * outs + o).to(tl.int64)
    o_inside, j_inside = (o < outs)[None, :], (j < reach)[None, :]
    a_sample = a_ptr + (split * samples_per_split).to(tl.int64) * a_stride_n + (group * channels + c)[None, :].to(tl.int64) * a_stride_c
    b_sample = b_ptr + (split * samples_per_split).to(tl.int64) * b_stride_n + row[None, :] * b_stride_o
    grad = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    for n in range(split * samples_per_split, tl.minimum(split * samples_per_split + samples_per_split, n_samples)):
        sample = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
        for start in range(0, n_positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            y, x = (p // width_out)[:, None], (p % width_out)[:, None]
            h = y * STRIDE_H + (k // KW * DILATION_H - PAD_H)[None, :]
            w = x * STRIDE_W + (k % KW * DILATION_W - PAD_W)[None, :]
            inside = (p < n_positions)[:, None] & j_inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            a = tl.load(a_sample + h.to(tl.int64) * a_stride_h + w.to(tl.int64) * a_stride_w, mask=inside, other=0).to(DTYPE)
            b_ptrs = b_sample + y.to(tl.int64) * b_stride_h + x.to(tl.int64) * b_stride_w
            b = tl.load(b_ptrs, mask=(p < n_positions)[:, None] & o_inside, other=0).to(DTYPE)
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
    inside = (o < outs)[:, None] & j_inside
    place = split.to(tl.int64) * outs * n_groups * reach
    store_tile(grad_ptr, grad, offsets, inside, place, GRAD, ATOMIC)
    store_tile(second_ptr, second, offsets, inside, place, SECOND, ATOMIC)


def conv_weight_grad_moments(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    second_moment: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As reference.conv_weight_grad_moments, on the GPU: one and two dimensions; three are left to the definition."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if not _takes(activations, backprops):
        definition = reference.conv_weight_grad_moments
        return definition(activations, backprops, weight_shape, *geometry, second_moment=second_moment, deterministic=deterministic)
    if (views := _as_matrix(activations, backprops, weight_shape, *geometry)) is not None:
        grad, norms, second = weight_grad_moments(*views, second_moment=second_moment, deterministic=deterministic)
    else:
        grad, partial_norms, second = _implicit(
            activations, backprops, weight_shape, *geometry, grad=True, second=second_moment, norms=True, deterministic=deterministic
        )
        norms = partial_norms.sum(0)
    return grad.view(tuple(weight_shape)), norms, second.view(tuple(weight_shape)) if second_moment else None


def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """As reference.conv_sq_norms, on the GPU."""
    if not _takes(activations, backprops):
        return reference.conv_sq_norms(activations, backprops, weight_shape, stride, padding, dilation, groups)
    if (views := _as_matrix(activations, backprops, weight_shape, stride, padding, dilation, groups)) is not None:
        return outer_sq_norms(*views)
    return _implicit(activations, backprops, weight_shape, stride, padding, dilation, groups, norms=True)[1].sum(0)


def conv_second_moment(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """As reference.conv_second_moment, on the GPU."""
    if not _takes(activations, backprops):
        return reference.conv_second_moment(activations, backprops, weight_shape, stride, padding, dilation, groups)
    if (views := _as_matrix(activations, backprops, weight_shape, stride, padding, dilation, groups)) is not None:
        return outer_second_moment(*views).view(tuple(weight_shape))
    return _implicit(activations, backprops, weight_shape, stride, padding, dilation, groups, second=True)[2].view(tuple(weight_shape))


def _takes(activations: Tensor, backprops: Tensor) -> bool:
    return supports(activations, backprops) and activations.dim() in (3, 4)


def _as_matrix(
    a: Tensor, b: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[Tensor, Tensor] | None:
    """A 1 × 1 convolution is a matrix that multiplies its input: the views [N, S, C] and [N, S, O]; None if it is none, or would have to be copied."""
    if groups != 1 or math.prod(weight_shape[2:]) != 1 or any(step != 1 for step in stride) or any(padding):
        return None
    if any(tensor.dim() == 4 and tensor.shape[3] > 1 and tensor.stride(2) != tensor.shape[3] * tensor.stride(3) for tensor in (a, b)):
        return None
    return a.flatten(2).mT, b.flatten(2).mT


def _implicit(
    a: Tensor, b: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    *, grad: bool = False, second: bool = False, norms: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What is asked for of (weight gradient, norms by tile [tiles, N], second moment); what is not is an empty tensor."""
    if a.dim() == 3:
        a, b, weight_shape = a.unsqueeze(2), b.unsqueeze(2), (*weight_shape[:2], 1, weight_shape[2])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    samples, _, height, width = a.shape
    (all_outs, channels, kh, kw), (height_out, width_out) = weight_shape, b.shape[2:]
    outs, fixed, dtype = all_outs // groups, follows_determinism(deterministic), compute_type(a, b)
    rounding = precision(dtype)
    empty = a.new_empty(0, dtype=torch.float32)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles = groups * triton.cdiv(outs, config.kwargs["BLOCK_O"]) * triton.cdiv(channels * kh * kw, config.kwargs["BLOCK_J"])
        per_split, splits = split_samples(samples, tiles, a.device)
        atomic = splits > 1 and not fixed
        grads, seconds = (partial_sums(empty, wanted, weight_shape, splits, atomic) for wanted in (grad, second))
        partial_norms = empty.new_empty(tiles, samples) if norms else empty
        if tiles * splits:
            conv_kernel[(tiles * splits,)](
                a, b, grads, seconds, partial_norms, samples, height, width, height_out * width_out, width_out, channels, outs, groups, per_split,
                *a.stride(), *b.stride(), KH=kh, KW=kw, STRIDE_H=stride[0], STRIDE_W=stride[1], PAD_H=padding[0], PAD_W=padding[1],
                DILATION_H=dilation[0], DILATION_W=dilation[1], GRAD=grad, SECOND=second, NORMS=norms, ATOMIC=atomic,
                PRECISION=rounding, DTYPE=dtype, **OPTIONS, **config.all_kwargs(),
            )  # fmt: skip
        return add_partial_sums(grads), partial_norms, add_partial_sums(seconds)

    sizes = (bucket(samples), height, width, *weight_shape, *stride, *dilation, groups)
    key = ("conv", *sizes, a.stride(1) == 1, a.dtype, b.dtype, rounding, grad, second, norms, a.device)
    return launch(key, configurations(dtype, rounding), run, fixed)


def configurations(dtype: tl.dtype, rounding: str) -> list[Config]:
    """The written-down configurations of conv_kernel for a type that products are formed in."""
    if dtype != tl.float32:
        return CONV
    return CONV_IEEE if rounding == "ieee" else CONV_TF32
