"""What workers are asked for, and what they answer: chunks of the sampler's order, of sizes that follow the batch size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from adabatch.data.joining import Layout


class Request(NamedTuple):
    """A chunk to fetch.

    Attributes:
        run: number of the pass through the data; a new one starts an iterable data set anew.
        epoch: of the sampler.
        stream: 64-bit key of (seed, epoch) for random augmentation.
        start: position in the order of the first sample.
        indices: of the samples; of an iterable data set only their number counts.
        stride: from each sample's position to the next one's, the number of processes.
        restore: an iterable data set's state to go on from.
    """

    run: int
    epoch: int
    stream: int
    start: int
    indices: Sequence[Any]
    stride: int = 1
    restore: Any = None


class Reply(NamedTuple):
    """A chunk fetched; a named tuple, so that torch's pin-memory thread reaches the batch.

    Attributes:
        batch: collated, or the list of samples where the consumer collates.
        n: samples in it.
        layout: how such batches are cut and joined; in a process's first reply.
        ended: an iterable data set has no more samples in this worker.
        state: of an iterable data set after this chunk.
        seconds: that fetching and collating took.
        nbytes: of the batch; in a process's first reply.
    """

    batch: Any
    n: int
    layout: Layout = None
    ended: bool = False
    state: Any = None
    seconds: float = 0.0
    nbytes: int = 0


def split_into(total: int, parts: int) -> list[int]:
    """`parts` sizes that add up to `total`, as equal as possible, larger ones first.

    Example:
        >>> split_into(10, 3), split_into(3, 1)
        ([4, 3, 3], [3])
    """
    small, more = divmod(total, parts)
    return [small + 1] * more + [small] * (parts - more)


class Pace:
    """How many samples a chunk should have at least, because handing one over takes worker and consumer some tenths of a millisecond whatever its size.

    As many as take 4 ms to fetch; while the batch size keeps changing, four batches that take 32 ms at most (the longer a chunk, the fewer batches begin in one
    and end in the next, and are copied). No more than 8 MiB, and towards the end of the epoch few enough for the workers to end together.

    Example:
        >>> pace = Pace()
        >>> pace.measure(Reply(None, 10, seconds=1e-3, nbytes=10_000))
        >>> pace.least
        40
        >>> for size in (28, 32, 28, 32): pace.asked(size)
        >>> pace.least
        128
    """

    _SECONDS, _SECONDS_UNSTEADY, _NBYTES = 4e-3, 32e-3, 2**23

    def __init__(self):
        self._seconds = self._nbytes = 0.0
        self._size, self._changes = 0, 0

    def asked(self, size: int) -> None:
        """The batch size asked for now."""
        self._changes = min(self._changes + 2, 16) if size != self._size else max(self._changes - 1, 0)
        self._size = size

    def measure(self, reply: Reply) -> None:
        """Learn from a chunk that arrived."""
        if reply.n:
            self._nbytes = max(self._nbytes, reply.nbytes / reply.n)
            seconds = reply.seconds / reply.n
            self._seconds = seconds if not self._seconds else 0.75 * self._seconds + 0.25 * seconds

    @property
    def least(self) -> int:
        """Samples; 1 before anything was measured."""
        if not self._nbytes or not self._seconds:
            return 1
        samples = self._SECONDS / self._seconds
        if self._changes >= 8:
            samples = max(samples, min(4 * self._size, self._SECONDS_UNSTEADY / self._seconds))
        return max(1, int(min(samples, self._NBYTES / self._nbytes)))


class ChunkPlan:
    """Sizes of the chunks to draw: what is asked for and not yet drawn is shared out among the workers; what is drawn ahead ends where batches will end.

    At a constant batch size every chunk is one batch or several, and nothing needs joining.

    Args:
        workers: that fetch at the same time; 0 for none.
        cycle: gives the sizes that a batch of the present size will be asked for in.
        pace: says how many samples a chunk should have at least; None for one.
        left: samples that this process has still to draw in this epoch, where it is known.

    Attributes:
        drawn, asked: samples of this epoch so far.
        rest: sizes still to be asked for of the present batch.

    Example:
        >>> plan = ChunkPlan(2, lambda: [8])
        >>> plan.ask(8, [])
        >>> [plan.next_size() for _ in range(4)]
        [4, 4, 8, 8]
    """

    def __init__(self, workers: int, cycle: Callable[[], list[int]], pace: Pace | None = None, left: float = math.inf):
        self._workers, self._cycle, self._pace, self._left = max(1, workers), cycle, pace, left
        self.drawn = self.asked = 0
        self.rest: list[int] = []
        self._share = 1

    def ask(self, size: int, rest: list[int]) -> None:
        """The consumer asks for so many samples, and will then ask for the rest."""
        self.asked += size
        self.rest = rest
        self._share = max(1, -(-(self.asked - self.drawn) // self._workers), self._worth())

    def next_size(self) -> int:
        """Size of the next chunk; counted as drawn."""
        ahead = self.drawn - self.asked
        size = min(-ahead, self._share) if ahead < 0 else self._to_boundary(ahead)
        if ahead >= 0 and self._pace is not None:
            least = min(self._pace.least, max(self._worth(), (self._left - self.drawn) / (2 * self._workers)))
            while size < least:
                size += self._to_boundary(ahead + size)
        self.drawn += size
        return size

    def _worth(self) -> int:
        """Samples that are not worth being shared out."""
        return self._pace.least // 4 if self._pace is not None else 0

    def _to_boundary(self, ahead: int) -> int:
        for size in self.rest:
            if ahead < size:
                return size - ahead
            ahead -= size
        cycle = self._cycle()
        ahead %= sum(cycle)
        for size in cycle:
            if ahead < size:
                return size - ahead
            ahead -= size
        raise AssertionError("a remainder is smaller than what it is a remainder of")


class Requests:
    """The sampler of torch's DataLoader below: yields a Request whenever the engine has room for one.

    Attributes:
        epoch: the Requests to come, made by the loader for each epoch.
    """

    def __init__(self):
        self.epoch: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.epoch


class ChunkBuffer:
    """Chunks that have arrived, from which exactly as many samples are taken as are asked for.

    Args:
        replies: the engine's iterator.
        cut, join: of batches, as in joining.
        received: called with each reply; gives what of it is to be delivered.

    Example:
        >>> buffer = ChunkBuffer(iter([Reply([1, 2, 3], 3), Reply([4], 1)]), lambda b, i, j: b[i:j], lambda parts: sum(parts, []))
        >>> buffer.fill(4), buffer.take(2), buffer.take(2)
        (4, [1, 2], [3, 4])
    """

    def __init__(self, replies: Iterator[Reply], cut: Callable, join: Callable, received: Callable[[Reply], Reply] = lambda reply: reply):
        self.replies, self._cut, self._join, self._received = replies, cut, join, received
        self._parts: deque[tuple[Any, int, int]] = deque()
        self._held = 0

    def fill(self, size: int) -> int:
        """Wait until `size` samples are here or no more come; the smaller of `size` and what is here."""
        while self._held < size:
            reply = self._next()
            if reply is None:
                break
            reply = self._received(reply)
            if reply.n:
                self._parts.append((reply.batch, 0, reply.n))
                self._held += reply.n
        return min(size, self._held)

    def _next(self) -> Reply | None:
        try:
            return next(self.replies, None)
        except (ConnectionError, EOFError) as error:
            if not hasattr(self.replies, "_workers") or "in DataLoader worker process" in str(error):
                raise  # the data set's own
            raise RuntimeError("a DataLoader worker exited unexpectedly while it handed over a batch: was it killed, or out of memory?") from error

    def take(self, size: int) -> Any:
        """A batch of the next `size` samples, which must be here."""
        pieces = []
        self._held -= size
        while size:
            batch, start, stop = self._parts.popleft()
            n = min(size, stop - start)
            if n < stop - start:
                self._parts.appendleft((batch, start + n, stop))
            whole = start == 0 and n == stop
            pieces.append(batch if whole else self._cut(batch, start, start + n))
            size -= n
        return pieces[0] if len(pieces) == 1 else self._join(pieces)

    def finish(self) -> None:
        """Let the engine come to its end, so that its workers do too; what it still gives is dropped."""
        for _ in self.replies:
            pass

    def put_back(self, batch: Any, size: int) -> None:
        """Let `batch` of `size` samples be the next to be taken."""
        self._parts.appendleft((batch, 0, size))
        self._held += size
