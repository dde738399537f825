"""Estimators: from sums over per-sample gradients to unbiased moments and their averages."""

from adabatch.estimators.moments import GradientMoments

__all__ = ["GradientMoments"]
