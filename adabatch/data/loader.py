"""AdaptiveDataLoader: a data loader whose batch size may be set while it runs, and whose runs can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from adabatch._checks import check_version
from adabatch.data.chunks import Pace, Reply, Request, Requests
from adabatch.data.collating import fast_collate_for
from adabatch.data.deliveries import EpochIterator
from adabatch.data.epochs import Epoch, check_same_streams
from adabatch.data.from_dataloader import arguments_of
from adabatch.data.joining import JoinFn, Layout
from adabatch.data.orders import StreamOrder
from adabatch.data.sampler import ResizableBatchSampler
from adabatch.data.sampler_view import SamplerView
from adabatch.data.seeding import mix
from adabatch.data.workers import Fetcher, StreamFetcher, WorkerStart
from adabatch.micro_batches.batches import MicroBatches, retrying

COLLATE_IN = ("worker", "consumer")


class AdaptiveDataLoader(SamplerView):
    """A DataLoader whose batches have the size that `loader.batch_size` is when they are asked for, with any number of workers.

    Workers fetch and collate chunks of the order ahead of time; what comes out is cut and joined to size. So a change holds on the very next batch, and nothing
    fetched is lost or repeated. While the size stays the same a chunk is a batch, or several where batches take less than 4 ms to fetch and the collate_fn is
    torch's, and nothing is joined. Batches cut from one chunk share its memory but no element of it, and may be changed in place.

    Args:
        dataset: map-style, or iterable (each worker reads its own copy: let it take its share by torch's get_worker_info, as for a DataLoader).
        batch_size: of the first batch.
        shuffle: a new order each epoch, a permutation keyed by (seed, epoch).
        sampler: the caller's own order, taken as it is; excludes shuffle.
        seed: of the shuffle, and of random augmentation.
        drop_last: leave out a last batch shorter than asked for.
        rank, world_size: of this process among those that share one order. batch_size, recent, position, num_samples, len() and the state are global and the
            same in all; each gets its share of every batch, within one sample of the others', and all have equally many (see ResizableBatchSampler). A sampler
            of the caller's own must give the same order in all; an iterable data set the whole stream: each process keeps every world_size-th sample, so that
            its batches are multiples of world_size.
        collate_in: 'worker', chunk by chunk, or 'consumer', for a collate_fn that must see the whole batch (mixup): workers then hand over samples.
        join_fn: (tensors, axis, path) -> tensor, joins chunks whose shapes differ beyond the axis that counts samples; adabatch.data.pad_right pads.
        seed_samples: seed torch's, NumPy's and Python's global generators for each sample by (seed, epoch, position), so that random augmentation does not
            depend on workers and batch sizes, and repeats on resuming. This takes 1.5 µs a sample where the data set draws from one of them, and nothing where
            it does not; the chunk in which it first does is fetched twice.
        kwargs: of torch.utils.data.DataLoader: num_workers, collate_fn, pin_memory, timeout, worker_init_fn, multiprocessing_context, generator,
            prefetch_factor, persistent_workers.

    Attributes:
        batch_sampler: the order and the position in it, counted in samples delivered.
        recent: (size asked for, size delivered) of the last batches delivered, newest last.
        n_batches: batches delivered so far, over all epochs.
        n_iterations: how often an iteration was begun.
        is_stream: whether the data set is iterable.
        micro_batches: how a batch is cut, where it arrives in parts (adabatch.wrap with max_micro_batch_size).

    Raises:
        ValueError, TypeError: arguments of the sampler or of DataLoader that are out of range, a sampler together with shuffle, in_order=False.

    Example:
        >>> loader = AdaptiveDataLoader(torch.arange(10), batch_size=4)
        >>> for batch in loader:
        ...     print(batch.tolist(), loader.samples_left)
        ...     loader.batch_size = 5
        [0, 1, 2, 3] 6
        [4, 5, 6, 7, 8] 1
        [9] 0
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        sampler: Sampler | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        collate_in: str = "worker",
        join_fn: JoinFn | None = None,
        seed_samples: bool = True,
        **kwargs: Any,
    ):
        self.is_stream = isinstance(dataset, IterableDataset)
        if self.is_stream and (shuffle or sampler is not None):
            raise ValueError(f"the data set is iterable-style ({type(dataset).__name__}) and has an order of its own: leave shuffle and sampler away.")
        if sampler is not None and shuffle:
            raise ValueError("a sampler decides the order: pass either sampler= or shuffle=True")
        if kwargs.get("in_order") is False:
            raise ValueError("in_order=False lets batches overtake each other, so that the size of the one delivered is not known. Leave in_order at True.")
        if collate_in not in COLLATE_IN:
            raise ValueError(f"collate_in must be one of {COLLATE_IN}, got {collate_in!r}")
        order = StreamOrder(dataset) if self.is_stream else sampler
        self.dataset, self.sampler = dataset, sampler
        options = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last, "rank": rank, "world_size": world_size}
        self.batch_sampler = ResizableBatchSampler(dataset, batch_size, sampler=order, **options)
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.collate_in, self.join_fn, self.seed_samples = collate_in, join_fn, seed_samples
        self.micro_batches = MicroBatches()
        self.n_iterations = 0
        self._requests = Requests()
        self._epoch: Epoch | None = None
        self._progress: dict[str, Any] | None = None
        self._layout: Layout = None
        self._pace: Pace | None = None
        self._loader = self._engine(**kwargs)

    def _engine(self, *, worker_init_fn: Callable[[int], None] | None = None, generator: torch.Generator | None = None, **kwargs: Any) -> DataLoader:
        self.worker_init_fn, self.generator = worker_init_fn, generator
        self.num_workers, self.pin_memory = kwargs.get("num_workers", 0), kwargs.get("pin_memory", False)
        if self.collate_in == "consumer":
            kwargs["pin_memory"] = False  # samples are not what is handed over
        self._fetcher = (StreamFetcher if self.is_stream else Fetcher)(
            self.dataset, None if self.collate_in == "consumer" else fast_collate_for(self.collate_fn), learns=self.num_workers > 0, seeded=self.seed_samples
        )
        if self.num_workers and not self.is_stream and (self.collate_in == "consumer" or self.collate_fn is default_collate):
            # Only where batches are the same whatever chunks they are cut from: not where a collate_fn pads, or an iterable data set is shared out by chunks.
            self._pace = Pace()
        self._fetcher.processes = self.batch_sampler.processes
        # Its own generator, because a DataLoader draws a number at each iter(): a resumed run draws once more, and would go on with other dropout masks.
        generator = torch.Generator() if generator is None else generator
        start = WorkerStart(worker_init_fn)
        engine = DataLoader(
            self._fetcher, batch_size=None, sampler=self._requests, collate_fn=_as_it_is, worker_init_fn=start, generator=generator, **kwargs
        )
        self.timeout, self.multiprocessing_context = engine.timeout, engine.multiprocessing_context
        self.prefetch_factor, self.persistent_workers = engine.prefetch_factor, engine.persistent_workers
        return engine

    @classmethod
    def from_loader(cls, loader: DataLoader, **options: Any) -> AdaptiveDataLoader:
        """Take over a plain DataLoader: data set, order, collate_fn, workers, pinning, generator.

        A shuffling loader gets the keyed order, seeded from its generator (or from torch's); torch's DistributedSampler gives way to the global order, with its
        seed and the same global batch; any other sampler is taken as it is.

        Args:
            loader: the plain one.
            options: arguments of AdaptiveDataLoader besides, or instead: with world_size= also seed=, which must be the same in all processes.

        Raises:
            ValueError: batching switched off, a batch sampler of the caller's own, or a sampler that shares samples out otherwise.
            TypeError: not a DataLoader.
        """
        arguments, batch_sampler = arguments_of(loader)
        adopted = cls(loader.dataset, **{**arguments, **options})
        if batch_sampler is not None:
            adopted.batch_sampler, adopted.sampler = batch_sampler, batch_sampler.sampler
        return adopted

    @property
    def is_last_micro_batch(self) -> bool:
        """Whether the optimizer is to step after this batch: False only for micro-batches that more of the same batch follow."""
        return self.micro_batches.is_last

    def __len__(self) -> int:
        """Batches (where they arrive in parts, micro-batches) still to come in this epoch at the present size; TypeError where the length is not known."""
        whole, others = self.batch_sampler._to_come()
        parts, processes = self.micro_batches.sizes, self.batch_sampler.processes
        return whole * len(parts(self.batch_size, processes)) + sum(len(parts(size, processes)) for size in others)

    def learn_layout(self) -> None:
        """Learn how batches are cut although there are no workers: for batches that are begun anew in smaller micro-batches."""
        self._fetcher.learns = self._layout is None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order, of the next iteration."""
        self.batch_sampler.set_epoch(epoch)

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, counted in samples delivered (not in those that workers fetched), as plain numbers and tensors.

        Raises:
            RuntimeError: between two micro-batches of one batch.
            TypeError: in the middle of an iterable data set that has no state_dict.
        """
        if not self.is_last_micro_batch:
            raise RuntimeError(
                "a checkpoint between two micro-batches would lose their gradients: save where loader.is_last_micro_batch is True, after the step"
            )
        sampler_state = self.batch_sampler.state_dict()
        progress = self._progress
        if self._epoch is not None:
            sampler_state, progress = self._epoch.state(sampler_state)
        return {"version": 1, "sampler": sampler_state, "progress": progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state` was saved: the same samples in the same order.

        With a map-style data set the number of workers may differ; an iterable one goes on from its own states, with the same number of workers.

        Raises:
            ValueError: another version, another kind of order, another number of workers of an iterable data set.
        """
        check_version(state, 1, "AdaptiveDataLoader")
        progress = state["progress"]
        if self.is_stream and progress is not None:
            check_same_streams(progress, num_workers=self.num_workers, world_size=self.batch_sampler.processes.world_size)
        self.batch_sampler.load_state_dict(state["sampler"])
        self._epoch, self._progress = None, progress

    # -- iteration

    def __iter__(self) -> Iterator[Any]:
        self.n_iterations += 1
        deliveries = EpochIterator(self, self.batch_sampler._start())
        self._epoch = deliveries.epoch
        yield from deliveries

    def _open(self, requests: Iterator[Request]) -> Iterator[Reply]:
        """The replies to these requests, in their order."""
        if self.num_workers == 0 and not self._loader.pin_memory:
            return map(self._fetcher.__getitem__, requests)
        self._requests.epoch = requests
        if self.generator is None:
            self._loader.generator.manual_seed(mix(self.batch_sampler.seed, self.batch_sampler.epoch, self.batch_sampler.processes.rank))
        return iter(self._loader)

    def retrying(self) -> AbstractContextManager[None]:
        """Around the body of the training loop: where memory runs out, the micro-batch is halved and the same batch comes again from its start.

        What the failed attempt added to the gradients is dropped; running statistics of batch norm keep what it added to them.

        Raises:
            RuntimeError: the optimizer does not wait for the last micro-batch: use the one that adabatch.wrap(..., max_micro_batch_size=) returns. Or there
                are other processes, which would wait for this one.
            The error itself: micro-batches of one sample fail too, or the step was already taken.
        """
        return retrying(self.micro_batches, self.batch_sampler.processes.world_size)


def _as_it_is(reply: Reply) -> Reply:
    return reply
