"""One pass through the data: the chunks to request, the batches delivered, where to resume."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.pin_memory import pin_memory

from adabatch._types import Batch, Part
from adabatch.data.batches import (
    PER_SAMPLE, Layout, cut, held_to, is_known, join, learn_layout, merged)
from adabatch.data.chunks import ChunkBuffer, ChunkPlan, Cut, Failure, Reply, Request
from adabatch.data.rng import generators_restored, mix
from adabatch.data.sampler import ResizableBatchSampler
from adabatch.interfaces import State

if TYPE_CHECKING:
    from adabatch.data.loader import AdaptiveDataLoader
    from adabatch.data.split import BatchSplit

# Unequal local sizes repeat after world_size batches at most; workers fetch only a few ahead.
_PLANNED = 16
_CHANGED_IN_PLACE = (
    "the batch cannot be tried again, because its tensors were changed in place. Write "
    "inputs = inputs / 255 instead of inputs /= 255, or set a lower limit of micro-batches to "
    "begin with.")

# (start, size, sizes of the rest) -> a piece of the next batch.
Pieces = Callable[[int, int, list[int]], Batch]


@dataclass
class _Drawn:
    """A chunk that was requested and is not yet wholly delivered.

    `state` is its source's before the chunk, at `start` (map-style), or after it (iterable).
    """

    size: int
    worker: int = 0
    state: State | None = None
    arrived: bool = False
    start: int = 0


class Epoch:
    """An epoch of a map-style data set; progress: what state() gave in the run that is resumed."""

    # The last chunk's state is kept when it is delivered: that of an exhausted sampler may already
    # be the next epoch's.
    _keeps = 1

    def __init__(
        self, sampler: ResizableBatchSampler, iterator_id: int, plan: ChunkPlan,
        progress: State | None = None,
    ):
        self.plan = plan
        self._sampler, self._iterator_id = sampler, iterator_id
        self._skip = 0 if progress is None else progress["skip"]
        self._stream = mix(sampler.seed, sampler.epoch)
        self._outstanding: deque[_Drawn] = deque()
        self._offset = 0
        # The next position to request, and how far a user's sampler has been iterated.
        self._next = sampler.shard.first(sampler.position)
        self._reached = sampler.position - self._skip

    def requests(self) -> Iterator[Request]:
        """The chunks in the sampler's order, each drawn when the engine has room for it."""
        sampler, world = self._sampler, self._sampler.shard.world_size
        stateful, epoch = isinstance(sampler.sampler, Part), sampler.epoch
        order = sampler.open_order(self._iterator_id, self._skip)
        while True:
            before = copy.deepcopy(sampler.sampler.state_dict()) if stateful else None
            sizes = self.plan.next_sizes()
            indices = list(islice(order, sum(sizes)))
            if not indices:
                return
            if stateful:
                drawn = _Drawn(len(indices), state=before, arrived=True, start=self._reached)
                self._outstanding.append(drawn)
            at, self._next = self._next, self._next + len(indices) * world
            self._reached = self._next - world + 1  # this process's last index was taken last
            yield Request(self._iterator_id, epoch, self._stream, at, indices, world,
                          sizes=sizes)

    def received(self, reply: Reply, cut: Cut) -> Reply:
        """What is to be delivered of a chunk that arrived."""
        return reply

    def delivered(self, n: int) -> None:
        """`n` further samples were handed to the training loop."""
        self._offset += n
        waiting = self._outstanding
        while len(waiting) > self._keeps and waiting[0].arrived and self._offset >= waiting[0].size:
            drawn = waiting.popleft()
            self._offset -= drawn.size
            self._passed(drawn)

    def _passed(self, drawn: _Drawn) -> None: ...

    def state(self, sampler_state: State) -> tuple[State, State | None]:
        """(the sampler's state, what else is needed to resume), at the samples delivered."""
        current = self._sampler.is_current(self._iterator_id)
        if sampler_state["sampler"] is None or not current:
            return sampler_state, None
        start = self._reached
        if self._outstanding:
            start, state = self._outstanding[0].start, self._outstanding[0].state
            sampler_state = {**sampler_state, "sampler": state}
        return sampler_state, {"skip": sampler_state["position"] - start}


def check_same_streams(progress: State, **here: int) -> None:
    """ValueError where workers or processes would divide an iterable data set otherwise."""
    for name, number in here.items():
        saved = progress.get(name, 1)
        if saved != number:
            raise ValueError(
                "the order of an iterable data set depends on the number of workers and "
                f"processes: saved with {saved}, here {number}. Resume with the same {name}.")


class StreamEpoch(Epoch):
    """An epoch of an iterable data set: chunk k comes from worker k modulo the number of workers.

    On resuming, empty requests let the first real one reach the worker whose turn it was, and
    chunks that were drawn and not delivered are drawn again in their sizes.
    """

    _keeps = 0

    def __init__(
        self, sampler: ResizableBatchSampler, iterator_id: int, plan: ChunkPlan,
        progress: State | None, workers: int, keeps_data: bool,
    ):
        super().__init__(sampler, iterator_id, plan)
        # Whether the next epoch finds the data set as this one leaves it; else workers copy it.
        self._keeps_data, self._given = keeps_data, progress
        self._latest: list[State | None] = [None] * max(1, workers)
        self._num_workers, self._workers = workers, max(1, workers)
        self._states: list[State | None] = [None] * self._workers
        self._ended: set[int] = set()
        self._again: list[int] = []
        self._turn = self._drop = 0
        if progress is not None:
            self._states, self._again = [*progress["states"]], [*progress["chunks"]]
            self._turn, self._drop = progress["worker"], progress["offset"]
            plan.requested, plan.drawn = progress["requested"], progress["drawn"]
        self._first = list(self._states)
        self._offset = self._drop
        self._stateless = False
        self._awaited: deque[tuple[_Drawn, int]] = deque()

    def requests(self) -> Iterator[Request]:
        epoch, self._given = self._sampler.epoch, None
        self._sampler.open_order(self._iterator_id)
        for turn in count():
            worker, real = turn % self._workers, turn >= self._turn
            if real and len(self._ended) == self._workers:
                return
            again = self._again
            size = (again.pop(0) if again else sum(self.plan.next_sizes())) if real else 0
            drawn = _Drawn(size, worker)
            self._awaited.append((drawn, size))
            if real:
                self._outstanding.append(drawn)
            restore = self._first[worker] if turn < self._workers else None
            yield Request(self._iterator_id, epoch, self._stream, 0, range(size), restore=restore)

    def received(self, reply: Reply, cut: Cut) -> Reply:
        drawn, requested = self._awaited.popleft()
        drawn.size, drawn.state, drawn.arrived = reply.n, reply.state, True
        self._stateless |= reply.state is None
        self._latest[drawn.worker] = reply.state
        if reply.ended:
            self._ended.add(drawn.worker)
            self.plan.drawn -= requested - reply.n
        if not requested or not self._drop:
            return reply
        dropped, self._drop = self._drop, 0
        return reply._replace(batch=cut(reply.batch, dropped, reply.n), n=reply.n - dropped)

    def _passed(self, drawn: _Drawn) -> None:
        self._states[drawn.worker] = drawn.state

    def state(self, sampler_state: State) -> tuple[State, State | None]:
        if not self._sampler.position:
            return sampler_state, self._given or self._over()
        if self._stateless:
            name = type(self._sampler.sampler.dataset).__name__
            raise TypeError(
                f"{name} cannot be resumed in the middle of an epoch: give the iterable data set, "
                "or its iterator, state_dict and load_state_dict.")
        front = self._outstanding[0] if self._outstanding else None
        return sampler_state, self._progress(
            [*self._states], worker=0 if front is None else front.worker,
            chunks=[drawn.size for drawn in self._outstanding], offset=self._offset,
            requested=self.plan.requested, drawn=self.plan.drawn)

    def _progress(self, states: list[State | None], **where: object) -> State:
        return {"num_workers": self._num_workers, "states": states,
                "world_size": self._sampler.shard.world_size, **where}

    def _over(self) -> State | None:
        """What the next epoch continues from after the end of this one, if anything."""
        ended = len(self._ended) == self._workers and not self._sampler.is_current(
            self._iterator_id)
        states = [state for state in self._latest if state is not None]
        told = any(state["data"] is not None for state in states)
        if not (ended and self._keeps_data and told and len(states) == self._workers):
            return None
        return self._progress(
            [{**state, "count": 0, "ended": False} for state in states], worker=0, chunks=[],
            offset=0, requested=0, drawn=0, between_epochs=True)


class EpochIterator:
    """The batches of one epoch, of the size that is current when each is drawn; a Failure in
    place of one that could not be read: the loader raises it, and continues with the next batch."""

    def __init__(self, loader: AdaptiveDataLoader, iterator_id: int, progress: State | None):
        self._loader, self._sampler = loader, loader.batch_sampler
        self._micro, self._iterator_id = loader.micro_batches, iterator_id
        if self._micro.is_split:
            loader.learn_layout()
        self._whole, self._sized = loader.collate_in == "consumer", self._sampler.is_sized
        parts = self._micro if self._sized and not self._whole else None
        # Not a method: the plan, which outlives the epoch, must hold no loader.
        cycle = partial(_sizes_ahead, self._sampler, parts)
        # The workers divide what is waited for, unless batches depend on what they are joined from.
        divides = loader.chunk_sizer is not None and is_known(loader.layout)
        workers = loader.num_workers if divides else 1
        self._plan = ChunkPlan(workers, cycle, loader.chunk_sizer)
        # A position from a loaded state is not this epoch's where set_epoch chose another since.
        within = progress is not None and not progress.get("between_epochs")
        progress = progress if self._sampler.position or not within else None
        keeps_data = loader.num_workers == 0 or loader.persistent_workers
        self.epoch = (
            StreamEpoch(self._sampler, iterator_id, self._plan, progress, loader.num_workers,
                        keeps_data)
            if loader.is_stream else Epoch(self._sampler, iterator_id, self._plan, progress))
        self._buffer: ChunkBuffer | None = None

    def __iter__(self) -> Iterator[Batch]:
        sampler = self._sampler
        try:
            while True:
                size = sampler.batch_size
                n = sampler.upcoming(size) if self._sized else self._arrived(size)
                if n == 0:
                    break
                sampler.record(size, n)
                if self._micro.is_split:
                    yield from self._micro_batches(n)
                    continue
                local = sampler.local_draw(n)
                whole = self._whole
                batch = self._collated(local)(0, local, []) if whole else self._next_samples(local)
                self._advance(n, local)
                if type(batch) is Failure:
                    sampler.take_back()
                else:
                    sampler.n_delivered += 1
                if local > 1:
                    yield batch
                else:
                    with self._micro.single():
                        yield batch
                batch = None  # not kept while the next one is awaited
                sampler.check_current(self._iterator_id)
            if self._buffer is not None:
                self._buffer.finish()
            sampler.finish()
        finally:
            # The buffer holds methods of this object: the cycle would keep loader and workers.
            buffer, self._buffer = self._buffer, None
            if buffer is not None and not self._loader.persistent_workers:
                buffer.replies.close()

    def _arrived(self, size: int) -> int:
        """Global samples of the next batch of an unsized epoch, 0 at the end, when they are here.
        """
        # Equal parts: nobody knows how much is left, and all processes must end together.
        world = self._sampler.shard.world_size
        local = size // world
        got = self._request(local, ()).fill(local)
        return 0 if self._sampler.drop_last and got < local else got * world

    def _micro_batches(self, n: int) -> Iterator[Batch]:
        local, shard = self._sampler.local_draw(n), self._sampler.shard
        pieces = self._collated(local) if self._whole else self._pieces(local)
        sizes, part, at = self._micro.start(n, shard, local), 0, 0
        advanced = False
        kept: list[tuple[Batch, int, list[int]]] = []
        while part < len(sizes):
            size = sizes[part]
            batch = pieces(at, size, sizes[part + 1 :])
            kept.append((batch, size, _versions(batch)))
            self._micro.advance(part, size)
            if type(batch) is Failure:
                self._give_up(pieces, sizes[part + 1 :], at + size, part)
            if self._micro.is_last and not advanced:
                self._advance(n, local)
                advanced = True
            if type(batch) is Failure:
                yield batch
                break
            self._sampler.n_delivered += 1
            self._micro.batch = batch
            with nullcontext() if size > 1 else self._micro.single():
                yield batch
            self._sampler.check_current(self._iterator_id)
            part, at = part + 1, at + size
            if self._micro.failed:
                self._put_back(kept)
                self._sampler.n_delivered -= len(kept)
                sizes, part, at, kept = self._micro.start(n, shard, local), 0, 0, []
        self._micro.end()

    def _give_up(self, pieces: Pieces, rest: list[int], at: int, delivered: int) -> None:
        """Pass over the rest of a batch, whose gradients so far are dropped with it."""
        for index, size in enumerate(rest):
            pieces(at, size, rest[index + 1 :])
            at += size
        self._micro.give_up(begun=delivered > 0)
        self._sampler.n_delivered -= delivered
        self._sampler.take_back()

    def _advance(self, n: int, local: int) -> None:
        self._sampler.position += n
        self.epoch.delivered(local)

    def _put_back(self, kept: list[tuple[Batch, int, list[int]]]) -> None:
        if any(_versions(batch) != versions for batch, _, versions in kept):
            raise RuntimeError(_CHANGED_IN_PLACE)
        if not self._whole and self._buffer is not None:
            for batch, size, _ in reversed(kept):
                self._buffer.put_back(batch, size)

    # -- where the samples come from

    def _pieces(self, n: int) -> Pieces:
        """Pieces of the next batch, requested one by one."""
        requested = 0 if self._sized else n

        def take(at: int, size: int, rest: list[int]) -> Batch:
            nonlocal requested
            missing = max(0, at + size - requested)
            requested += missing
            return self._next_samples(size, missing, rest)

        return take

    def _collated(self, n: int) -> Pieces:
        """Pieces of the next batch, collated here as a whole."""
        loader, samples = self._loader, self._next_samples(n)
        if self._micro.is_split and loader.layout is None and type(samples) is not Failure:
            with generators_restored():
                loader.layout = learn_layout(
                    loader.collate_fn, samples[0], samples[1:8], values=False)
        try:
            if type(samples) is not Failure:
                batch = loader.collate_fn(samples)
        except Exception as error:
            samples = Failure(error)
        if type(samples) is Failure:
            return lambda at, size, rest: samples
        if loader.pin_memory and torch.cuda.is_available():
            batch = pin_memory(batch)
        layout = held_to(loader.layout, batch, n, None)[0] if self._micro.is_split else None
        return lambda at, size, rest: batch if size == n else cut(batch, layout, at, at + size)

    def _next_samples(
        self, size: int, missing: int | None = None, rest: Sequence[int] = ()
    ) -> Batch:
        """`size` samples, after requesting the missing ones: all of them where that is None."""
        if missing is None:
            missing = size if self._sized else 0
        buffer = self._request(missing, rest) if missing or not self._buffer else self._buffer
        got = buffer.fill(size)
        if got < size:
            raise RuntimeError(
                f"the sampler gave only {got} of the {size} samples that its length promised")
        return buffer.take(size)

    def _request(self, size: int, rest: Sequence[int]) -> ChunkBuffer:
        self._plan.request(size, rest)
        if self._buffer is None:
            # Not before the first size is requested: the engine draws chunks when it is opened.
            replies = self._loader.open_engine(self.epoch.requests())
            self._buffer = ChunkBuffer(replies, self._cut, self._join, self._received)
        return self._buffer

    def _received(self, reply: Reply) -> Reply:
        if reply.layout is not None and not self._whole:
            known = self._loader.layout
            self._loader.layout = (
                reply.layout if known is None else merged(known, reply.layout))
        if self._loader.chunk_sizer is not None:
            self._loader.chunk_sizer.observe(reply)
        return self.epoch.received(reply, self._cut)

    @property
    def _layout(self) -> Layout:
        return PER_SAMPLE if self._whole else self._loader.layout

    def _cut(self, batch: Batch, start: int, stop: int) -> Batch:
        # Micro-batches are parts of one batch, and padded to no more than its longest sample.
        loader = self._loader
        padded = loader.join_fn is not None or self._micro.is_split
        return cut(batch, self._layout, start, stop, padded)

    def _join(self, parts: list[Batch]) -> Batch:
        return join(parts, self._layout, self._loader.join_fn, self._loader.pin_memory)


def _sizes_ahead(sampler: ResizableBatchSampler, micro: BatchSplit | None) -> list[int]:
    """Local sizes of the next batches, or of their micro-batches, if the batch size stays."""
    size, shard = sampler.batch_size, sampler.shard
    local = [size // shard.world_size]
    if sampler.is_sized and size % shard.world_size:
        at = sampler.position + sampler.last_size
        batches = min(shard.world_size // math.gcd(size, shard.world_size), _PLANNED)
        local = [shard.local_size(at + batch * size, size) for batch in range(batches)]
    return local if micro is None else [part for n in local for part in micro.sizes(size, shard, n)]


def _versions(batch: Batch) -> list[int]:
    """Version counters of the tensors, by which changes in place are noticed."""
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
