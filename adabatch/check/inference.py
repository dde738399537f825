"""Inferring a layer's layout from two backward passes whose samples were weighted differently.

The weights of the second pass are w'_i = ρ_i w_i with ρ_i different powers of two. What belongs to sample i alone is then, in the second pass, ρ_i times
what it was in the first: bit for bit in any floating-point type, since scaling by a power of two commutes with rounding. A layout is consistent when this
holds for all its samples; rows of zeros say nothing. Where no layout is, single rows tell whether the layer mixes samples or only orders them otherwise.

Legend: N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adabatch.grad_sample.layout import Layout

# Far above what unordered atomic additions leave behind, far below the factor of two between samples.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}

BATCHED = (Layout.BATCH_FIRST, Layout.BATCH_SECOND, Layout.FLAT_BATCH_MAJOR, Layout.FLAT_TIME_MAJOR)


def draw_weights(n_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights w [N], uniform in [0.5, 1.5), and ratios ρ [N], a random order of 1, 2, 4, ... (not below 1: small half-precision gradients would underflow).

    Example:
        >>> weights, ratios = draw_weights(4)
        >>> sorted(ratios.tolist())
        [1.0, 2.0, 4.0, 8.0]
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_samples, generator=generator, dtype=torch.float64) + 0.5
    return weights, 2.0 ** torch.randperm(n_samples, generator=generator).double()


def consistent_layouts(first: Tensor, second: Tensor, ratios: Tensor, batch_dims: frozenset[int] | None) -> list[Layout]:
    """The layouts in which every sample's part of `second` is its ratio times that of `first`; the preferred one first.

    Args:
        first, second: an output's gradient in the two passes.
        ratios: ρ, [N].
        batch_dims: dimensions that are known to grow with the number of samples; None: not known.

    Example:
        >>> rows, ratios = torch.ones(2, 3, 1), torch.tensor([1.0, 2.0, 4.0])
        >>> [str(layout) for layout in consistent_layouts(rows, rows * ratios[:, None], ratios, None)]
        ['batch_second']
    """
    return [layout for layout in layouts_by_shape(first.shape, len(ratios), batch_dims) if _residual(layout, first, second, ratios) <= TOLERANCE[first.dtype]]


def layouts_by_shape(shape: torch.Size, n_samples: int, batch_dims: frozenset[int] | None) -> list[Layout]:
    """The layouts that a shape allows; with one position per sample a flat one is batch_first.

    Example:
        >>> [str(layout) for layout in layouts_by_shape(torch.Size((6, 3)), 3, None)]
        ['batch_second', 'flat_batch_major', 'flat_time_major']
        >>> [str(layout) for layout in layouts_by_shape(torch.Size((6, 3)), 3, frozenset([1]))]
        ['batch_second']
    """
    size = [*shape, 0, 0]
    fits = {
        Layout.BATCH_FIRST: size[0] == n_samples,
        Layout.BATCH_SECOND: size[1] == n_samples,
        Layout.FLAT_BATCH_MAJOR: size[0] > n_samples and size[0] % n_samples == 0,
        Layout.FLAT_TIME_MAJOR: size[0] > n_samples and size[0] % n_samples == 0,
    }
    return [layout for layout in BATCHED if fits[layout] and (batch_dims is None or (1 if layout is Layout.BATCH_SECOND else 0) in batch_dims)]


def rows_are_pure(first: Tensor, second: Tensor, ratios: Tensor) -> bool:
    """Whether each row (along the last dimension) is of one sample: its least-squares ratio between the passes is one of the ratios, and leaves no residual.

    Example:
        >>> first, ratios = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([1.0, 4.0])
        >>> rows_are_pure(first, first * torch.tensor([[4.0], [4.0]]), ratios), rows_are_pure(first, first * torch.tensor([1.0, 4.0]), ratios)
        (True, False)
    """
    a, b = (tensor.double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in (first, second))
    live = (a != 0).any(1)
    a, b = a[live], b[live]
    fitted = (a * b).sum(1) / a.square().sum(1)
    nearest = ratios.to(fitted)[(fitted[:, None].clamp(min=1e-30).log2() - ratios.to(fitted).log2()).abs().argmin(1)]
    residual = (b - nearest[:, None] * a).norm(dim=1) / b.norm(dim=1).clamp(min=1e-300)
    return bool((residual <= TOLERANCE[first.dtype]).all())


def is_live(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether any gradient came."""
    return first is not None and second is not None and bool(first.any())


def _residual(layout: Layout, first: Tensor, second: Tensor, ratios: Tensor) -> float:
    """max over the samples of ‖b'_i − ρ_i b_i‖ / ‖b'_i‖, where b_i is not zero."""
    a, b = (layout.split(tensor, len(ratios)).double().reshape(len(ratios), -1) for tensor in (first, second))
    wanted = ratios.to(a)[:, None] * a
    scale = torch.maximum(b.norm(dim=1), wanted.norm(dim=1))
    errors = (b - wanted).norm(dim=1)[scale > 0] / scale[scale > 0]
    return float(errors.max()) if len(errors) else 0.0
