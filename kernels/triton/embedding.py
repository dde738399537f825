"""Triton kernel for the norms of an embedding's gradient.

Legend: N samples, T positions, D embedding width. ‖G_n‖² = Σ_v ‖Σ_{t: id_nt = v} b_nt‖².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels.operators import implements
from adabatch.kernels.triton import tuning
from adabatch.kernels.triton.gram import gram_norms
from adabatch.kernels.triton.tuning import INTERPRETED, bucket, config, launch

# Up to here the Gram form takes no longer than reading b (with tensor cores, without), and sorting
# would cost more. The interpreter starts to sort early, so that it runs both forms.
LONGEST_GRAM, LONGEST_GRAM_IEEE = (8, 8) if INTERPRETED else (512, 64)
SHORTEST_SPLIT = 8 if INTERPRETED else 128
# Configurations that spilled on sm_80 or sm_90 are not in these lists.
RUNS = [
    config(4, T=32, D=128), config(8, T=64, D=64), config(8, T=16, D=256), config(1, T=16, D=16)
]
RUNS_IEEE = [config(4, T=32, D=128), config(4, T=16, D=256), config(1, T=16, D=16)]


@triton.jit
def runs_kernel(
    ids_ptr, order_ptr, b_ptr, norms_ptr, n_samples, n_positions, width, n_splits,
    positions_per_split, b_stride_n, b_stride_t, b_stride_d,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """norms[split, block of D, n]: Σ ‖Σ over a run of equal ids of b‖², for the runs of the sorted
    ids that start within the split's positions.

    Within a block of positions Σ_t b_t · (sum of its run's b in the block); a run that continues
    meets its sum so far, the carry: ‖c + s‖² = ‖c‖² + 2 c·s + ‖s‖².
    """
    blocks = tl.cdiv(width, BLOCK_D)
    block = tl.program_id(0) % blocks
    split = (tl.program_id(0) // blocks) % n_splits
    n = (tl.program_id(0) // blocks // n_splits).to(tl.int64)
    d = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    ids_row, order_row = ids_ptr + n * n_positions, order_ptr + n * n_positions
    b_row = b_ptr + n * b_stride_n + d[None, :] * b_stride_d
    cursor = split * positions_per_split
    end = tl.minimum(cursor + positions_per_split, n_positions)
    # A run that started in the split before is finished there; ours may end beyond our positions.
    before = tl.load(ids_row + cursor - 1, mask=cursor > 0, other=-1)
    final = tl.load(ids_row + end - 1)
    carry_id = tl.full((), -1, tl.int64)
    carry = tl.zeros((BLOCK_D,), tl.float32)
    norm = 0.0
    going = cursor < end
    while going:
        t = cursor + tl.arange(0, BLOCK_T)
        id_t = tl.load(ids_row + t, mask=t < n_positions, other=-1)
        ours = (t < n_positions) & ((t < end) | (id_t == final)) & (id_t != before)
        rows = tl.load(order_row + t, mask=ours, other=0)
        inside = ours[:, None] & (d < width)[None, :]
        b = tl.load(b_row + rows[:, None] * b_stride_t, mask=inside, other=0).to(tl.float32)
        equal = (id_t[:, None] == id_t[None, :]).to(DTYPE)
        norm += tl.sum(b * tl.dot(equal, b.to(DTYPE), input_precision=PRECISION))
        norm += 2 * tl.sum(carry * tl.sum(tl.where((id_t == carry_id)[:, None], b, 0.0), 0))
        last_id = tl.max(tl.where(ours, id_t, -1), 0)
        carry = tl.where(last_id == carry_id, carry, 0.0)
        carry += tl.sum(tl.where((id_t == last_id)[:, None], b, 0.0), 0)
        carry_id = last_id
        cursor += BLOCK_T
        following = tl.load(ids_row + cursor, mask=cursor < n_positions, other=-1)
        going = (cursor < end) | ((following == final) & (final != before))
    tl.store(norms_ptr + (split * blocks + block).to(tl.int64) * n_samples + n, norm)


@implements("triton", lambda ids, b: tuning.supports(b) and b.shape[1] > 1)
def embedding_sq_norms(ids: Tensor, backprops: Tensor) -> Tensor:
    """Short samples by Gram products of b where ids are equal, long ones by sorting; [N, T, T]
    never exists."""
    (samples, positions, width), device = backprops.shape, backprops.device
    dtype = tuning.compute_type(backprops)
    rounding = tuning.precision(dtype)
    if positions <= (LONGEST_GRAM_IEEE if rounding == "ieee" else LONGEST_GRAM):
        return gram_norms(ids, backprops)
    sorted_ids, order = (each.contiguous() for each in ids.long().sort(dim=1, stable=True))

    def run(config: Config) -> Tensor:
        blocks = triton.cdiv(width, config.kwargs["BLOCK_D"])
        programs = blocks * samples
        per_split, splits = tuning.split_positions(positions, programs, SHORTEST_SPLIT, device)
        norms = backprops.new_empty(splits * blocks, samples, dtype=torch.float32)
        if norms.numel():
            runs_kernel[(norms.numel(),)](
                sorted_ids, order, backprops, norms, samples, positions, width, splits, per_split,
                *backprops.stride(), PRECISION=rounding, DTYPE=dtype,
                **tuning.OPTIONS, **config.all_kwargs(),
            )
        return norms.sum(0)

    sizes = (bucket(samples), bucket(positions), width)
    key = ("runs", *sizes, backprops.dtype, rounding, device)
    return launch(key, configurations(dtype, rounding), run)


def configurations(dtype: tl.dtype, rounding: str) -> list[Config]:
    """For a type that products are formed in."""
    return tuning.by_precision(dtype, rounding, RUNS, RUNS, RUNS_IEEE)
