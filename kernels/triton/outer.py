"""Triton kernels for a matrix that multiplies its input: weight gradient and moments in one pass,
and norms without the gradient.

Legend: N samples, T positions, I in, O out. G_n = Σ_t b_nt a_ntᵀ [O, I]. Products in the inputs'
type, sums in float32. Inputs may be strided in any way and are never copied; offsets are 64 bits
wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels.operators import follows_determinism, implements, outer_form
from adabatch.kernels.triton import tuning
from adabatch.kernels.triton.gram import gram_norms, row_norms_product
from adabatch.kernels.triton.tuning import bucket, config

# Each running tile takes registers besides the sample's: 128 × 128 with 8 warps holds two without
# spilling, not three. Configurations that spilled on sm_80 or sm_90 are not in these lists.
TWO_TILES = [
    config(8, 3, O=128, I=128, T=32), config(8, 4, O=128, I=64, T=32),
    config(4, 4, O=64, I=64, T=32), config(4, 3, O=32, I=32, T=32),
]
THREE_TILES = [
    config(8, 4, O=128, I=64, T=32), config(8, 4, O=64, I=128, T=32),
    config(4, 4, O=64, I=64, T=32), config(4, 3, O=32, I=32, T=32),
]
# From Hopper on, operands are read from shared memory: longer steps cost no registers.
HOPPER = {
    2: [config(8, 4, O=128, I=128, T=64), config(8, 3, O=128, I=128, T=64)],
    3: [config(8, 4, O=128, I=64, T=64)],
}
TF32 = [
    config(8, 3, O=128, I=64, T=32), config(8, 3, O=64, I=64, T=32), config(4, 3, O=32, I=32, T=32)
]
# Without tensor cores the operands lie in registers too.
IEEE = [
    config(8, 2, O=64, I=64, T=16), config(4, 3, O=32, I=64, T=16), config(4, 2, O=32, I=32, T=16)
]


@triton.jit
def store_tile(ptr, tile, offsets, inside, place, WANTED: tl.constexpr, ATOMIC: tl.constexpr):
    """A program's tile, stored at its split's place, or added atomically to the one place."""
    if WANTED:
        if ATOMIC:
            tl.atomic_add(ptr + offsets, tile, mask=inside, sem="relaxed")
        else:
            tl.store(ptr + place + offsets, tile, mask=inside)


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, p_ptr, grad_ptr, second_ptr, norms_ptr,
    n_samples, n_positions, width_in, width_out, samples_per_split,
    a_stride_n, a_stride_t, a_stride_i, b_stride_n, b_stride_t, b_stride_o, p_stride_o, p_stride_i,
    GRAD: tl.constexpr, SECOND: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """A tile of G_n summed over T in registers, then added to the tile of Σ_n G_n, squared into
    norms[tile, n] (times p if WEIGHTED) and into Σ_n G_n²."""
    tiles_o, tiles_i = tl.cdiv(width_out, BLOCK_O), tl.cdiv(width_in, BLOCK_I)
    tile = tl.program_id(0) % (tiles_o * tiles_i)
    split = tl.program_id(0) // (tiles_o * tiles_i)
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = (tile_i * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    o_in, i_in = (o < width_out)[None, :], (i < width_in)[None, :]
    inside = (o < width_out)[:, None] & i_in
    first = split * samples_per_split
    a_offsets = t[:, None].to(tl.int64) * a_stride_t + i[None, :] * a_stride_i
    b_offsets = t[:, None].to(tl.int64) * b_stride_t + o[None, :] * b_stride_o
    a_sample = a_ptr + first.to(tl.int64) * a_stride_n
    b_sample = b_ptr + first.to(tl.int64) * b_stride_n
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if WEIGHTED:
        p_ptrs = p_ptr + o[:, None] * p_stride_o + i[None, :] * p_stride_i
        p = tl.load(p_ptrs, mask=inside, other=0).to(tl.float32)
    for n in range(first, tl.minimum(first + samples_per_split, n_samples)):
        a_ptrs, b_ptrs = a_sample + a_offsets, b_sample + b_offsets
        sample = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, n_positions, BLOCK_T):
            left = (t < n_positions - start)[:, None]
            a = tl.load(a_ptrs, mask=left & i_in, other=0).to(DTYPE)
            b = tl.load(b_ptrs, mask=left & o_in, other=0).to(DTYPE)
            sample = tl.dot(tl.trans(b), a, sample, input_precision=PRECISION)
            a_ptrs += tl.full((), BLOCK_T, tl.int64) * a_stride_t
            b_ptrs += tl.full((), BLOCK_T, tl.int64) * b_stride_t
        if GRAD:
            grad += sample
        if SECOND:
            second += sample * sample
        if NORMS:
            squares = sample * sample * p if WEIGHTED else sample * sample
            tl.store(norms_ptr + tile.to(tl.int64) * n_samples + n, tl.sum(squares))
        a_sample += a_stride_n
        b_sample += b_stride_n
    offsets = o[:, None] * width_in + i[None, :]
    place = split.to(tl.int64) * width_out * width_in
    store_tile(grad_ptr, grad, offsets, inside, place, GRAD, ATOMIC)
    store_tile(second_ptr, second, offsets, inside, place, SECOND, ATOMIC)


@implements("triton", tuning.supports)
def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass; [N, O, I] never exists. T = 1: the samples are the positions of one product, and
    the norms come from one pass over both inputs."""
    a, b = activations, backprops
    if a.shape[1] == 1:
        columns = a.transpose(0, 1), b.transpose(0, 1)
        grad = materialised(*columns, grad=True, deterministic=deterministic)[0]
        return grad, row_norms_product(a, b), outer_second_moment(a, b) if second_moment else None
    grad, partial_norms, second = materialised(
        a, b, grad=True, second=second_moment, norms=True, deterministic=deterministic
    )
    return grad, partial_norms.sum(0), second if second_moment else None


@implements("triton", tuning.supports)
def outer_sq_norms(activations: Tensor, backprops: Tensor) -> Tensor:
    """T = 1 in one memory-bound pass; else the Gram form, of which symmetry halves the work, or a
    tile of G_n at a time."""
    positions, width_in, width_out = activations.shape[1], activations.shape[2], backprops.shape[2]
    form = outer_form(positions, width_in, width_out, halved=True)
    if form == "rows":
        return row_norms_product(activations, backprops)
    if form == "gram":
        return gram_norms(activations, backprops)
    return materialised(activations, backprops, norms=True)[1].sum(0)


@implements("triton", tuning.supports)
def outer_second_moment(activations: Tensor, backprops: Tensor) -> Tensor:
    """T = 1 by torch's product of squares."""
    if activations.shape[1] == 1:
        return backprops[:, 0].float().square().T @ activations[:, 0].float().square()
    return materialised(activations, backprops, second=True)[2]


@implements("triton", tuning.supports)
def preconditioned_trace(activations: Tensor, backprops: Tensor, preconditioner: Tensor) -> Tensor:
    """The second moment is never stored."""
    if activations.shape[1] == 1:
        weighted = backprops[:, 0].float().square() @ preconditioner.float()
        return (weighted * activations[:, 0].float().square()).sum()
    return materialised(activations, backprops, preconditioner, norms=True)[1].sum()


def materialised(
    a: Tensor, b: Tensor, preconditioner: Tensor | None = None, *, grad: bool = False,
    second: bool = False, norms: bool = False, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is wanted of (weight gradient [O, I], norms by tile [tiles, N], second moment [O, I]),
    the rest being empty tensors."""
    samples, positions, width_in, width_out = *a.shape, b.shape[2]
    fixed, dtype = follows_determinism(deterministic), tuning.compute_type(a, b)
    rounding, weighted = tuning.precision(dtype), preconditioner is not None
    empty = a.new_empty(0, dtype=torch.float32)
    p = empty.expand(0, 0) if preconditioner is None else preconditioner

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        blocks = config.kwargs
        tiles = triton.cdiv(width_out, blocks["BLOCK_O"]) * triton.cdiv(width_in, blocks["BLOCK_I"])
        per_split, splits = tuning.split_samples(samples, tiles, a.device)
        atomic = splits > 1 and not fixed
        grads = partial_sums(empty, grad, (width_out, width_in), splits, atomic)
        seconds = partial_sums(empty, second, (width_out, width_in), splits, atomic)
        partial_norms = empty.new_empty(tiles, samples) if norms else empty
        if tiles * splits:
            weight_grad_kernel[(tiles * splits,)](
                a, b, p, grads, seconds, partial_norms,
                samples, positions, width_in, width_out, per_split,
                *a.stride(), *b.stride(), *p.stride(),
                GRAD=grad, SECOND=second, NORMS=norms, WEIGHTED=weighted, ATOMIC=atomic,
                PRECISION=rounding, DTYPE=dtype, **tuning.OPTIONS, **config.all_kwargs(),
            )
        return add_partial_sums(grads), partial_norms, add_partial_sums(seconds)

    configs = configurations(dtype, rounding, grad + second + weighted + 1, tuning.major(a.device))
    sizes = (bucket(samples), bucket(positions), width_in, width_out)
    key = ("outer", *sizes, a.dtype, b.dtype, rounding, grad, second, norms, weighted, a.device)
    return tuning.launch(key, configs, run, fixed)


def configurations(dtype: tl.dtype, rounding: str, tiles: int, architecture: int) -> list[Config]:
    """For a type that products are formed in, a number of tiles held in registers and a major
    compute capability."""
    if dtype == tl.float32:
        return IEEE if rounding == "ieee" else TF32
    hopper = HOPPER[max(2, tiles)] if architecture >= 9 else []
    return [*hopper, *(TWO_TILES if tiles <= 2 else THREE_TILES)]


def partial_sums(
    empty: Tensor, wanted: bool, shape: Sequence[int], splits: int, atomic: bool
) -> Tensor:
    """Memory for store_tile: zeros [1, *shape] to add to, or [splits, *shape] to be written once
    each; `empty` if nothing is wanted."""
    if not wanted:
        return empty
    return empty.new_zeros(1, *shape) if atomic else empty.new_empty(splits, *shape)


def add_partial_sums(sums: Tensor) -> Tensor:
    """Σ over the splits, in their order; without a sample there are no splits, and the sum is 0."""
    return sums if sums.dim() == 1 else sums[0] if sums.shape[0] == 1 else sums.sum(0)
