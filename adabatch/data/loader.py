"""AdaptiveDataLoader: a data loader whose batch size may change while it runs, and that resumes."""

from __future__ import annotations

import html
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from adabatch._checks import check_version
from adabatch._types import Argument, Batch, CollateFn
from adabatch.data.batches import JoinFn, Layout
from adabatch.data.chunks import ChunkSizer, Failure, Replies, Request
from adabatch.data.epoch import Epoch, EpochIterator, check_same_streams
from adabatch.data.from_dataloader import dataloader_kwargs
from adabatch.data.order import StreamOrder
from adabatch.data.rng import mix
from adabatch.data.sampler import ResizableBatchSampler
from adabatch.data.split import BatchSplit, retrying
from adabatch.data.worker import Fetcher, StreamFetcher, WorkerStart
from adabatch.interfaces import BatchSource, State

COLLATE_IN = ("worker", "consumer")


def _of_sampler(doc: str, name: str, writable: bool = False) -> Argument:
    """A property of the loader that is its batch_sampler's."""
    def write(self: AdaptiveDataLoader, value: object) -> None:
        setattr(self.batch_sampler, name, value)

    return property(attrgetter(f"batch_sampler.{name}"), write if writable else None, doc=doc)


class AdaptiveDataLoader(BatchSource):
    """A DataLoader whose batches have the current `loader.batch_size`, with any number of workers.

    Workers fetch and collate chunks of the order ahead of time, and the chunks are cut and joined
    to size: a change holds for the very next batch, and no fetched sample is lost or repeated.
    Batches cut from one chunk share its memory but no element of it, and may be changed in place.

    Args:
        dataset: map-style, or iterable (each worker reads its copy: let it choose its part by
            torch's get_worker_info, as for a DataLoader).
        batch_size: of the first batch.
        shuffle: a new order each epoch, a permutation keyed by (seed, epoch).
        sampler: a user's order; excludes shuffle.
        seed: of the shuffle, and of random augmentation.
        drop_last: drop a last batch shorter than requested.
        rank, world_size: of this process among those that share one order, as for
            ResizableBatchSampler: sizes, positions and the state are global. A user's sampler must
            give the same order in all processes, an iterable data set the whole stream: each
            keeps every world_size-th sample, so that batches are multiples of world_size.
        collate_in: "worker", chunk by chunk, or "consumer", for a collate_fn that needs the whole
            batch (mixup): workers then hand over samples.
        join_fn: (tensors, axis, path) -> tensor, joins chunks whose shapes differ beyond the axis
            that counts samples; adabatch.data.pad_right pads.
        seed_samples: seed torch's, NumPy's and Python's global generators before each sample by
            (seed, epoch, position): random augmentation repeats on resuming, and does not depend
            on workers and batch sizes. Costs 6 to 20 µs a sample, and samples are fetched one by
            one. False: as in a DataLoader.
        kwargs: of torch.utils.data.DataLoader: num_workers, collate_fn, pin_memory, timeout,
            worker_init_fn, multiprocessing_context, generator, prefetch_factor,
            persistent_workers.

    Attributes:
        batch_sampler: the order and the position in it, counted in samples delivered.
        n_iterations: how many iterations were begun.
        is_stream: whether the data set is iterable.
        runs_ahead: False: a batch counts when it is delivered, not when workers fetch it.

    Raises:
        ValueError, TypeError: arguments of the sampler or of DataLoader that are out of range, a
            sampler together with shuffle, in_order=False.

    Example:
        >>> loader = AdaptiveDataLoader(torch.arange(10), batch_size=4)
        >>> for batch in loader:
        ...     print(batch.tolist(), loader.samples_left)
        ...     loader.batch_size = 5
        [0, 1, 2, 3] 6
        [4, 5, 6, 7, 8] 1
        [9] 0
        >>> loader
        AdaptiveDataLoader(10 samples, batch 5, position 0 of 10, epoch 1, workers 0)
    """

    runs_ahead = False
    n_iterations: int = 0

    def __init__(
        self, dataset: Dataset, batch_size: int | None = 1, shuffle: bool | None = False,
        *,
        sampler: Sampler | None = None, seed: int = 0, drop_last: bool = False, rank: int = 0,
        world_size: int = 1, collate_fn: CollateFn | None = None, collate_in: str = "worker",
        join_fn: JoinFn | None = None, seed_samples: bool = False, **kwargs: Argument,
    ):
        if kwargs.pop("batch_sampler", None) is not None:
            raise ValueError(
                "batch_sampler= decides the size of the batches, which this loader changes: pass "
                "batch_size=, with sampler= for an order of your own.")
        if batch_size is None:
            raise ValueError(
                "batch_size=None (no batching) leaves nothing to adapt: let the data set give "
                "single samples, and set batch_size to an integer >= 1.")
        self.is_stream = isinstance(dataset, IterableDataset)
        if self.is_stream and (shuffle or sampler is not None):
            raise ValueError(
                f"the data set is iterable-style ({type(dataset).__name__}) and decides the order: "
                "omit shuffle and sampler.")
        if kwargs.get("in_order") is False:
            raise ValueError(
                "in_order=False lets batches overtake each other, so that the size of the one "
                "delivered is not known. Leave in_order at True.")
        if collate_in not in COLLATE_IN:
            raise ValueError(f"collate_in must be one of {COLLATE_IN}, got {collate_in!r}")
        self.dataset, self.sampler = dataset, sampler
        self.batch_sampler = ResizableBatchSampler(
            dataset, batch_size, shuffle=shuffle,  # type: ignore[arg-type]
            sampler=StreamOrder(dataset) if isinstance(dataset, IterableDataset) else sampler,
            seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.collate_in, self.join_fn = collate_in, join_fn
        self.num_workers: int = kwargs.get("num_workers", 0)
        self.pin_memory: bool = kwargs.get("pin_memory", False)
        self.seed_samples = seed_samples
        self._micro_batches = BatchSplit()
        self._epoch: Epoch | None = None
        self._progress: State | None = None
        self.layout: Layout = None
        self._requests = _Requests()
        self._engine = self._new_engine(**kwargs)
        # Chunks grow only where batches do not depend on the chunks they are cut from: not where a
        # collate_fn pads, or workers divide an iterable data set by chunks.
        alike = collate_in == "consumer" or self.collate_fn is default_collate
        grows = self.num_workers > 0 and not self.is_stream and alike
        self.chunk_sizer = ChunkSizer() if grows else None

    def _new_engine(
        self, *, worker_init_fn: Callable[[int], None] | None = None,
        generator: torch.Generator | None = None, **kwargs: Argument,
    ) -> DataLoader:
        self.worker_init_fn, self.generator = worker_init_fn, generator
        consumer = self.collate_in == "consumer"
        if consumer:
            kwargs["pin_memory"] = False  # samples are not what is delivered
        self._fetcher = (StreamFetcher if self.is_stream else Fetcher)(
            self.dataset, None if consumer else self.collate_fn, learns=self.num_workers > 0,
            seeded=self.seed_samples, shard=self.batch_sampler.shard)
        # A DataLoader draws a number at each iter(): from torch's generator a resumed run would
        # draw once more, and continue with other dropout masks.
        self._engine_generator = torch.Generator() if generator is None else generator
        engine = DataLoader(
            self._fetcher, batch_size=None, sampler=self._requests,
            collate_fn=_identity, worker_init_fn=WorkerStart(worker_init_fn),
            generator=self._engine_generator, **kwargs)
        self.timeout, self.multiprocessing_context = engine.timeout, engine.multiprocessing_context
        self.prefetch_factor = engine.prefetch_factor
        self.persistent_workers = engine.persistent_workers
        return engine

    @classmethod
    def from_loader(cls, loader: DataLoader, **options: Argument) -> AdaptiveDataLoader:
        """An adaptive loader with a DataLoader's data set, order, collate_fn, workers, pinning.

        A shuffling loader gets the keyed order, seeded from its generator (or from torch's). A
        DistributedSampler gives way to the global order, with its seed and the same global batch.
        Other samplers are kept.

        Args:
            loader: the plain one.
            options: arguments of AdaptiveDataLoader that take precedence: with world_size= also
                seed=, the same in all processes.

        Raises:
            ValueError: batching switched off, a user's batch sampler, or a sampler that divides
                samples by other rules.
            TypeError: not a DataLoader.
        """
        kwargs, batch_sampler = dataloader_kwargs(loader)
        adaptive = cls(loader.dataset, **{**kwargs, **options})
        if batch_sampler is not None:
            adaptive.batch_sampler, adaptive.sampler = batch_sampler, batch_sampler.sampler
        return adaptive

    def __repr__(self) -> str:
        return f"AdaptiveDataLoader({self.batch_sampler.describe()}, workers {self.num_workers})"

    def _repr_html_(self) -> str:
        total = self.num_samples
        bar = f' <progress value="{self.position}" max="{total}"></progress>' if total else ""
        return f"<code>{html.escape(repr(self))}</code>{bar}"

    def __len__(self) -> int:
        """(Micro-)batches of this epoch: those delivered and those left; TypeError where unknown.

        It changes with the batch size, so that ``i == len(loader) - 1`` holds at the last one.
        """
        micro = self.micro_batches
        present = 0 if micro.is_last else micro.index + 1  # counted on both sides
        return self.batch_sampler.said(self.batches_left - present)

    @property
    def batches_left(self) -> int:
        """(Micro-)batches left in this epoch at the present size; TypeError where not known."""
        whole, others = self.batch_sampler.sizes_to_come()
        shard, parts = self.batch_sampler.shard, self.micro_batches.sizes
        sizes = [len(parts(size, shard)) for size in others]
        return whole * len(parts(self.batch_size, shard)) + sum(sizes)

    # -- sizes and positions, in samples of all processes together

    batch_size: int = _of_sampler("Size of the batches drawn from now on.", "batch_size", True)
    drop_last: bool = _of_sampler(
        "Whether a last batch shorter than requested is dropped.", "drop_last", True)
    recent: deque[tuple[int, int]] = _of_sampler(
        "(size requested, size delivered) of the latest batches, newest last.", "recent")
    last_size: int = _of_sampler("Samples of the latest batch; 0 before the first.", "last_size")
    last_local_size: int = _of_sampler(
        """Samples of the latest batch in this process.

        Weighting its mean loss by world_size · last_local_size / last_size makes the mean over
        processes the mean over the batch.
        """, "last_local_size")
    n_batches: int = _of_sampler("Batches delivered so far, over all epochs.", "n_batches")
    position: int = _of_sampler(
        "Samples of the present epoch delivered so far; those fetched ahead do not count.",
        "position")
    num_samples: int | None = _of_sampler(
        "Samples of a whole epoch; None where that is not known.", "num_samples")
    samples_left: int | None = _of_sampler(
        "Samples of the present epoch still to be delivered; None where that is not known.",
        "samples_left")

    @property
    def micro_batches(self) -> BatchSplit:
        """How batches are split into micro-batches (adabatch.wrap with micro_batches=)."""
        return self._micro_batches

    @property
    def is_last_micro_batch(self) -> bool:
        """Whether the optimizer steps after this batch: False if micro-batches of it follow."""
        return self.micro_batches.is_last

    def learn_layout(self) -> None:
        """Learn how batches are cut without workers too, to retry them in smaller parts."""
        self._fetcher.learns = self.layout is None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order, of the next iteration."""
        self.batch_sampler.set_epoch(epoch)

    # -- resuming

    def state_dict(self) -> State:
        """Where the next batch begins, in samples delivered, as plain numbers and tensors.

        Raises:
            RuntimeError: between two micro-batches of one batch.
            TypeError: in the middle of an iterable data set that has no state_dict.
        """
        if not self.is_last_micro_batch:
            raise RuntimeError(
                "a checkpoint between two micro-batches would lose their gradients: save where "
                "loader.is_last_micro_batch is True, after the step")
        state = self.state_from(None)
        assert state is not None
        return state

    def state_from(self, position: int | None) -> State | None:
        """The state in which the samples from `position` on come (again); None where the data set
        or sampler cannot go back so far. For a position of None as state_dict()."""
        sampler_state, progress = self.batch_sampler.state_dict(), self._progress
        if self._epoch is not None:
            sampler_state, progress = self._epoch.state(sampler_state)
        back = 0 if position is None else sampler_state["position"] - position
        if back > 0:
            sampler_state = {**sampler_state, "position": position}
            if progress is not None and not self.is_stream:
                progress = {**progress, "skip": progress["skip"] - back}
            if self.is_stream or (progress is not None and progress["skip"] < 0):
                return None
        return {"version": 1, "sampler": sampler_state, "progress": progress}

    def load_state_dict(self, state: State) -> None:
        """Let the next iteration continue where `state` was saved: same samples, same order.

        Raises:
            ValueError: another version, another kind of order, another number of workers or
                processes of an iterable data set.
        """
        check_version(state, 1, "AdaptiveDataLoader")
        progress = state["progress"]
        if self.is_stream and progress is not None:
            world_size = self.batch_sampler.shard.world_size
            check_same_streams(progress, num_workers=self.num_workers, world_size=world_size)
        self.batch_sampler.load_state_dict(state["sampler"])
        self._epoch, self._progress = None, progress

    # -- iteration

    def __iter__(self) -> Iterator[Batch]:
        return _Batches(self._batches())

    def _batches(self) -> Generator[Batch]:
        self.n_iterations += 1
        iterator_id = self.batch_sampler.new_iterator()
        progress, self._progress = self._progress, None
        batches = EpochIterator(self, iterator_id, progress)
        self._epoch = batches.epoch
        yield from batches

    def open_engine(self, requests: Iterator[Request]) -> Replies:
        """The replies to these requests, in their order; for EpochIterator."""
        if self.num_workers == 0 and not self._engine.pin_memory:
            return Replies(map(self._fetcher.__getitem__, requests))
        self._requests.epoch, sampler = requests, self.batch_sampler
        if self.num_workers and self.collate_in == "worker":
            self._fetcher.knows(self.layout)
        if self.generator is None:
            seed = mix(sampler.seed, sampler.epoch, sampler.shard.rank)
            self._engine_generator.manual_seed(seed)
        return Replies(iter(self._engine), self.num_workers > 0)

    def retrying(self) -> AbstractContextManager[None]:
        """Around the body of the training loop: retries a batch whose memory runs out.

        The micro-batch is halved and the same batch comes again from its start. What the failed
        attempt added to the gradients is dropped; running statistics of batch norm keep theirs.

        Raises:
            RuntimeError: not with the optimizer of adabatch.wrap(..., micro_batches=), or several
                processes. The error itself: one sample fails too, or the step was taken.
        """
        return retrying(self.micro_batches, self.batch_sampler.shard.world_size)


class _Batches:
    """The batches of an epoch. The error of a batch that could not be read does not end them: who
    catches it may call next() again, as with a DataLoader."""

    def __init__(self, batches: Generator[Batch]):
        self._batches, self.close = batches, batches.close

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if type(batch) is Failure:
            batch.reraise()
        return batch


class _Requests:
    """The engine's sampler: the requests of the present epoch."""

    epoch: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.epoch


def _identity(reply: Batch) -> Batch:
    return reply
