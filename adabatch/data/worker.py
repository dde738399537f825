"""What runs in a worker, or in the training process if there are none: fetching and collating."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset, IterDataPipe, MapDataPipe, default_collate, get_worker_info
from torch.utils.data.graph_settings import apply_random_seed, apply_sharding

from adabatch._types import Argument, Batch, CollateFn, Part, Sample, Source
from adabatch.data.batches import PER_SAMPLE, Fixed, Layout, copied, held_to, learn_layout, merged
from adabatch.data.chunks import Failure, Reply, Request
from adabatch.data.order import ONE_PROCESS, EpochAware, Shard
from adabatch.data.rng import generators_restored, mix, sample_keys, seed_generators
from adabatch.interfaces import State


_DTYPE = attrgetter("dtype")
_COMPARED = 4  # samples of a chunk from which a collate_fn's layout is learnt


@runtime_checkable
class FetchesLists(Protocol):
    """A data set that fetches many samples at once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]: ...


class Fetcher(Dataset):
    """Answers Requests for samples of a map-style data set.

    Args:
        collate_fn: of a chunk; None hands over the list of samples.
        learns: whether the layout of batches will be needed.
        seeded: seed the global generators for each sample, and fetch samples one by one.

    Example:
        >>> fetcher = Fetcher([10, 11, 12], None, learns=True, seeded=True)
        >>> reply = fetcher[Request(1, 0, 0, 0, [2, 0])]
        >>> reply.batch, reply.n
        ([12, 10], 2)
    """

    def __init__(
        self, dataset: Source, collate_fn: CollateFn | None, *, learns: bool, seeded: bool,
        shard: Shard = ONE_PROCESS,
    ):
        self.dataset, self._collate_fn = dataset, collate_fn
        self.learns, self._seeded, self.shard = learns, seeded, shard
        self._layout: Layout = None
        self._sent: Layout = None
        self._fixed: Fixed = None
        self._kept: list[Sample] = []
        self._chunks = 0
        self._fetches_lists = isinstance(dataset, FetchesLists)

    def __getitem__(self, request: Request) -> Reply:
        began = time.perf_counter()
        try:
            samples = self._samples(request)
            mixed = len(request.sizes) > 1 and self._collate_fn is not None
            if not mixed or alike(samples):
                return self._reply(samples, began)
            return self._in_parts(request, began, samples)
        except Exception as error:
            if len(request.sizes) < 2 or len(request.indices) <= request.sizes[0]:
                return self._failed(error, len(request.indices))
        return self._in_parts(request, began)

    def knows(self, layout: Layout) -> None:
        """New workers begin with this layout, and compare it less often than the last ones did."""
        if layout is not None:
            self._layout = self._sent = layout
            self._chunks = min(2 * self._chunks + 1, 2**20 - 1)

    def _failed(self, error: Exception, n: int, **more: Argument) -> Reply:
        return Reply(None, n, parts=((Failure(error), n),), **more)

    def _in_parts(
        self, request: Request, began: float, samples: list[Sample] | None = None
    ) -> Reply:
        """Each batch of a chunk on its own, so that one that cannot be read costs no other, and
        dtypes and keys are those of its samples."""
        parts: list[tuple[Batch, int]] = []
        at, layout = 0, None
        for size in request.sizes:
            if indices := request.indices[at : at + size]:
                start = request.start + at * request.stride
                reply = (
                    self[request._replace(indices=indices, start=start, sizes=())]
                    if samples is None else self._reply(samples[at : at + size], began))
                parts += reply.parts or ((reply.batch, reply.n),)
                at, layout = at + reply.n, layout or reply.layout
        seconds = time.perf_counter() - began
        return Reply(None, at, layout, seconds=seconds, parts=parts)

    def _samples(self, request: Request) -> list[Sample]:
        dataset, indices = self.dataset, request.indices
        if self._seeded:
            keys = sample_keys(request.stream, request.start, len(indices), request.stride)
            return self._seeded_draw(keys, lambda at: dataset[indices[at]])
        if not self._fetches_lists:
            return [dataset[index] for index in indices]
        samples = dataset.__getitems__(indices)
        if len(samples) != len(indices):
            raise ValueError(
                f"{type(dataset).__name__}.__getitems__ gave {len(samples)} samples for "
                f"{len(indices)} indices; one for each is needed.")
        return samples

    @staticmethod
    def _seeded_draw(keys: list[int], draw: Callable[[int], Sample]) -> list[Sample]:
        """[draw(0), draw(1), …], each after seeding; the training process's generators stay."""
        with generators_restored() if get_worker_info() is None else nullcontext():
            drawn = []
            for at, key in enumerate(keys):
                seed_generators(key)
                drawn.append(draw(at))
        return drawn

    def _reply(
        self, samples: list[Sample], began: float, ended: bool = False, state: State | None = None
    ) -> Reply:
        n = len(samples)  # before collating: a collate_fn may take the list apart
        if not samples:
            return Reply(samples, 0, None, ended, state, time.perf_counter() - began)
        if self.learns:
            self._learn(samples)
        batch = self._collate_fn(samples) if self._collate_fn else samples
        if self._collate_fn and self._layout is not None:
            # Equal shapes are what default_collate needs in a batch, not in all of them.
            fixed = None if self._collate_fn is default_collate else self._fixed
            layout, self._fixed = held_to(self._layout, batch, n, fixed)
            self._layout = merged(self._layout, layout)
        changed = self._layout != self._sent
        self._sent = self._layout
        return Reply(batch, n, self._layout if changed else None, ended, state,
                     time.perf_counter() - began)

    def _learn(self, samples: list[Sample]) -> None:
        """Learn the layout, or hold it to further samples: of chunks 1, 2, 4, 8, …"""
        collate_fn = self._collate_fn
        if collate_fn is None or collate_fn is default_collate:
            self.learns, self._layout = False, PER_SAMPLE
            if collate_fn is not None:
                self._layout = learn_layout(collate_fn, samples[0])
            return
        self._chunks += 1
        if self._chunks & (self._chunks - 1):
            return
        # Spread over the chunk, because neighbours may be alike, and some of an earlier one.
        unlike = samples[:: -(-len(samples) // _COMPARED)] + self._kept
        self._kept = [copied(sample) for sample in unlike[:_COMPARED // 2]]
        with generators_restored():
            layout = learn_layout(collate_fn, unlike[0], unlike[1:])
        self._layout = layout if self._layout is None else merged(self._layout, layout)


class StreamFetcher(Fetcher):
    """The same for an iterable data set: a request takes samples from this process's iterator.

    Each of many processes reads all samples and keeps one of every world_size; those after the
    last full round are dropped. Requests are seeded by (seed, epoch, worker, samples before).
    """

    _run = -1
    _iterator: Iterator[Sample]
    _ready: Iterator[Sample] = iter(())  # the first sample, where it had to be looked at
    # The state of the latest reply, the samples taken since, and where the iterator has ended, the
    # state from which a resumed run begins the next epoch; this one if it was itself resumed there.
    _before: State | None = None
    _since = 0
    _end: State | None = None
    _resumed_end: State | None = None

    def __getitem__(self, request: Request) -> Reply:
        began = time.perf_counter()
        if request.run != self._run:
            self._run = request.run
            self._begin(request.epoch, request.restore, request.stream)
        wanted = len(request.indices)
        try:
            samples = self._samples(request) if wanted else []
            self._count += len(samples)
            self._ended |= len(samples) < wanted
            state = self._before = self._state()
            return self._reply(samples, began, self._ended, state)
        except Exception as error:
            # What was read of the batch is lost with it, as in a DataLoader.
            return self._failed(error, wanted, ended=self._ended, state=self._state())

    def _begin(self, epoch: int, restore: State | None, stream: int) -> None:
        if isinstance(self.dataset, EpochAware):
            self.dataset.set_epoch(epoch)
        if isinstance(self.dataset, IterDataPipe):
            # All workers shuffle alike, so that sharding gives each its own samples.
            apply_random_seed(self.dataset, torch.Generator().manual_seed(stream))
        restore = restore or self._resumed_end or _NEW
        self._count, self._ended = restore["count"], restore["ended"]
        self._before = self._end = self._resumed_end = None
        self._ready = iter(())
        if self._ended:
            # Not from its state, from which the next epoch may come.
            self._end = self._resumed_end = {**restore, "count": 0, "ended": False}
            self._iterator = iter(())
            return
        if restore["data"] is not None and not restore["of_iterator"]:
            self.dataset.load_state_dict(restore["data"])
        self._iterator = iter(self.dataset)
        if restore["of_iterator"] and isinstance(self._iterator, Part):
            self._iterator.load_state_dict(restore["data"])
        if restore.get("left") is not None:
            self._pass_end(restore["left"])

    def _pass_end(self, left: int) -> None:
        """Let the data set end the epoch of which `left` samples were left, and begin the next."""
        ready = _next_of(self._iterator, left + 1)[left:]
        if ready:  # it began again of itself, as it will have done in the run that saved
            self._ready = iter(ready)
        else:
            self._iterator = iter(self.dataset)

    def _samples(self, request: Request) -> list[Sample]:
        rank, world = self.shard.rank, self.shard.world_size

        def take() -> list[Sample]:
            taken, known = [*self._ready], 0
            if self._before is None:
                # The first of an epoch: a state is needed before its end, however soon that comes.
                known = len(taken := taken or _next_of(self._iterator, 1))
                self._before = self._state()
            taken += _next_of(self._iterator, len(request.indices) * world - len(taken))
            self._since = len(taken) - known
            return taken[rank : len(taken) // world * world : world]

        if not self._seeded:
            return take()
        info = get_worker_info()
        key = mix(request.stream, 0 if info is None else info.id, self._count)
        return self._seeded_draw([key], lambda at: take())[0]

    def _state(self) -> State | None:
        if self._ended:
            self._end = self._end or self._at_end()
            return {**self._end, "ended": True}
        of_iterator = isinstance(self._iterator, Part)
        source = self._iterator if of_iterator else self.dataset
        if not isinstance(source, Part):
            return None
        # A copy, because the data set may change what it handed out.
        data = copy.deepcopy(source.state_dict())
        return {"data": data, "count": self._count, "of_iterator": of_iterator, "ended": False}


    def _at_end(self) -> State:
        """What the next epoch continues from: the data set's state after the last sample, with
        those that it must still give before it ends the epoch, if replies told it in time.

        Not the state after its end: state_dict often counts the next sample as taken.
        """
        before = self._before
        if not isinstance(self.dataset, Part):
            return _NEW
        if before is None or before["of_iterator"]:
            return {**_NEW, "data": copy.deepcopy(self.dataset.state_dict())}
        return {**_NEW, "data": before["data"], "left": self._since}


_NEW: State = {"count": 0, "ended": False, "of_iterator": False, "data": None}


def _next_of(iterator: Iterator[Sample], n: int) -> list[Sample]:
    """Up to n samples; not by islice, which calls iter(), and some iterators begin again then."""
    taken: list[Sample] = []
    try:
        while len(taken) < n:
            taken.append(next(iterator))
    except StopIteration:
        pass
    return taken


def alike(samples: Sequence[Sample]) -> bool:
    """Whether samples have one structure and one type and dtype in each place of it, so that
    default_collate gives parts of them the dtypes and keys that it gives all.

    Example:
        >>> alike([(1, 2.0), (3, 4.0)]), alike([(1, 2.0), (3, 4)]), alike([{"a": 1}, {"b": 1}])
        (True, False, False)
    """
    if len(set(map(type, samples))) > 1:
        return False
    first = samples[0] if samples else None
    if isinstance(first, (torch.Tensor, np.ndarray)):
        return len(set(map(_DTYPE, samples))) == 1
    if isinstance(first, Mapping):
        return len(set(map(tuple, samples))) == 1 and all(
            alike([sample[key] for sample in samples]) for key in first)
    if isinstance(first, (tuple, list)):
        return len(set(map(len, samples))) == 1 and all(map(alike, zip(*samples, strict=True)))
    return True


class WorkerStart:
    """A worker_init_fn that gives get_worker_info() the user's data set and calls the user's."""

    def __init__(self, then: Callable[[int], None] | None):
        self._then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        assert isinstance(info.dataset, Fetcher)
        # Past its own setattr, which refuses in some releases of torch.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if isinstance(info.dataset, (IterDataPipe, MapDataPipe)):
            apply_sharding(info.dataset, info.num_workers, info.id)  # as torch's DataLoader does
        if self._then is not None:
            self._then(worker)
