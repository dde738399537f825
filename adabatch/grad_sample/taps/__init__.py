"""Taps: autograd nodes behind the layers that report per-sample statistics in the backward pass."""
