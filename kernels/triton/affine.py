"""Triton kernel for the scale and shift of normalization layers.

Legend: N samples, T positions, P elements of the scale. G_n = Σ_t b_nt ∘ x̂_nt for the scale,
Σ_t b_nt for the shift. Inputs may be strided in any way: channels first is the view [N, S, C] of
[N, C, S]. They are read once; the product is never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels.operators import implements
from adabatch.kernels.reference_affine import check_statistics
from adabatch.kernels.triton import tuning
from adabatch.kernels.triton.tuning import bucket, config

# Configurations that spilled on sm_80 or sm_90 are not in this list.
AFFINE = [
    config(4, T=32, P=64), config(4, T=1, P=1024), config(8, T=64, P=32), config(8, T=8, P=256),
    config(1, T=4, P=16),
]
# With fewer positions in a split, its sums, 8 bytes an element, would be noticeable.
SHORTEST_SPLIT = 64
ABSENT, PER_POSITION, PER_ELEMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_statistic(ptr, t, p, t_inside, p_inside, stride_t, stride_p, KIND: tl.constexpr):
    """[BLOCK_T, 1] or [1, BLOCK_P]."""
    if KIND == PER_POSITION:
        return tl.load(ptr + t * stride_t, mask=t_inside, other=0).to(tl.float32)[:, None]
    else:
        return tl.load(ptr + p * stride_p, mask=p_inside, other=0).to(tl.float32)[None, :]


@triton.jit
def affine_kernel(
    a_ptr, b_ptr, mean_ptr, rstd_ptr, scale_ptr, shift_ptr,
    n_samples, n_positions, width, positions_per_split,
    a_stride_n, a_stride_t, a_stride_p, b_stride_n, b_stride_t, b_stride_p,
    mean_stride_n, mean_stride_t, mean_stride_p, rstd_stride_n, rstd_stride_t, rstd_stride_p,
    MEAN: tl.constexpr, RSTD: tl.constexpr, SQUARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """SQUARED: norms by block of elements into [blocks, N]; else the sums over this split's
    positions into [splits, N, P], to be squared when complete."""
    blocks = tl.cdiv(width, BLOCK_P)
    block = tl.program_id(0) % blocks
    n = ((tl.program_id(0) // blocks) % n_samples).to(tl.int64)
    split = tl.program_id(0) // blocks // n_samples
    p = (block * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    a_row = a_ptr + n * a_stride_n + p[None, :] * a_stride_p
    b_row = b_ptr + n * b_stride_n + p[None, :] * b_stride_p
    mean_row, rstd_row = mean_ptr + n * mean_stride_n, rstd_ptr + n * rstd_stride_n
    scale = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    shift = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    p_in = p < width
    end = tl.minimum(split * positions_per_split + positions_per_split, n_positions)
    for start in range(split * positions_per_split, end, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (t < end)[:, None] & p_in[None, :]
        x = tl.load(a_row + t[:, None] * a_stride_t, mask=inside, other=0).to(tl.float32)
        b = tl.load(b_row + t[:, None] * b_stride_t, mask=inside, other=0).to(tl.float32)
        if MEAN != ABSENT:
            x -= load_statistic(mean_row, t, p, t < end, p_in, mean_stride_t, mean_stride_p, MEAN)
        if RSTD != ABSENT:
            x *= load_statistic(rstd_row, t, p, t < end, p_in, rstd_stride_t, rstd_stride_p, RSTD)
        scale += x * b
        shift += b
    scale_P, shift_P = tl.sum(scale, 0), tl.sum(shift, 0)
    if SQUARED:
        tl.store(scale_ptr + block.to(tl.int64) * n_samples + n, tl.sum(scale_P * scale_P))
        tl.store(shift_ptr + block.to(tl.int64) * n_samples + n, tl.sum(shift_P * shift_P))
    else:
        offsets = (split.to(tl.int64) * n_samples + n) * width + p
        tl.store(scale_ptr + offsets, scale_P, mask=p_in)
        tl.store(shift_ptr + offsets, shift_P, mask=p_in)


@implements("triton", tuning.supports)
def affine_sq_norms(
    activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pass over both inputs; positions are split over programs where samples are few."""
    check_statistics(activations, mean, rstd)
    (samples, positions, width), device = activations.shape, activations.device

    def run(config: Config) -> tuple[Tensor, Tensor]:
        blocks = triton.cdiv(width, config.kwargs["BLOCK_P"])
        programs = blocks * samples
        per_split, splits = tuning.split_positions(positions, programs, SHORTEST_SPLIT, device)
        shape = (2, blocks, samples) if splits == 1 else (2, splits, samples, width)
        out = activations.new_empty(shape, dtype=torch.float32)
        if programs:
            statistics = (activations if value is None else value for value in (mean, rstd))
            affine_kernel[(programs * splits,)](
                activations, backprops, *statistics, out[0], out[1],
                samples, positions, width, per_split,
                *activations.stride(), *backprops.stride(), *_strides(mean), *_strides(rstd),
                MEAN=_kind(mean), RSTD=_kind(rstd), SQUARED=splits == 1,
                **tuning.OPTIONS, **config.all_kwargs(),
            )
        norms = out.sum(1) if splits == 1 else out.sum(1).square_().sum(2)
        return norms[0], norms[1].clone()  # an operator's results must not share memory

    types = (activations.dtype, backprops.dtype, activations.stride(2) == 1)
    sizes = (bucket(samples), bucket(positions), width)
    key = ("affine", *sizes, *types, _kind(mean), _kind(rstd), device)
    return tuning.launch(key, configurations(positions), run)


def configurations(positions: int) -> list[Config]:
    """Those whose blocks are not mostly empty; the smallest is always among them."""
    return [c for c in AFFINE[:-1] if c.kwargs["BLOCK_T"] < 2 * positions] + AFFINE[-1:]


def _strides(statistic: Tensor | None) -> tuple[int, ...]:
    """Strides for indexing as [N, T, P]."""
    if statistic is None:
        return (0, 0, 0)
    pairs = zip(statistic.shape, statistic.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def _kind(statistic: Tensor | None) -> int:
    if statistic is None:
        return ABSENT.value
    return (PER_POSITION if statistic.shape[2] == 1 else PER_ELEMENT).value
