"""The networks of the examples, from images [N, 1, height, width] to class scores [N, 10]."""

from __future__ import annotations

from torch import nn


def digits_network() -> nn.Module:
    """A small network for 8 × 8 images: conv 3×3×16, pool, 64, 10."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def mnist_network() -> nn.Module:
    """The CABS authors' network for MNIST: conv 5×5×32, pool, conv 5×5×64, pool, 1024, 10.

    References:
        Balles, Romero, Hennig (2017), "Coupling Adaptive Batch Sizes with Learning Rates",
        arXiv 1612.05086.
    """
    return _two_convolutions(32, 64, 1024)


def small_network() -> nn.Module:
    """The same shape with fewer channels: conv 5×5×16, pool, conv 5×5×32, pool, 128, 10."""
    return _two_convolutions(16, 32, 128)


def _two_convolutions(first: int, second: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * 7 * 7, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip
