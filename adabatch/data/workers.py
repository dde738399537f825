"""What runs in a worker, or in the training process where there is none: fetching and collating a chunk."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, get_worker_info

from adabatch.data.chunks import Reply, Request
from adabatch.data.collating import Stacked, quick_collate
from adabatch.data.joining import COLUMN, Layout, learn_layout
from adabatch.data.processes import Processes
from adabatch.data.seeding import SampleSeeds, mix

# Bytes of samples fetched before they are stacked, where a sample has so many that the batch would leave the processor's cache meanwhile.
_CACHED, _LARGE = 2**21, 2**11


class Fetcher(Dataset):
    """Answers Requests for samples of a map-style data set.

    Args:
        dataset: map-style.
        collate_fn: of a chunk; None hands over the list of samples.
        learns: whether the layout of batches will be needed.
        seeded: seed random augmentation per sample and epoch.

    Example:
        >>> reply = Fetcher([10, 11, 12], None, learns=True, seeded=True)[Request(1, 0, 0, 0, [2, 0])]
        >>> reply.batch, reply.n
        ([12, 10], 2)
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, *, learns: bool, seeded: bool):
        self.dataset, self._collate_fn = dataset, collate_fn
        self.learns, self._seeded = learns, seeded
        self._seeds: SampleSeeds | None = None
        self._at_a_time: int | None = None  # 0: fetched and collated at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seeds": None}  # bound to this process's generators

    def __getitem__(self, request: Request) -> Reply:
        began = time.perf_counter()
        n, piece = len(request.indices), self._at_a_time
        if piece and n >= 2 * piece:
            return Reply(self._stacked(request, piece), n, seconds=time.perf_counter() - began)
        reply = self._reply(self._samples(request), began)
        if piece is None and n:
            self._at_a_time = self._learn_piece(_nbytes(reply.batch) // n)
        return reply

    def _learn_piece(self, nbytes: int) -> int:
        stacks = self._collate_fn is quick_collate and not callable(getattr(self.dataset, "__getitems__", None))
        return max(1, _CACHED // nbytes) if stacks and nbytes >= _LARGE else 0

    def _stacked(self, request: Request, piece: int) -> Any:
        batch = Stacked(len(request.indices))
        for at in range(0, len(request.indices), piece):
            part = request._replace(start=request.start + at * request.stride, indices=request.indices[at : at + piece])
            batch.add(self._samples(part))
        return batch.result()

    def _samples(self, request: Request) -> list[Any]:
        if not self._seeded:
            return self._fetch_all(request.indices)
        return self._own_seeds().fetch(self._fetch_all, self.dataset.__getitem__, request.stream, request.start, request.indices, request.stride)

    def _own_seeds(self) -> SampleSeeds:
        if self._seeds is None:
            self._seeds = SampleSeeds(in_worker=get_worker_info() is not None)
        return self._seeds

    def _fetch_all(self, indices: list[Any]) -> list[Any]:
        dataset = self.dataset
        if callable(getattr(dataset, "__getitems__", None)):
            samples = dataset.__getitems__(indices)
            if len(samples) != len(indices):
                raise ValueError(f"{type(dataset).__name__}.__getitems__ gave {len(samples)} samples for {len(indices)} indices; one for each is needed.")
            return samples
        return [dataset[index] for index in indices]

    def _reply(self, samples: list[Any], began: float, ended: bool = False, state: Any = None) -> Reply:
        layout: Layout = None
        if samples and self.learns:
            self.learns = False
            layout = COLUMN if self._collate_fn is None else learn_layout(self._collate_fn, samples[0])
        # Counted before collating: a collate_fn may take the list apart.
        n = len(samples)
        batch = samples if self._collate_fn is None or not samples else self._collate_fn(samples)
        return Reply(batch, n, layout, ended, state, time.perf_counter() - began, 0 if layout is None else _nbytes(batch))


class StreamFetcher(Fetcher):
    """The same for an iterable data set: each request takes so many samples from this process's iterator.

    Of many processes each goes through all samples, and keeps one of every world_size; those after the last full round are left out, because all must come
    to the end together.

    Random augmentation is seeded for each request: (seed, epoch, worker, samples taken before).
    """

    _run = -1
    processes = Processes()

    def __getitem__(self, request: Request) -> Reply:
        began = time.perf_counter()
        if request.run != self._run:
            self._run = request.run
            self._begin(request.epoch, request.restore)
        wanted = len(request.indices)
        samples = self._samples(request) if wanted else []
        self._count += len(samples)
        self._ended |= len(samples) < wanted
        return self._reply(samples, began, self._ended, self._state())

    def _begin(self, epoch: int, restore: dict[str, Any] | None) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._count = 0 if restore is None else restore["count"]
        self._ended = restore is not None and restore["ended"]
        if self._ended:
            # Not from its state: many data sets begin anew after their end.
            self._iterator: Any = iter(())
            return
        if restore is not None and not restore["of_iterator"]:
            self.dataset.load_state_dict(restore["data"])
        self._iterator = iter(self.dataset)
        if restore is not None and restore["of_iterator"]:
            self._iterator.load_state_dict(restore["data"])

    def _samples(self, request: Request) -> list[Any]:
        def take() -> list[Any]:
            rank, world = self.processes.rank, self.processes.world_size
            taken = list(islice(self._iterator, len(request.indices) * world))
            return taken[rank : len(taken) // world * world : world]

        if not self._seeded:
            return take()
        info = get_worker_info()
        return self._own_seeds().seeded(mix(request.stream, 0 if info is None else info.id, self._count), take)

    def _state(self) -> dict[str, Any] | None:
        if self._ended:
            return {"data": None, "count": self._count, "of_iterator": False, "ended": True}
        of_iterator = hasattr(self._iterator, "state_dict")
        if not of_iterator and not (hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")):
            return None
        # A copy, because the data set may go on changing what it handed out.
        data = copy.deepcopy((self._iterator if of_iterator else self.dataset).state_dict())
        return {"data": data, "count": self._count, "of_iterator": of_iterator, "ended": False}


class WorkerStart:
    """The worker_init_fn below: lets get_worker_info().dataset be the caller's data set, then calls the caller's own.

    Args:
        then: the caller's worker_init_fn, or None.
    """

    def __init__(self, then: Callable[[int], None] | None):
        self._then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        # Past its own setattr, which refuses in some releases of torch.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._then is not None:
            self._then(worker)


def _nbytes(batch: Any) -> int:
    """Of its tensors and arrays, and of anything else a little, so that it is never 0."""
    return sum(getattr(leaf, "nbytes", 8) for leaf in tree_leaves(batch))
