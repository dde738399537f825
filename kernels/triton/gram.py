"""Triton kernels for norms that need no gradient: Gram products, of activations or of equal ids,
and products of row norms.

Legend: N samples, T positions, I in, O out, D embedding width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from adabatch.kernels.triton.tuning import (
    OPTIONS, bucket, by_precision, compute_type, config, launch, precision,
)

# Configurations that spilled on sm_80 or sm_90 are not in these lists.
GRAM = [
    config(8, 3, T=128, K=64), config(8, 4, T=64, K=64), config(4, 3, T=32, K=64),
    config(1, 3, T=16, K=32),
]
GRAM_TF32 = [
    config(8, 3, T=128, K=32), config(8, 3, T=64, K=32), config(4, 3, T=32, K=32),
    config(1, 3, T=16, K=32),
]
GRAM_IEEE = [config(8, 3, T=64, K=16), config(4, 2, T=32, K=16), config(1, 2, T=16, K=16)]
ROWS = [config(4, N=1, K=2048), config(4, N=4, K=512), config(4, N=16, K=128), config(1, N=4, K=32)]


@triton.jit
def gram_tile(
    ptr, t, s, n_positions, width, stride_t, stride_k, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """x_t · x_s for the rows t and s of one sample."""
    k = tl.arange(0, BLOCK_K)
    t_ptrs = ptr + t[:, None].to(tl.int64) * stride_t + k[None, :].to(tl.int64) * stride_k
    s_ptrs = ptr + s[:, None].to(tl.int64) * stride_t + k[None, :].to(tl.int64) * stride_k
    product = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = (k < width - start)[None, :]
        x_t = tl.load(t_ptrs, mask=left & (t < n_positions)[:, None], other=0).to(DTYPE)
        x_s = tl.load(s_ptrs, mask=left & (s < n_positions)[:, None], other=0).to(DTYPE)
        product = tl.dot(x_t, tl.trans(x_s), product, input_precision=PRECISION)
        t_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_k
        s_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_k
    return product


@triton.jit
def gram_kernel(
    a_ptr, b_ptr, norms_ptr, n_samples, n_positions, width_in, width_out, n_pairs,
    a_stride_n, a_stride_t, a_stride_i, b_stride_n, b_stride_t, b_stride_o,
    IDS: tl.constexpr, A_PRECISION: tl.constexpr, A_DTYPE: tl.constexpr,
    B_PRECISION: tl.constexpr, B_DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """norms[pair, n] = Σ over a pair of blocks of positions of (a_t·a_s)(b_t·b_s); if IDS, a holds
    ids [N, T] and a_t·a_s is [id_t = id_s].

    Pairs are the lower triangle of blocks, those off the diagonal counted twice: Gram matrices are
    symmetric.
    """
    pair = tl.program_id(0) % n_pairs
    n = (tl.program_id(0) // n_pairs).to(tl.int64)
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # A float32 root may be one off.
    row -= (row * (row + 1) // 2 > pair).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= pair).to(tl.int32)
    column = pair - row * (row + 1) // 2
    t = row * BLOCK_T + tl.arange(0, BLOCK_T)
    s = column * BLOCK_T + tl.arange(0, BLOCK_T)
    a_sample, b_sample = a_ptr + n * a_stride_n, b_ptr + n * b_stride_n
    product = gram_tile(
        b_sample, t, s, n_positions, width_out, b_stride_t, b_stride_o,
        B_PRECISION, B_DTYPE, BLOCK_T, BLOCK_K,
    )
    if IDS:
        id_t = tl.load(a_sample + t.to(tl.int64) * a_stride_t, mask=t < n_positions, other=0)
        id_s = tl.load(a_sample + s.to(tl.int64) * a_stride_t, mask=s < n_positions, other=0)
        product = tl.where(id_t[:, None] == id_s[None, :], product, 0.0)
    else:
        product *= gram_tile(
            a_sample, t, s, n_positions, width_in, a_stride_t, a_stride_i,
            A_PRECISION, A_DTYPE, BLOCK_T, BLOCK_K,
        )
    norm = tl.sum(product) * tl.where(row == column, 1.0, 2.0)
    tl.store(norms_ptr + pair.to(tl.int64) * n_samples + n, norm)


@triton.jit
def row_norms_kernel(
    a_ptr, b_ptr, norms_ptr, n_samples, width_in, width_out,
    a_stride_n, a_stride_i, b_stride_n, b_stride_o, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """norms[n] = ‖a_n‖² ‖b_n‖²."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < n_samples
    a_rows, b_rows = a_ptr + n * a_stride_n, b_ptr + n * b_stride_n
    a_norms = sum_squares(a_rows, present, width_in, a_stride_i, BLOCK_N, BLOCK_K)
    b_norms = sum_squares(b_rows, present, width_out, b_stride_o, BLOCK_N, BLOCK_K)
    tl.store(norms_ptr + n, a_norms * b_norms, mask=present)


@triton.jit
def sum_squares(row_ptrs, present, width, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ_k x_k² of each row; columns are kept apart until the end, so that a step is loads and
    multiplications only."""
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        ptrs = row_ptrs[:, None] + k[None, :].to(tl.int64) * stride
        inside = present[:, None] & (k < width)[None, :]
        x = tl.load(ptrs, mask=inside, other=0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 1)


def gram_norms(a: Tensor, b: Tensor) -> Tensor:
    """Σ_{t,s} (a_nt·a_ns)(b_nt·b_ns), [N]; a is [N, T, I], or ids [N, T] with
    a_t·a_s = [id_t = id_s]. [N, T, T] never exists."""
    ids = a.dim() == 2
    samples, positions, width_out = b.shape
    width_in = 0 if ids else a.shape[2]
    b_type = compute_type(b)
    a_type = b_type if ids else compute_type(a)
    a_rounding, b_rounding = precision(a_type), precision(b_type)

    def run(config: Config) -> Tensor:
        blocks = triton.cdiv(positions, config.kwargs["BLOCK_T"])
        pairs = blocks * (blocks + 1) // 2
        partial_norms = b.new_empty(pairs, samples, dtype=torch.float32)
        if pairs * samples:
            gram_kernel[(pairs * samples,)](
                a, b, partial_norms, samples, positions, width_in, width_out, pairs,
                *a.stride(), *((0,) if ids else ()), *b.stride(), IDS=ids,
                A_PRECISION=a_rounding, A_DTYPE=a_type, B_PRECISION=b_rounding, B_DTYPE=b_type,
                **OPTIONS, **config.all_kwargs(),
            )
        return partial_norms[0] if pairs == 1 else partial_norms.sum(0)

    slower = (a_type, a_rounding) if a_type == tl.float32 else (b_type, b_rounding)
    sizes = (bucket(samples), bucket(positions), width_in, width_out)
    key = ("gram", *sizes, a.dtype, b.dtype, a_rounding, b_rounding, b.device)
    return launch(key, configurations(*slower), run)


def configurations(dtype: tl.dtype, rounding: str) -> list[Config]:
    """Of gram_kernel, for a type that products are formed in."""
    return by_precision(dtype, rounding, GRAM, GRAM_TF32, GRAM_IEEE)


def row_norms_product(a: Tensor, b: Tensor) -> Tensor:
    """‖a_n‖² ‖b_n‖² of [N, 1, I] and [N, 1, O], [N], in one pass over both."""
    samples, width_in, width_out = a.shape[0], a.shape[2], b.shape[2]
    strides = (a.stride(0), a.stride(2), b.stride(0), b.stride(2))

    def run(config: Config) -> Tensor:
        norms = a.new_empty(samples, dtype=torch.float32)
        if samples:
            row_norms_kernel[(triton.cdiv(samples, config.kwargs["BLOCK_N"]),)](
                a, b, norms, samples, width_in, width_out, *strides,
                **OPTIONS, **config.all_kwargs(),
            )
        return norms

    key = ("rows", bucket(samples), width_in, width_out, a.dtype, b.dtype, a.device)
    return launch(key, ROWS, run)
