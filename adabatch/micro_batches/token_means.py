"""Losses whose mean is not over samples, in micro-batches that are weighted by their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from adabatch._types import Source
from adabatch.data.split import BatchSplit

_LOOKED_AT = 64  # nodes of the graph, nearest to the loss first
_MEAN = 1  # torch's number of reduction="mean"
_FIX = (
    "Take the mean of each sample first (reduction='none', then .mean() over samples), or train "
    "without micro-batches.")


def check_token_mean(loss: Tensor | float, split: BatchSplit) -> None:
    """Raise where a micro-batch's loss is seen to be a mean over another number of tokens, for each
    of its samples, than that of the batch's first micro-batch.

    Raises:
        RuntimeError: cross-entropy with ignored labels, differently many in micro-batches, or with
            weights of classes.
    """
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return
    for node in islice(_nodes(loss.grad_fn), _LOOKED_AT):
        if node.name().startswith("NllLoss") and node._saved_reduction == _MEAN:
            if _has_weight(node):
                raise RuntimeError(
                    "cross_entropy with weights of classes and reduction='mean' divides by the sum "
                    "of the weights of its micro-batch, so micro-batches, weighted by their "
                    "samples, do not add up to the batch's loss. Use reduction='none', then "
                    ".mean(), or train without micro-batches.")
            ignored = node._saved_ignore_index
            # torch gives it as an unsigned number.
            counts = _counted(split, ignored - 2**64 if ignored >= 2**63 else ignored)
            first = split.counted.setdefault(ignored, counts)
            for (all_before, before), (all_now, now) in zip(first, counts, strict=False):
                if (before != all_before or now != all_now) and before != now:
                    raise RuntimeError(
                        "cross_entropy with ignored labels is a mean over the others, "
                        f"{before:.4g} for each sample in one micro-batch and {now:.4g} in another "
                        "of the same batch, so micro-batches, weighted by their samples, do not "
                        f"add up to the batch's loss. {_FIX}")


def _nodes(root: Node) -> Iterator[Source]:
    """The graph's nodes from the loss on, nearest first, each once."""
    waiting, seen = [root], {root}
    for node in waiting:
        yield node
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)


def _has_weight(node: Source) -> bool:
    try:
        return node._saved_weight is not None
    except RuntimeError:  # it was freed, so there was one
        return True


def _counted(split: BatchSplit, ignored: int) -> list[tuple[float, float]]:
    """(entries, those that are not ignored) for each sample of the present micro-batch, of its
    integer tensors; on an accelerator they are not looked at."""
    batch = dict(split.batch) if isinstance(split.batch, Mapping) else split.batch
    return [(leaf.numel() / split.size, int((leaf != ignored).sum()) / split.size)
            for leaf in tree_leaves(batch)
            if isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and leaf.device.type == "cpu"]
