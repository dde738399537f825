"""Batches of exactly the current size, every sample once an epoch, resumable at any batch."""

from adabatch.data.batches import pad_right
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.data.order import KeyedPermutation
from adabatch.data.sampler import ResizableBatchSampler

__all__ = ["AdaptiveDataLoader", "KeyedPermutation", "ResizableBatchSampler", "pad_right"]
