"""How a batch is cut into micro-batches, and which of them is being worked on: what loader, optimizer and scheduler share."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from adabatch.data.arguments import checked_int
from adabatch.data.chunks import split_into
from adabatch.data.processes import Processes

ALONE = Processes()
_ALLOCATION_FAILED = ("out of memory", "can't allocate memory", "alloc_failed")


class MicroBatches:
    """The micro-batches of the present batch.

    Attributes:
        limit: the largest micro-batch, in samples; None for whole batches.
        at_least: parts that a batch of so many samples is cut into anyway.
        accumulates: whether an optimizer waits for the last micro-batch.
        index, count: which micro-batch this is, from 0, and how many there are.
        size, batch_size: samples in it, and in the whole batch, of this process.
        current_sizes: sizes of the present batch's micro-batches.
        anew: the present batch was begun before, and memory ran out.
        attempt: counts the batches begun, and those begun anew.
        failed: the batch is to be begun anew.
        stepped: the optimizer has begun to step on this batch.
        listeners: called at the start of a batch, and again when it is started anew.

    Example:
        >>> micro = MicroBatches(limit=4)
        >>> micro.sizes(10)
        [4, 3, 3]
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.at_least = 1
        self.accumulates = self.stepped = self.failed = False
        self.listeners: list[Callable[[], None]] = []
        self.attempt, self.anew = 0, False
        self.current_sizes: list[int] = []
        self.index, self.count, self.size, self.batch_size = 0, 1, 0, 0

    @property
    def limit(self) -> int | None:
        """The largest micro-batch; may be set at any time and holds from the next batch."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = None if limit is None else checked_int("max_micro_batch_size", limit, 1)

    @property
    def is_cut(self) -> bool:
        """Whether batches may arrive in parts."""
        return self.accumulates or self._limit is not None or self.at_least > 1

    @property
    def is_last(self) -> bool:
        """Whether the batch is complete with this micro-batch. True outside a loop."""
        return self.index == self.count - 1

    @property
    def share(self) -> float:
        """Of the batch's samples, the part that is in this micro-batch."""
        return self.size / self.batch_size if self.count > 1 else 1.0

    def sizes(self, batch_size: int, processes: Processes = ALONE, share: int | None = None) -> list[int]:
        """Sizes of this process's micro-batches of a batch: as few as the limit allows, equal to within one sample.

        Every process has equally many, as many as the largest share needs. (With a limit of 1 and unequal shares some have one of two samples.)

        Args:
            batch_size: of the batch, of all processes together.
            processes: that share it.
            share: this process's samples of it; None for the largest share.
        """
        largest = -(-batch_size // processes.world_size)
        limits = [limit for limit in (self.limit, -(-largest // self.at_least) if self.at_least > 1 else None) if limit]
        parts = -(-largest // min(limits)) if limits else 1
        return split_into(largest if share is None else share, max(1, min(parts, batch_size // processes.world_size)))

    def start(self, batch_size: int, processes: Processes = ALONE, share: int | None = None) -> list[int]:
        """Begin a batch, or begin it anew; the sizes(...) of its micro-batches."""
        sizes = self.current_sizes = self.sizes(batch_size, processes, share)
        self.anew = self.failed
        self.index, self.count, self.size, self.batch_size = 0, len(sizes), sizes[0], sum(sizes)
        self.attempt += 1
        self.stepped = self.failed = False
        for listener in self.listeners:
            listener()
        return sizes

    def advance(self, index: int, size: int) -> None:
        """Micro-batch `index` of `size` samples is the present one."""
        self.index, self.size = index, size

    def end(self) -> None:
        """No batch is being worked on."""
        self.index, self.count = 0, 1

    def shrink(self) -> bool:
        """Halve the limit after an allocation failed, and have the batch begun anew; False where that is not possible."""
        if self.stepped or self.size < 2:
            return False
        self.limit = (self.size + 1) // 2
        self.failed = True
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory could not be allocated, on a device or on the host.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), is_out_of_memory(ValueError("out of range"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION_FAILED)


def free_memory() -> None:
    """Give back what a failed attempt left allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def retrying(micro_batches: MicroBatches, world_size: int) -> Iterator[None]:
    """See AdaptiveDataLoader.retrying."""
    if not micro_batches.accumulates:
        raise RuntimeError("retrying() needs an optimizer that steps on the last micro-batch: that of adabatch.wrap(..., max_micro_batch_size=...)")
    if world_size > 1:
        raise RuntimeError(f"retrying() in one of {world_size} processes would leave the others waiting for it: set max_micro_batch_size low enough, or 'auto'")
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or not micro_batches.shrink():
            raise
        traceback.clear_frames(error.__traceback__)
    if micro_batches.failed:
        free_memory()
