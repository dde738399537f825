"""Triton kernels for a matrix that multiplies its input: weight gradient and moments in one pass, and norms without the gradient.

Legend: N samples, T positions, I in, O out. G_n = Σ_t b_nt a_ntᵀ [O, I]. Products in the inputs' type, sums in float32.
Inputs may be strided in any way and are never copied; offsets are 64 bits wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels import reference
from adabatch.kernels.chunks import outer_form
from adabatch.kernels.triton_gram import gram_norms, row_norms_product
from adabatch.kernels.triton_sums import add_partial_sums, partial_sums, store_tile
from adabatch.kernels.triton_tuning import OPTIONS, bucket, compute_type, follows_determinism, launch, major, precision, split_samples, supports

__all__ = ["outer_second_moment", "outer_sq_norms", "preconditioned_trace", "weight_grad_moments"]


def _config(block_o: int, block_i: int, block_t: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": block_t}, num_warps=warps, num_stages=stages)


# Each running tile takes registers beside the sample's own: 128 × 128 with 8 warps holds two without spilling, not three.
# What spilled on sm_80 or sm_90 is not in these lists.
TWO_TILES = [_config(128, 128, 32, 8, 3), _config(128, 64, 32, 8, 4), _config(64, 64, 32, 4, 4), _config(32, 32, 32, 4, 3)]
THREE_TILES = [_config(128, 64, 32, 8, 4), _config(64, 128, 32, 8, 4), _config(64, 64, 32, 4, 4), _config(32, 32, 32, 4, 3)]
# From Hopper on, operands are read from shared memory: longer steps cost no registers.
HOPPER = {2: [_config(128, 128, 64, 8, 4), _config(128, 128, 64, 8, 3)], 3: [_config(128, 64, 64, 8, 4)]}
TF32 = [_config(128, 64, 32, 8, 3), _config(64, 64, 32, 8, 3), _config(32, 32, 32, 4, 3)]
# Without tensor cores the operands lie in registers too.
IEEE = [_config(64, 64, 16, 8, 2), _config(32, 64, 16, 4, 3), _config(32, 32, 16, 4, 2)]


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, p_ptr, grad_ptr, second_ptr, norms_ptr, n_samples, n_positions, width_in, width_out, samples_per_split,
    a_stride_n, a_stride_t, a_stride_i, b_stride_n, b_stride_t, b_stride_o, p_stride_o, p_stride_i,
    GRAD: tl.constexpr, SECOND: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of G_n summed over T in registers, then added to the tile of Σ_n G_n, squared into norms[tile, n] (times p if WEIGHTED) and into Σ_n G_n²."""
    tiles_o, tiles_i = tl.cdiv(width_out, BLOCK_O), tl.cdiv(width_in, BLOCK_I)
    tile = tl.program_id(0) % (tiles_o * tiles_i)
    split = tl.program_id(0) // (tiles_o * tiles_i)
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = (tile_i * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    inside = (o < width_out)[:, None] & (i < width_in)[None, :]
    first = split * samples_per_split
    a_offsets = t[:, None].to(tl.int64) * a_stride_t + i[None, :] * a_stride_i
    b_offsets = t[:, None].to(tl.int64) * b_stride_t + o[None, :] * b_stride_o
    a_sample = a_ptr + first.to(tl.int64) * a_stride_n
    b_sample = b_ptr + first.to(tl.int64) * b_stride_n
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if WEIGHTED:
        p = tl.load(p_ptr + o[:, None] * p_stride_o + i[None, :] * p_stride_i, mask=inside, other=0).to(tl.float32)
    for n in range(first, tl.minimum(first + samples_per_split, n_samples)):
        a_ptrs, b_ptrs = a_sample + a_offsets, b_sample + b_offsets
        sample = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, n_positions, BLOCK_T):
            left = (t < n_positions - start)[:, None]
            a = tl.load(a_ptrs, mask=left & (i < width_in)[None, :], other=0).to(DTYPE)
            b = tl.load(b_ptrs, mask=left & (o < width_out)[None, :], other=0).to(DTYPE)
            sample = tl.dot(tl.trans(b), a, sample, input_precision=PRECISION)
            a_ptrs += tl.full((), BLOCK_T, tl.int64) * a_stride_t
            b_ptrs += tl.full((), BLOCK_T, tl.int64) * b_stride_t
        if GRAD:
            grad += sample
        if SECOND:
            second += sample * sample
        if NORMS:
            tl.store(norms_ptr + tile.to(tl.int64) * n_samples + n, tl.sum(sample * sample * p if WEIGHTED else sample * sample))
        a_sample += a_stride_n
        b_sample += b_stride_n
    offsets = o[:, None] * width_in + i[None, :]
    place = split.to(tl.int64) * width_out * width_in
    store_tile(grad_ptr, grad, offsets, inside, place, GRAD, ATOMIC)
    store_tile(second_ptr, second, offsets, inside, place, SECOND, ATOMIC)


def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False, deterministic: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As reference.weight_grad_moments, on the GPU, in one pass; [N, O, I] never exists.

    T = 1: the samples are the positions of one product, and the norms come from one pass over both inputs.
    """
    if not supports(activations, backprops):
        return reference.weight_grad_moments(activations, backprops, second_moment=second_moment, deterministic=deterministic)
    if activations.shape[1] == 1:
        grad, _, _ = _materialised(activations.transpose(0, 1), backprops.transpose(0, 1), grad=True, deterministic=deterministic)
        return grad, row_norms_product(activations, backprops), outer_second_moment(activations, backprops) if second_moment else None
    grad, partial_norms, second = _materialised(activations, backprops, grad=True, second=second_moment, norms=True, deterministic=deterministic)
    return grad, partial_norms.sum(0), second if second_moment else None


def outer_sq_norms(activations: Tensor, backprops: Tensor) -> Tensor:
    """As reference.outer_sq_norms, on the GPU: T = 1 in one memory-bound pass; else the Gram form, of which symmetry halves the work, or a tile of G_n."""
    if not supports(activations, backprops):
        return reference.outer_sq_norms(activations, backprops)
    positions, width_in, width_out = activations.shape[1], activations.shape[2], backprops.shape[2]
    form = outer_form(positions, width_in, width_out, halved=True)
    if form == "rows":
        return row_norms_product(activations, backprops)
    if form == "gram":
        return gram_norms(activations, backprops)
    return _materialised(activations, backprops, norms=True)[1].sum(0)


def outer_second_moment(activations: Tensor, backprops: Tensor) -> Tensor:
    """As reference.outer_second_moment, on the GPU."""
    if not supports(activations, backprops):
        return reference.outer_second_moment(activations, backprops)
    if activations.shape[1] == 1:
        return backprops[:, 0].float().square().T @ activations[:, 0].float().square()
    return _materialised(activations, backprops, second=True)[2]


def preconditioned_trace(activations: Tensor, backprops: Tensor, preconditioner: Tensor) -> Tensor:
    """As reference.preconditioned_trace, on the GPU: the second moment is never stored."""
    if not supports(activations, backprops, preconditioner):
        return reference.preconditioned_trace(activations, backprops, preconditioner)
    if activations.shape[1] == 1:
        return ((backprops[:, 0].float().square() @ preconditioner.float()) * activations[:, 0].float().square()).sum()
    return _materialised(activations, backprops, preconditioner, norms=True)[1].sum()


def _materialised(
    a: Tensor, b: Tensor, preconditioner: Tensor | None = None,
    *, grad: bool = False, second: bool = False, norms: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What is asked for of (weight gradient [O, I], norms by tile [tiles, N], second moment [O, I]); what is not is an empty tensor."""
    samples, positions, width_in, width_out = *a.shape, b.shape[2]
    fixed = follows_determinism(deterministic)
    dtype = compute_type(a, b)
    rounding = precision(dtype)
    empty = a.new_empty(0, dtype=torch.float32)
    p, p_strides = (empty, (0, 0)) if preconditioner is None else (preconditioner, preconditioner.stride())

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles = triton.cdiv(width_out, config.kwargs["BLOCK_O"]) * triton.cdiv(width_in, config.kwargs["BLOCK_I"])
        per_split, splits = split_samples(samples, tiles, a.device)
        atomic = splits > 1 and not fixed
        grads, seconds = (partial_sums(empty, wanted, (width_out, width_in), splits, atomic) for wanted in (grad, second))
        partial_norms = empty.new_empty(tiles, samples) if norms else empty
        if tiles * splits:
            weight_grad_kernel[(tiles * splits,)](
                a, b, p, grads, seconds, partial_norms, samples, positions, width_in, width_out, per_split, *a.stride(), *b.stride(), *p_strides,
                GRAD=grad, SECOND=second, NORMS=norms, WEIGHTED=preconditioner is not None, ATOMIC=atomic, PRECISION=rounding, DTYPE=dtype,
                **OPTIONS, **config.all_kwargs(),
            )  # fmt: skip
        return add_partial_sums(grads), partial_norms, add_partial_sums(seconds)

    configs = configurations(dtype, rounding, grad + second + (preconditioner is not None) + 1, major(a.device))
    key = ("outer", bucket(samples), bucket(positions), width_in, width_out, a.dtype, b.dtype, rounding, grad, second, norms, preconditioner is None, a.device)
    return launch(key, configs, run, fixed)


def configurations(dtype: tl.dtype, rounding: str, tiles: int, architecture: int) -> list[Config]:
    """The written-down configurations for a type that products are formed in, a number of tiles held in registers and a major compute capability."""
    if dtype == tl.float32:
        return IEEE if rounding == "ieee" else TF32
    tiles = max(2, tiles)
    return [*(HOPPER[tiles] if architecture >= 9 else ()), *(TWO_TILES if tiles == 2 else THREE_TILES)]
