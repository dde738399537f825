"""How a batch is split into micro-batches, and which of them is being worked on.

Loader, optimizer and scheduler share one BatchSplit.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from adabatch._checks import integer
from adabatch._types import Batch
from adabatch.data.chunks import split_into
from adabatch.data.order import ONE_PROCESS, Shard

_ALLOCATION_FAILED = ("out of memory", "can't allocate memory", "alloc_failed")


class BatchSplit:
    """The micro-batches of the present batch.

    Attributes:
        at_least: least number of micro-batches of a batch that has as many samples.
        accumulates: whether an optimizer waits for the last micro-batch.
        index, count: which micro-batch this is, from 0, and how many there are.
        size, batch_size: samples in it, and in the whole batch, of this process.
        current_sizes: sizes of the present batch's micro-batches.
        is_retry: the batch begun last was not completed: memory ran out, or a sample was not read.
        attempt: counts the batches begun, and those begun again.
        failed: the batch is to be begun again.
        stepped: the optimizer has begun to step on this batch.
        listeners: called whenever a batch is begun.
        single: gives a context that is entered while a batch of one sample is out.
        batch: the present micro-batch, as it is delivered.
        counted: what check_token_mean found in the batch's first micro-batch.

    Example:
        >>> BatchSplit(limit=4).sizes(10)
        [4, 3, 3]
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.at_least = 1
        self.accumulates = self.stepped = self.failed = self.is_retry = False
        self.listeners: list[Callable[[], None]] = []
        self.single: Callable[[], AbstractContextManager[None]] = nullcontext
        self.current_sizes: list[int] = []
        self.batch: Batch = None
        self.counted: dict[int, list[tuple[float, float]]] = {}
        self.attempt, self.index, self.count, self.size, self.batch_size = 0, 0, 1, 0, 0

    def __getstate__(self) -> dict[str, object]:
        """Of a copy, which belongs to no model and no optimizer."""
        return vars(self) | {"listeners": [], "single": nullcontext, "batch": None}

    @property
    def limit(self) -> int | None:
        """The largest micro-batch; may be set at any time and holds from the next batch."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = None if limit is None else integer("the micro-batch limit", limit, 1)

    @property
    def is_split(self) -> bool:
        """Whether batches may arrive in parts."""
        return self.accumulates or self._limit is not None or self.at_least > 1

    @property
    def is_last(self) -> bool:
        """Whether the batch is complete with this micro-batch. True outside a loop."""
        return self.index == self.count - 1

    @property
    def fraction(self) -> float:
        """This micro-batch's fraction of the batch's samples."""
        return self.size / self.batch_size if self.count > 1 else 1.0

    def sizes(self, batch_size: int, shard: Shard = ONE_PROCESS, local_size: int | None = None
              ) -> list[int]:
        """Sizes of this process's micro-batches: as few as the limit allows, equal to within 1.
        Every process has as many as the largest local batch needs.

        Args:
            batch_size: of all processes together.
            local_size: this process's samples of it; None for the largest local batch.
        """
        largest = -(-batch_size // shard.world_size)
        least = -(-largest // self.at_least) if self.at_least > 1 else None
        limits = [limit for limit in (self.limit, least) if limit]
        parts = -(-largest // min(limits)) if limits else 1
        parts = max(1, min(parts, batch_size // shard.world_size))
        return split_into(largest if local_size is None else local_size, parts)

    def start(self, batch_size: int, shard: Shard = ONE_PROCESS, local_size: int | None = None
              ) -> list[int]:
        """Begin a batch, or begin it again; the sizes(...) of its micro-batches."""
        sizes = self.current_sizes = self.sizes(batch_size, shard, local_size)
        self.is_retry = self.failed
        self.index, self.count, self.size, self.batch_size = 0, len(sizes), sizes[0], sum(sizes)
        self.attempt += 1
        self.counted = {}
        self.stepped = self.failed = False
        for listener in self.listeners:
            listener()
        return sizes

    def advance(self, index: int, size: int) -> None:
        """Micro-batch `index` of `size` samples is the present one."""
        self.index, self.size = index, size

    def give_up(self, begun: bool) -> None:
        """No more micro-batches come of this batch; begun: what came of it is to be dropped."""
        self.index, self.failed = self.count - 1, begun

    def end(self) -> None:
        """No batch is being worked on."""
        self.index, self.count, self.batch = 0, 1, None

    def shrink(self) -> bool:
        """Halve the limit after an allocation failed and retry the batch; False if impossible."""
        if self.stepped or self.size < 2:
            return False
        self.limit = (self.size + 1) // 2
        self.failed = True
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory could not be allocated, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _ALLOCATION_FAILED)


def free_memory() -> None:
    """Give back what a failed attempt left allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def retrying(split: BatchSplit, world_size: int) -> Iterator[None]:
    """See AdaptiveDataLoader.retrying."""
    if not split.accumulates:
        raise RuntimeError(
            "retrying() needs an optimizer that steps on the last micro-batch: the one that "
            "adabatch.wrap(..., micro_batches=...) returns")
    if world_size > 1:
        raise RuntimeError(
            f"retrying() in one of {world_size} processes would leave the others waiting for it: "
            "set a low enough limit of micro-batches, or 'auto'")
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or not split.shrink():
            raise
        traceback.clear_frames(error.__traceback__)
    if split.failed:
        free_memory()
