"""Forms of the kernels that are fastest on a CPU. Each agrees with its definition in reference.py, and is that definition where nothing faster is known.

Legend: N samples, T positions, I in, O out, C channels, S' positions out, K kernel, P positions out in all, g groups.

Weight gradients come out of the per-sample gradients: a chunk of samples is multiplied while it lies in the cache, added to the weight gradient and squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from adabatch.kernels import operators, reference
from adabatch.kernels.chunks import CHUNK_BYTES, LONGEST_SUM, accumulation_dtype, outer_form, row_sq_norms, sample_chunks
from adabatch.kernels.cpu_conv import conv_grads, conv_gram_is_cheaper, conv_gram_sq_norms, weight_grad

__all__ = [
    "affine_grad_sample",
    "affine_sq_norms",
    "conv_sq_norms",
    "conv_weight_grad_moments",
    "weight_grad_moments",
    "windows_are_cheaper",
]

# From this size on, one product a sample into one buffer beat batches of them.
ALONE_BYTES = 2**19
FEW = 8


def weight_grad_moments(
    activations: Tensor, backprops: Tensor, *, second_moment: bool = False, deterministic: bool | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.weight_grad_moments`: one product and norms without G_n where T is small, else a product a sample.

    Example:
        >>> weight_grad_moments(torch.ones(2, 3, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 3, 1))[0]
        tensor([[9., 9.]])
    """
    if torch.compiler.is_compiling():
        return operators.weight_grad_moments(activations, backprops, second_moment=second_moment, deterministic=deterministic)
    samples, positions, width_in = activations.shape
    width_out = backprops.shape[2]
    dtype = accumulation_dtype(activations, backprops)
    if not second_moment and outer_form(positions, width_in, width_out, with_gradient=True) != "gradients":
        grad = backprops.flatten(0, 1).to(dtype).T @ activations.flatten(0, 1).to(dtype)
        return grad, reference.outer_sq_norms(activations, backprops), None
    grads = _products(activations, backprops, dtype)
    return _moments(grads, samples, activations.new_zeros(width_out, width_in, dtype=dtype), second_moment)


def _products(activations: Tensor, backprops: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """G_n, a chunk [n, O, I] at a time; a chunk is overwritten by the next."""
    numel = activations.shape[2] * backprops.shape[2]
    if numel * dtype.itemsize >= ALONE_BYTES:
        buffer = activations.new_empty(1, backprops.shape[2], activations.shape[2], dtype=dtype)
        for a_TI, b_TO in zip(activations, backprops, strict=True):
            torch.mm(b_TO.to(dtype).T, a_TI.to(dtype), out=buffer[0])
            yield buffer
        return
    for a_NTI, b_NTO in sample_chunks(numel, dtype, activations, backprops):
        yield torch.bmm(b_NTO.to(dtype).mT, a_NTI.to(dtype))


def affine_grad_sample(activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.affine_grad_sample`; without statistics the products of all chunks share one buffer.

    Example:
        >>> affine_grad_sample(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]]), None, None)
        (tensor([[2., 3.]]), tensor([[2., 1.]]))
    """
    if torch.compiler.is_compiling() or not (mean is None and rstd is None):
        return reference.affine_grad_sample(activations, backprops, mean, rstd)
    dtype = accumulation_dtype(activations, backprops)
    if activations.shape[1] == 1:
        shift = backprops[:, 0].to(dtype)
        return activations[:, 0].to(dtype) * shift, shift
    scale = activations.new_empty(activations.shape[0], activations.shape[2], dtype=dtype)
    chunks = sample_chunks(activations[:1].numel(), dtype, activations, backprops, scale)
    buffer = torch.empty_like(chunks[0][0], dtype=dtype)
    for a_NTP, b_NTP, sums_NP in chunks:
        products = torch.mul(a_NTP.to(dtype), b_NTP, out=buffer[: len(a_NTP)])
        torch.sum(products, 1, out=sums_NP)
    return scale, backprops.sum(1, dtype=dtype)


def affine_sq_norms(activations: Tensor, backprops: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.affine_sq_norms`, from the sums above.

    Example:
        >>> affine_sq_norms(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]]), None, None)
        (tensor([13.]), tensor([5.]))
    """
    scale, shift = affine_grad_sample(activations, backprops, mean, rstd)
    return torch.linalg.vector_norm(scale, dim=1).square(), torch.linalg.vector_norm(shift, dim=1).square()


def windows_are_cheaper(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether products with copied windows of the input beat a weight-gradient call with the samples as groups: few channels in a small kernel.

    Example:
        >>> windows_are_cheaper((32, 3, 3, 3), 1), windows_are_cheaper((64, 3, 5, 5), 1), windows_are_cheaper((32, 32, 3, 3), 1)
        (True, False, False)
    """
    return groups == 1 and weight_shape[1] <= 4 and 1 < math.prod(weight_shape[2:]) <= 9


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
    """`reference.conv_weight_grad_moments`: with norms from Gram matrices, by copied windows, or by calls with the samples as groups, whichever is cheaper.

    Example:
        >>> geometry = dict(stride=(1,), padding=(0,), dilation=(1,), groups=1)
        >>> conv_weight_grad_moments(torch.ones(2, 1, 4), torch.ones(2, 1, 3), (1, 1, 2), **geometry)[0]
        tensor([[[6., 6.]]])
    """
    geometry = (stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        return operators.conv_weight_grad_moments(
            activations, backprops, weight_shape, *geometry, second_moment=second_moment, deterministic=deterministic
        )
    dtype, samples = accumulation_dtype(activations, backprops), activations.shape[0]
    if samples and not second_moment and conv_gram_is_cheaper(activations.shape, backprops.shape, weight_shape[2:], stride, padding, groups):
        norms = conv_gram_sq_norms(activations, backprops, weight_shape[2:], stride, padding, dilation)
        return weight_grad(activations.to(dtype), backprops.to(dtype), weight_shape, stride, padding, dilation), norms, None
    if not windows_are_cheaper(weight_shape, groups):
        grads = conv_grads(activations, backprops, weight_shape, *geometry)
        return _moments(grads, samples, activations.new_zeros(tuple(weight_shape), dtype=dtype), second_moment)
    width_out, channels, *kernel = weight_shape
    grads = _window_products(activations, backprops, kernel, stride, padding, dilation, dtype)
    total = activations.new_zeros(math.prod(kernel) * channels, width_out, dtype=dtype)
    grad, sq_norms, second = _moments(grads, samples, total, second_moment)

    def restored(moment: Tensor) -> Tensor:
        return moment.view(*kernel, channels, width_out).movedim((-1, -2), (0, 1)).contiguous()

    return restored(grad), sq_norms, None if second is None else restored(second)


def conv_sq_norms(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """`reference.conv_sq_norms`, by the forms of `conv_weight_grad_moments`.

    Example:
        >>> conv_sq_norms(torch.ones(2, 1, 6), torch.ones(2, 1, 3), (1, 1, 4), stride=(1,), padding=(0,), dilation=(1,), groups=1)
        tensor([36., 36.])
    """
    if torch.compiler.is_compiling() or not len(activations):
        return reference.conv_sq_norms(activations, backprops, weight_shape, stride, padding, dilation, groups)
    kernel = weight_shape[2:]
    if conv_gram_is_cheaper(activations.shape, backprops.shape, kernel, stride, padding, groups):
        return conv_gram_sq_norms(activations, backprops, kernel, stride, padding, dilation)
    if windows_are_cheaper(weight_shape, groups):
        dtype = accumulation_dtype(activations, backprops)
        grads = _window_products(activations, backprops, kernel, stride, padding, dilation, dtype)
    else:
        grads = conv_grads(activations, backprops, weight_shape, stride, padding, dilation, groups)
    return torch.cat([row_sq_norms(chunk, chunk.dtype) for chunk in grads])


def _window_products(
    activations: Tensor, backprops: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], dtype: torch.dtype
) -> Iterator[Tensor]:
    """G_n as [n, K C, O], a chunk at a time: the windows that the kernel meets, [P, K C], copied from the input with its channels last."""
    positions, channels, spots = math.prod(backprops.shape[2:]), activations.shape[1], math.prod(kernel)
    length = max(1, CHUNK_BYTES // (dtype.itemsize * max(1, spots * channels * (positions + backprops.shape[1]))))
    for a, b in zip(activations.split(length), backprops.split(length), strict=True):
        last = F.pad(a.to(dtype).movedim(1, -1), [0, 0, *(amount for amount in reversed(padding) for _ in range(2))]).contiguous()
        batch, *steps, unit = last.stride()
        size = (len(a), *backprops.shape[2:], *kernel, channels)
        strides = (batch, *(by * step for by, step in zip(stride, steps, strict=True)), *(by * step for by, step in zip(dilation, steps, strict=True)), unit)
        windows = last.as_strided(size, strides).reshape(len(a), positions, spots * channels)
        yield torch.bmm(windows.mT, b.to(dtype).flatten(2).mT)


def _moments(grads: Iterator[Tensor], samples: int, total: Tensor, second_moment: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ G_n, ‖G_n‖² and Σ G_n² of chunks [n, *shape], which may be changed. Long sums of squares take two stages, the second one for all chunks at once."""
    second = torch.zeros_like(total) if second_moment else None
    rows = total.shape[0] if total.numel() > LONGEST_SUM else 1
    norms, start = total.new_empty(samples, rows), 0
    for chunk in grads:
        count = len(chunk)
        if count < FEW:  # sums of few rows are slow
            for grad in chunk.unbind():
                total += grad
        else:
            total += chunk.sum(0)
        torch.linalg.vector_norm(chunk.reshape(count, rows, total.numel() // max(1, rows)), dim=2, out=norms[start : start + count])
        start += count
        if second is not None:
            second += chunk.square_().sum(0)
    return total, (norms[:, 0] if rows == 1 else torch.linalg.vector_norm(norms, dim=1)).square(), second
