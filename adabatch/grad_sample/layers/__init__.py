"""The layer families: importing this package registers their rules."""

from adabatch.grad_sample.layers import activation, conv, embedding, linear, normalization

__all__ = ["activation", "conv", "embedding", "linear", "normalization"]
