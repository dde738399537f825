"""Batches larger than memory: cut into micro-batches, accumulated, and the largest that fits."""
