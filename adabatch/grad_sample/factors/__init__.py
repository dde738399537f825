"""Factors: how one parameter's per-sample gradients are built, without building them."""
