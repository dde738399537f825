"""AdaptiveDataLoader: a data loader whose batch size may be set while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler

from adabatch.data.sampler import ResizableBatchSampler

KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


class AdaptiveDataLoader:
    """torch's DataLoader around a ResizableBatchSampler: `loader.batch_size = n` holds from the next batch drawn.

    Without workers the next batch drawn is the next batch; with workers torch has up to num_workers · prefetch_factor batches drawn ahead.

    Args:
        dataset: map-style.
        batch_size: of the first batch.
        shuffle: a new order each epoch, a permutation keyed by (seed, epoch).
        sampler: the caller's own order, taken as it is; excludes shuffle.
        seed: of the shuffle.
        drop_last: leave out a last batch shorter than asked for.
        kwargs: of torch.utils.data.DataLoader: num_workers, collate_fn, pin_memory, generator, worker_init_fn, ...

    Attributes:
        recent: (size asked for, size delivered) of the last batches delivered, newest last.
        n_batches: batches delivered so far, over all epochs.
        n_iterations: how often an iteration was begun.
        position: samples of the present epoch delivered so far; those that workers drew ahead do not count.

    Raises:
        ValueError: an iterable-style data set, a sampler together with shuffle, or in_order=False.

    Example:
        >>> loader = AdaptiveDataLoader(torch.arange(10), batch_size=4)
        >>> for batch in loader:
        ...     print(batch.tolist())
        ...     loader.batch_size = 5
        [0, 1, 2, 3]
        [4, 5, 6, 7, 8]
        [9]
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
        **kwargs: Any,
    ):
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"the data set is iterable-style ({type(dataset).__name__}), which has no indices to batch. Use one with __getitem__ and __len__.")
        if sampler is not None and shuffle:
            raise ValueError("a sampler decides the order: pass either sampler= or shuffle=True")
        if kwargs.get("in_order") is False:
            raise ValueError("in_order=False lets batches overtake each other, so that the size of the one delivered is not known. Leave in_order at True.")
        self.batch_sampler = ResizableBatchSampler(dataset, batch_size, shuffle=shuffle, sampler=sampler, seed=seed, drop_last=drop_last)
        self.dataset, self._kwargs = dataset, kwargs
        self.recent: deque[tuple[int, int]] = deque(maxlen=4096)
        self.n_batches = self.n_iterations = self.position = 0
        self._loader = DataLoader(dataset, batch_sampler=self.batch_sampler, **kwargs)

    @classmethod
    def from_loader(cls, loader: DataLoader) -> AdaptiveDataLoader:
        """Take over a plain DataLoader: data set, order, collate_fn, workers, pinning, generator.

        A shuffling loader gets the keyed order, seeded from its generator (or from torch's); any other sampler is taken as it is.

        Raises:
            ValueError: an iterable-style data set, batching switched off, or a batch sampler of the caller's own.
            TypeError: not a DataLoader.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(f"loader must be a torch.utils.data.DataLoader or an adabatch.AdaptiveDataLoader, got {type(loader).__name__}")
        kwargs = {name: getattr(loader, name) for name in KEPT if hasattr(loader, name)}
        if not kwargs.get("pin_memory_device"):
            kwargs.pop("pin_memory_device", None)
        batch_sampler = loader.batch_sampler
        if isinstance(loader.dataset, IterableDataset):
            name = type(loader.dataset).__name__
            raise ValueError(f"the loader's data set is iterable-style ({name}), which has no indices to batch. Use one with __getitem__ and __len__.")
        if batch_sampler is None:
            raise ValueError("the loader has no batch sampler (batch_size=None): there is no batch size to set. Build it with a batch_size.")
        if not isinstance(batch_sampler, ResizableBatchSampler) and loader.batch_size is None:
            raise ValueError(
                f"the loader has a batch sampler of its own ({type(batch_sampler).__name__}), whose batch size cannot be set. "
                "Build the loader with batch_size= and sampler=, or give it a ResizableBatchSampler."
            )
        size, drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        if _is_plain_shuffle(loader):
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.sampler.generator).item())
            return cls(loader.dataset, size, True, seed=seed, drop_last=drop_last, **kwargs)
        own = None if _is_sequential(loader) else loader.sampler
        adopted = cls(loader.dataset, size, sampler=own, drop_last=drop_last, **kwargs)
        if isinstance(batch_sampler, ResizableBatchSampler):
            adopted._adopt(batch_sampler)
        return adopted

    def _adopt(self, batch_sampler: ResizableBatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self._loader = DataLoader(self.dataset, batch_sampler=batch_sampler, **self._kwargs)

    @property
    def batch_size(self) -> int:
        """Size of the batches drawn from now on."""
        return self.batch_sampler.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.batch_sampler.batch_size = size

    @property
    def drop_last(self) -> bool:
        """Whether a last batch shorter than asked for is left out."""
        return self.batch_sampler.drop_last

    @drop_last.setter
    def drop_last(self, drop: bool) -> None:
        self.batch_sampler.drop_last = drop

    def __iter__(self) -> Iterator[Any]:
        drawn_before = self.batch_sampler.n_batches
        self.n_iterations += 1
        self.position = self.batch_sampler.next_start
        for delivered, batch in enumerate(self._loader, start=1):
            ahead = self.batch_sampler.n_batches - drawn_before - delivered
            self.recent.append(self.batch_sampler.recent[-1 - ahead])
            self.n_batches += 1
            self.position += self.recent[-1][1]
            yield batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def num_samples(self) -> int:
        """Samples of a whole epoch.

        Raises:
            TypeError: the caller's own sampler has no length.
        """
        return self.batch_sampler.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order, of the next iteration."""
        self.batch_sampler.set_epoch(epoch)


def _is_plain_shuffle(loader: DataLoader) -> bool:
    """Whether the order is a fresh permutation of the whole data set at each epoch."""
    sampler = loader.sampler
    return type(sampler) is RandomSampler and sampler.data_source is loader.dataset and not sampler.replacement and sampler.num_samples == len(loader.dataset)


def _is_sequential(loader: DataLoader) -> bool:
    return type(loader.sampler) is SequentialSampler and loader.sampler.data_source is loader.dataset
