"""One pass through the data: which chunks are asked for, and where a resumed run goes on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from adabatch.data.chunks import ChunkPlan, Reply, Request
from adabatch.data.orders import is_stateful
from adabatch.data.sampler import ResizableBatchSampler
from adabatch.data.seeding import mix

Cut = Callable[[Any, int, int], Any]


@dataclass
class _Drawn:
    """A chunk that was asked for and is not yet wholly delivered.

    `state` is that of what it came from, before it (map-style; `start` is the position in the order that it stands at) or after it (iterable).
    """

    size: int
    worker: int = 0
    state: Any = None
    arrived: bool = False
    start: int = 0


class Epoch:
    """An epoch of a map-style data set.

    Args:
        sampler: keeps the position, in samples delivered.
        generation: of the sampler's newest iterator.
        plan: sizes of the chunks.
        progress: what state() gave in the run that is resumed.
    """

    # The last chunk's state is kept when it is delivered: an exhausted sampler's own may already be that of the next epoch.
    _keeps = 1

    def __init__(self, sampler: ResizableBatchSampler, generation: int, plan: ChunkPlan, progress: dict[str, Any] | None = None):
        self.plan = plan
        self._sampler, self._generation = sampler, generation
        self._skip = 0 if progress is None else progress["skip"]
        self._stream = mix(sampler.seed, sampler.epoch)
        self._outstanding: deque[_Drawn] = deque()
        self._offset = 0
        self._processes = sampler.processes
        # The next position to ask for, and up to where a sampler of the caller's own has been gone through.
        self._next, self._reached = self._processes.first(sampler.position), sampler.position - self._skip

    def requests(self) -> Iterator[Request]:
        """The chunks in the sampler's order, each drawn when the engine has room for it."""
        sampler, stateful, world = self._sampler, is_stateful(self._sampler.sampler), self._processes.world_size
        epoch = sampler.epoch
        order = sampler._begin(self._generation, self._skip)
        while True:
            before = copy.deepcopy(sampler.sampler.state_dict()) if stateful else None
            indices = list(islice(order, self.plan.next_size()))
            if not indices:
                return
            if stateful:
                self._outstanding.append(_Drawn(len(indices), state=before, arrived=True, start=self._reached))
            at, self._next = self._next, self._next + len(indices) * world
            # This process's last index is the last one taken.
            self._reached = self._next - world + 1
            yield Request(self._generation, epoch, self._stream, at, indices, world)

    def received(self, reply: Reply, cut: Cut) -> Reply:
        """A chunk arrived; what of it is to be delivered."""
        return reply

    def delivered(self, n: int) -> None:
        """So many samples more are the training loop's."""
        self._offset += n
        while len(self._outstanding) > self._keeps and self._outstanding[0].arrived and self._offset >= self._outstanding[0].size:
            drawn = self._outstanding.popleft()
            self._offset -= drawn.size
            self._passed(drawn)

    def _passed(self, drawn: _Drawn) -> None:
        pass

    def state(self, sampler_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(the sampler's state, what besides it says where to go on), at the samples delivered."""
        if sampler_state["sampler"] is None or self._sampler._generation != self._generation:
            return sampler_state, None
        if self._outstanding:
            front = self._outstanding[0]
            return {**sampler_state, "sampler": front.state}, {"skip": sampler_state["position"] - front.start}
        return sampler_state, {"skip": sampler_state["position"] - self._reached}


def check_same_streams(progress: dict[str, Any], **here: int) -> None:
    """Refuse to resume an iterable data set where its workers or processes would share it otherwise.

    Raises:
        ValueError: another number of workers or processes than saved.
    """
    for name, number in here.items():
        if progress.get(name, 1) != number:
            raise ValueError(
                f"the order of an iterable data set depends on the number of workers and processes: saved with {progress.get(name, 1)}, here {number}. "
                f"Resume with the same {name}."
            )


class StreamEpoch(Epoch):
    """An epoch of an iterable data set: chunk k comes from worker k mod the number of workers, whatever that worker's iterator gives.

    Where the run is resumed, requests of nothing let the first real one reach the worker whose turn it was, and the chunks that were drawn and not
    delivered are drawn again in their sizes, so that the rest of the order is the same.
    """

    _keeps = 0

    def __init__(self, sampler: ResizableBatchSampler, generation: int, plan: ChunkPlan, progress: dict[str, Any] | None, workers: int):
        super().__init__(sampler, generation, plan)
        self._workers = max(1, workers)
        self._states: list[Any] = [None] * self._workers
        self._ended: set[int] = set()
        self._turn, self._again, self._drop = 0, [], 0
        if progress is not None:
            self._states = list(progress["states"])
            self._turn, self._again, self._drop = progress["worker"], list(progress["chunks"]), progress["offset"]
            plan.asked, plan.drawn = progress["asked"], progress["drawn"]
        self._first = list(self._states)
        self._offset = self._drop
        self._num_workers, self._stateless = workers, False
        self._awaited: deque[tuple[_Drawn, int]] = deque()

    def requests(self) -> Iterator[Request]:
        epoch = self._sampler.epoch
        self._sampler._begin(self._generation)
        for turn in count():
            worker = turn % self._workers
            if turn >= self._turn and len(self._ended) == self._workers:
                return
            size = 0 if turn < self._turn else self._again.pop(0) if self._again else self.plan.next_size()
            drawn = _Drawn(size, worker)
            self._awaited.append((drawn, size))
            if turn >= self._turn:
                self._outstanding.append(drawn)
            yield Request(self._generation, epoch, self._stream, 0, range(size), restore=self._first[worker] if turn < self._workers else None)

    def received(self, reply: Reply, cut: Cut) -> Reply:
        drawn, asked = self._awaited.popleft()
        drawn.size, drawn.state, drawn.arrived = reply.n, reply.state, True
        self._stateless |= reply.state is None
        if reply.ended:
            self._ended.add(drawn.worker)
            self.plan.drawn -= asked - reply.n
        if not asked or not self._drop:
            return reply
        dropped, self._drop = self._drop, 0
        return reply._replace(batch=cut(reply.batch, dropped, reply.n), n=reply.n - dropped)

    def _passed(self, drawn: _Drawn) -> None:
        self._states[drawn.worker] = drawn.state

    def state(self, sampler_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        if not self._sampler.position:
            return sampler_state, None
        if self._stateless:
            name = type(self._sampler.sampler.dataset).__name__
            raise TypeError(f"{name} cannot be resumed in the middle of an epoch: give the iterable data set, or its iterator, state_dict and load_state_dict.")
        front = self._outstanding[0] if self._outstanding else None
        return sampler_state, {
            "num_workers": self._num_workers,
            "world_size": self._processes.world_size,
            "states": list(self._states),
            "worker": 0 if front is None else front.worker,
            "chunks": [drawn.size for drawn in self._outstanding],
            "offset": self._offset,
            "asked": self.plan.asked,
            "drawn": self.plan.drawn,
        }
