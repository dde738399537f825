"""Gradient-moment kernels."""
