"""What workers are asked for, and what they answer: chunks of the sampler's order, of sizes that follow the batch size."""

from __future__ import annotations

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
    """

    batch: Any
    n: int
    layout: Layout = None
    ended: bool = False
    state: Any = None


def split_into(total: int, parts: int) -> list[int]:
    """`parts` sizes that add up to `total`, as equal as possible, larger ones first.

    Example:
        >>> split_into(10, 3), split_into(3, 1)
        ([4, 3, 3], [3])
    """
    small, more = divmod(total, parts)
    return [small + 1] * more + [small] * (parts - more)


class ChunkPlan:
    """Sizes of the chunks to draw: what is asked for and not yet drawn is shared out among the workers; what is drawn ahead ends where batches will end.

    At a constant batch size every chunk is one batch, and nothing needs cutting or joining.

    Args:
        workers: that fetch at the same time; 0 for none.
        cycle: gives the sizes that a batch of the present size will be asked for in.

    Attributes:
        drawn, asked: samples of this epoch so far.
        rest: sizes still to be asked for of the present batch.

    Example:
        >>> plan = ChunkPlan(2, lambda: [8])
        >>> plan.ask(8, [])
        >>> [plan.next_size() for _ in range(4)]
        [4, 4, 8, 8]
    """

    def __init__(self, workers: int, cycle: Callable[[], list[int]]):
        self._workers, self._cycle = max(1, workers), cycle
        self.drawn = self.asked = 0
        self.rest: list[int] = []
        self._share = 1

    def ask(self, size: int, rest: list[int]) -> None:
        """The consumer asks for so many samples, and will then ask for the rest."""
        self.asked += size
        self.rest = rest
        self._share = max(1, -(-(self.asked - self.drawn) // self._workers))

    def next_size(self) -> int:
        """Size of the next chunk; counted as drawn."""
        ahead = self.drawn - self.asked
        size = min(-ahead, self._share) if ahead < 0 else self._to_boundary(ahead)
        self.drawn += size
        return size

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
