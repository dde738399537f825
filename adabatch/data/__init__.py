"""Batches of exactly the size that is current when they are drawn, every sample once an epoch, resumable."""

from adabatch.data.loader import AdaptiveDataLoader
from adabatch.data.permutation import KeyedPermutation
from adabatch.data.sampler import ResizableBatchSampler

__all__ = ["AdaptiveDataLoader", "KeyedPermutation", "ResizableBatchSampler"]
