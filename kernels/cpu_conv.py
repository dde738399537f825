"""Forms of a convolution's per-sample weight gradients and norms that are fast on a CPU: calls with the samples as groups, and Gram matrices of positions.

Legend: N samples, C channels in, O channels out, S positions in (with their padding), S' positions out, K kernel, g groups.

For images of few positions and many channels, ‖G_n‖² = Σ over positions out p, q of (b_np · b_nq) Σ_k (a_n,p+k · a_n,q+k): the inner products of all
positions in, S × S, are made once, and the sum over k shifts both of its positions alike, one dimension after the other. No G_n is formed: at 512
channels and 3 × 3 it has two million elements, where 7 × 7 positions have 2,401 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adabatch.kernels.chunks import accumulation_dtype, sample_chunks
from adabatch.kernels.reference_conv import LONGEST_CHUNK, conv_grad_sample

__all__ = ["conv_grads", "conv_gram_is_cheaper", "conv_gram_sq_norms", "weight_grad"]

# G_n of a call: larger results are new memory at every call, whose pages cost more than the products.
CALL_BYTES = 2 * 2**20

# In multiply-adds of a matrix product, measured at 1.5 to 15 million a sample: one element of G_n formed beside the gradient of the batch (made, reordered,
# summed, squared), and one element of a table of pairs of positions added to another (short rows).
FORMED, ADDED = 70, 25


def conv_gram_is_cheaper(
    activations_shape: Sequence[int], backprops_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether the norms cost less from Gram matrices than from the G_n, the gradient of the batch being made by one call in either case.

    Example:
        >>> shapes = (64, 128, 8, 8), (64, 128, 8, 8)
        >>> conv_gram_is_cheaper(*shapes, (3, 3), (1, 1), (1, 1), 1), conv_gram_is_cheaper((64, 32, 32, 32), (64, 32, 32, 32), (3, 3), (1, 1), (1, 1), 1)
        (True, False)
    """
    (_, channels, *size), (_, width_out, *size_out) = activations_shape, backprops_shape
    if groups != 1 or max(size, default=1) == 1:
        return False
    lengths = [length + 2 * amount for length, amount in zip(size, padding, strict=True)]
    pairs = 2 * math.prod(lengths) ** 2  # made and put into the table
    for dim, length in enumerate(kernel):
        lengths[dim] = size_out[dim]
        pairs += length * math.prod(lengths) ** 2
    products = channels * math.prod(size) ** 2 + width_out * math.prod(size_out) ** 2
    return products + ADDED * pairs < FORMED * math.prod(kernel) * channels * width_out


def conv_gram_sq_norms(
    activations: Tensor, backprops: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Squared norms ‖G_n‖² of a convolution's weight gradient, one group, a chunk of samples at a time.

    Args:
        activations: [N, C, *S].
        backprops: [N, O, *S'].
        kernel, stride, padding, dilation: one number per dimension; padding with zeros, on both sides alike.

    Returns:
        [N], float32 or float64.

    Example:
        >>> conv_gram_sq_norms(torch.ones(2, 1, 6), torch.ones(2, 1, 3), (4,), stride=(1,), padding=(0,), dilation=(1,))
        tensor([36., 36.])
    """
    dtype, dims = accumulation_dtype(activations, backprops), len(kernel)
    size, size_out = activations.shape[2:], backprops.shape[2:]
    lengths = [length + 2 * amount for length, amount in zip(size, padding, strict=True)]
    inside = [slice(amount, amount + length) for length, amount in zip(size, padding, strict=True)]
    chunks = sample_chunks(4 * math.prod(lengths) ** 2, dtype, activations, backprops)
    table = activations.new_zeros(len(chunks[0][0]), *lengths, *lengths, dtype=dtype)
    sq_norms = []
    for a, b in chunks:
        a_NCS, b_NOS = a.to(dtype).flatten(2), b.to(dtype).flatten(2)
        pairs = table[: len(a)]
        pairs[(slice(None), *inside, *inside)] = torch.bmm(a_NCS.mT, a_NCS).view(len(a), *size, *size)
        for dim in range(dims):
            reach = stride[dim] * (size_out[dim] - 1) + 1
            steps = [slice(at, at + reach, stride[dim]) for at in range(0, kernel[dim] * dilation[dim], dilation[dim])]
            every = [slice(None)] * dim
            shifted = [pairs[(slice(None), *every, step, *[slice(None)] * (dims - 1), step)] for step in steps]
            pairs = shifted[0].clone() if len(shifted) == 1 else shifted[0] + shifted[1]
            for another in shifted[2:]:
                pairs += another
        sq_norms.append(torch.linalg.vecdot(pairs.flatten(1), torch.bmm(b_NOS.mT, b_NOS).flatten(1)))
    return torch.cat(sq_norms)


def conv_grads(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Iterator[Tensor]:
    """G_n, a chunk [n, O, C/g, *K] at a time; chunks of one size where the number of samples allows.

    Example:
        >>> chunks = conv_grads(torch.ones(18, 1, 4), torch.ones(18, 1, 3), (1, 1, 2), (1,), (0,), (1,), 1)
        >>> [len(chunk) for chunk in chunks]
        [9, 9]
    """
    dtype, samples = accumulation_dtype(activations, backprops), len(activations)
    most = max(1, min(LONGEST_CHUNK, CALL_BYTES // max(1, dtype.itemsize * math.prod(weight_shape))))
    length = next((length for length in range(most, most // 2, -1) if samples % length == 0), most)
    for a, b in zip(activations.split(length), backprops.split(length), strict=True):
        yield conv_grad_sample(a, b, weight_shape, stride, padding, dilation, groups)


def weight_grad(
    activations: Tensor, backprops: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Σ_n G_n by one call, one group.

    Example:
        >>> weight_grad(torch.ones(2, 1, 4), torch.ones(2, 1, 3), (1, 1, 2), (1,), (0,), (1,))
        tensor([[[6., 6.]]])
    """
    weight = activations.new_empty(()).expand(tuple(weight_shape))  # its values do not matter
    geometry = (list(stride), list(padding), list(dilation), False, [0] * len(stride), 1)
    return torch.ops.aten.convolution_backward(backprops, activations, weight, None, *geometry, [False, True, False])[1]
