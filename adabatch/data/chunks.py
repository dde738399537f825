"""What workers fetch and reply: chunks of the order, of sizes that follow the batch size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from adabatch._types import Batch
from adabatch.data.batches import Layout
from adabatch.interfaces import State

Cut = Callable[[Batch, int, int], Batch]
_inherited: list[Iterator[object]] = []  # by a forked process, never to be freed there


class Request(NamedTuple):
    """A chunk to fetch."""

    run: int  # number of the pass through the data; a new one restarts an iterable data set
    epoch: int  # of the sampler
    stream: int  # 64-bit key of (seed, epoch) for random augmentation
    start: int  # position in the order of the first sample
    indices: Sequence[int]  # of the samples; of an iterable data set only their number counts
    stride: int = 1  # from each sample's position to the next one's: the number of processes
    restore: State | None = None  # that an iterable data set continues from
    sizes: Sequence[int] = ()  # of the parts, one after another, that batches are expected to need


class Reply(NamedTuple):
    """A fetched chunk; a named tuple, so that torch's pin-memory thread reaches the batch."""

    batch: Batch  # collated, or the list of samples where the consumer collates
    n: int  # samples in it
    layout: Layout = None  # how such batches are cut and joined; in a process's first reply
    ended: bool = False  # an iterable data set has no more samples in this worker
    state: State | None = None  # of an iterable data set after this chunk
    seconds: float = 0.0  # taken by fetching and collating
    parts: Sequence[tuple[Batch, int]] = ()  # (batch or Failure, samples), instead of one batch


class Failure:
    """Takes the place of samples that could not be read or collated: the error being handled."""

    def __init__(self, error: Exception):
        info = get_worker_info()
        self._error = error if info is None else ExceptionWrapper(
            where=f"in DataLoader worker process {info.id}")

    def reraise(self) -> None:
        """Raise the error, as torch's DataLoader does."""
        try:
            if isinstance(self._error, ExceptionWrapper):
                self._error.reraise()
            else:
                raise self._error
        except StopIteration as error:
            raise RuntimeError(
                "the data set or collate_fn raised StopIteration, which would end the epoch "
                "early: raise IndexError, or another error") from error


def split_into(total: int, parts: int) -> list[int]:
    """`parts` sizes that add up to `total`, as equal as possible, larger ones first.

    Example:
        >>> split_into(10, 3), split_into(3, 1)
        ([4, 3, 3], [3])
    """
    small, more = divmod(total, parts)
    return [small + 1] * more + [small] * (parts - more)


class ChunkSizer:
    """The least samples of a chunk: those that take 4 ms to fetch, as handing it over takes 0.1 ms.

    Example:
        >>> sizer = ChunkSizer()
        >>> sizer.observe(Reply(None, 10, seconds=1e-3))
        >>> sizer.min_samples
        40
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self.min_samples = 1

    def observe(self, reply: Reply) -> None:
        """Learn from a chunk that arrived."""
        if reply.n:
            seconds = max(reply.seconds / reply.n, 1e-7)
            self._seconds += (seconds - self._seconds) * (0.25 if self._seconds else 1.0)
            self.min_samples = max(1, int(4e-3 / self._seconds))


class ChunkPlan:
    """Sizes of the chunks to draw.

    What was requested and is not drawn yet is divided among the workers; what is drawn ahead ends
    where batches will end, so that nothing needs joining at a constant batch size.

    Args:
        workers: that fetch at the same time; 0 for none.
        cycle: gives the sizes in which a batch of the present size will be requested.
        sizer: gives the least samples of a chunk; None for one.

    Attributes:
        drawn, requested: samples of this epoch so far.
        rest: sizes of the present batch still to be requested.

    Example:
        >>> plan = ChunkPlan(2, lambda: [8])
        >>> plan.request(8, [])
        >>> [plan.next_sizes() for _ in range(4)]
        [[4], [4], [8], [8]]
    """

    def __init__(
        self, workers: int, cycle: Callable[[], list[int]], sizer: ChunkSizer | None = None
    ):
        self._workers, self._cycle, self._sizer = max(1, workers), cycle, sizer
        self.drawn = self.requested = 0
        self.rest: Sequence[int] = ()
        self._part = 1

    def request(self, size: int, rest: Sequence[int]) -> None:
        """The consumer waits for `size` samples, and will then request the rest."""
        self.requested += size
        self.rest = rest
        missing = -(-(self.requested - self.drawn) // self._workers)
        # A quarter of a chunk is not worth dividing.
        self._part = max(1, missing, self._sizer.min_samples // 4 if self._sizer else 0)

    def next_sizes(self) -> list[int]:
        """Sizes of the (parts of) batches that make up the next chunk; counted as drawn."""
        ahead = self.drawn - self.requested
        size = min(-ahead, self._part) if ahead < 0 else self._to_boundary(ahead)
        sizes = [size]
        if ahead >= 0 and self._sizer is not None:
            while size < self._sizer.min_samples:
                sizes.append(self._to_boundary(ahead + size))
                size += sizes[-1]
        self.drawn += size
        return sizes

    def _to_boundary(self, ahead: int) -> int:
        """Samples up to the next boundary of batches."""
        rest, cycle = sum(self.rest), self._cycle()
        sizes = self.rest if ahead < rest else cycle
        ahead = ahead if ahead < rest else (ahead - rest) % sum(cycle)
        return next(end for end in accumulate(sizes) if ahead < end) - ahead


class Replies:
    """The engine's replies, in the order of the requests; has_workers: from worker processes."""

    def __init__(self, iterator: Iterator[Reply], has_workers: bool = False):
        self._iterator, self._has_workers = iterator, has_workers
        self._process = os.getpid()

    def __iter__(self) -> Iterator[Reply]:
        return self

    def __next__(self) -> Reply:
        try:
            return next(self._iterator)
        except (ConnectionError, EOFError) as error:
            if not self._has_workers or "in DataLoader worker process" in str(error):
                raise  # the data set's error
            raise RuntimeError(
                "a DataLoader worker exited unexpectedly while it handed over a batch: was it "
                "killed, or out of memory?"
            ) from error

    def close(self) -> None:
        """End the workers now, not when the last traceback that holds the iterator is freed. A
        process that was forked meanwhile, as another loader's worker, keeps it: its end would end
        the workers of the process that started them."""
        if not isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            return
        if os.getpid() == self._process:
            self._iterator._shutdown_workers()
        else:
            _inherited.append(self._iterator)


class ChunkBuffer:
    """Chunks that have arrived, from which exactly the requested samples are taken.

    Args:
        replies: the engine's iterator.
        cut, join: of batches, as in batches.py.
        received: called with each reply; returns what of it is to be delivered.

    Example:
        >>> buffer = ChunkBuffer(
        ...     Replies(iter([Reply([1, 2, 3], 3), Reply([4], 1)])),
        ...     lambda b, i, j: b[i:j], lambda parts: sum(parts, []), lambda reply: reply)
        >>> buffer.fill(4), buffer.take(2), buffer.take(2)
        (4, [1, 2], [3, 4])
    """

    def __init__(
        self, replies: Replies, cut: Cut,
        join: Callable[[list[Batch]], Batch], received: Callable[[Reply], Reply],
    ):
        self.replies, self._cut, self._join, self._received = replies, cut, join, received
        self._parts: deque[tuple[Batch, int, int]] = deque()
        self._held = 0

    def fill(self, size: int) -> int:
        """Wait until `size` samples are here or no more come; returns how many of them are."""
        while self._held < size and (reply := next(self.replies, None)) is not None:
            reply = self._received(reply)
            if reply.n:
                for batch, n in reply.parts or ((reply.batch, reply.n),):
                    self._parts.append((batch, 0, n))
                self._held += reply.n
        return min(size, self._held)

    def take(self, size: int) -> Batch:
        """A batch of the next `size` samples, which must be here; or the first Failure in it."""
        pieces = []
        self._held -= size
        while size:
            batch, start, stop = self._parts.popleft()
            n = min(size, stop - start)
            if n < stop - start:
                self._parts.appendleft((batch, start + n, stop))
            pieces.append((batch, start, start + n, start == 0 and n == stop))
            size -= n
        for batch, *_ in pieces:
            if type(batch) is Failure:
                return batch
        batches = [batch if whole else self._cut(batch, start, stop)
                   for batch, start, stop, whole in pieces]
        return batches[0] if len(batches) == 1 else self._join(batches)

    def finish(self) -> None:
        """Run the engine to its end, so that its workers end too; further replies are dropped."""
        for _ in self.replies:
            pass

    def put_back(self, batch: Batch, size: int) -> None:
        """Let `batch` of `size` samples be the next to be taken."""
        self._parts.appendleft((batch, 0, size))
        self._held += size
