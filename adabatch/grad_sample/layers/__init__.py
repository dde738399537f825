"""The layer families: importing this package registers their rules."""

from adabatch.grad_sample.layers import (
    activation, attention, conv, embedding, linear, normalization, recurrent,
)

__all__ = [
    "activation", "attention", "conv", "embedding", "linear", "normalization", "recurrent",
]
