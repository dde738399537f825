"""Batches larger than memory: split into micro-batches, accumulated; the largest that fits."""
