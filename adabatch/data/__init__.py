"""Batches of exactly the size that is current when they are drawn, every sample once an epoch, resumable."""

from adabatch.data.joining import pad_right
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.data.order import KeyedPermutation
from adabatch.data.sampler import ResizableBatchSampler

__all__ = ["AdaptiveDataLoader", "KeyedPermutation", "ResizableBatchSampler", "pad_right"]
