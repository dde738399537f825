"""The arguments of an AdaptiveDataLoader that does what a plain DataLoader does."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import (
    DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler)

from adabatch._types import Kwargs, Source
from adabatch.data.sampler import ResizableBatchSampler

logger = logging.getLogger(__name__)
KEPT = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
    "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
    "pin_memory_device", "in_order")


def dataloader_kwargs(loader: DataLoader) -> tuple[Kwargs, ResizableBatchSampler | None]:
    """(arguments of an AdaptiveDataLoader like this loader, its batch sampler if usable as it is).

    Samplers and errors are those of AdaptiveDataLoader.from_loader.

    Example:
        >>> kwargs, _ = dataloader_kwargs(DataLoader(range(4), batch_size=2, shuffle=True))
        >>> kwargs["batch_size"], kwargs["shuffle"], kwargs["num_workers"]
        (2, True, 0)
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            "loader must be a torch.utils.data.DataLoader or an adabatch.AdaptiveDataLoader, got "
            f"{type(loader).__name__}")
    # Which of them a loader has depends on the release of torch.
    kwargs = {name: value for name, value in vars(loader).items() if name in KEPT}
    kwargs["multiprocessing_context"] = loader.multiprocessing_context
    if not kwargs.get("pin_memory_device"):
        kwargs.pop("pin_memory_device", None)
    batch_sampler, sampler = loader.batch_sampler, loader.sampler
    if batch_sampler is None:
        raise ValueError("the loader has no batch sampler: build it with a batch_size, not None")
    if isinstance(batch_sampler, ResizableBatchSampler):
        sizes = {"batch_size": batch_sampler.batch_size, "drop_last": batch_sampler.drop_last}
        return kwargs | sizes, batch_sampler
    if loader.batch_size is None:
        raise ValueError(
            f"the batch size of the loader's batch sampler ({type(batch_sampler).__name__}) cannot "
            "be set. Build the loader with batch_size= and sampler=, or pass a "
            "ResizableBatchSampler.")
    kwargs |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if isinstance(loader.dataset, IterableDataset):
        return kwargs, None
    if isinstance(sampler, DistributedSampler):
        return kwargs | _of_distributed(loader, sampler), None
    if isinstance(sampler, RandomSampler) and _is_plain(sampler, loader.dataset):
        seed = torch.empty((), dtype=torch.int64).random_(generator=sampler.generator)
        return kwargs | {"shuffle": True, "seed": int(seed)}, None
    plain = type(sampler) is SequentialSampler and sampler.data_source is loader.dataset
    return kwargs | {"sampler": None if plain else sampler}, None


def _is_plain(sampler: RandomSampler, dataset: Source) -> bool:
    """Whether the order is a fresh permutation of the whole data set at each epoch."""
    whole = type(sampler) is RandomSampler and sampler.data_source is dataset
    return whole and not sampler.replacement and sampler.num_samples == len(dataset)


def _of_distributed(loader: DataLoader, sampler: DistributedSampler) -> Kwargs:
    theirs: Source = sampler.dataset
    here: Source = loader.dataset
    if type(sampler) is not DistributedSampler or len(theirs) != len(here):
        raise ValueError(
            f"the loader's sampler ({type(sampler).__name__}) divides samples among processes by "
            "other rules, or those of another data set. Omit it: the processes then share one "
            "order (rank= and world_size=).")
    logger.info(
        "DistributedSampler is replaced: %s processes of global batches of %s x %s samples share "
        "one order, in which each sample comes once an epoch",
        *(sampler.num_replicas, sampler.num_replicas, loader.batch_size))
    return {
        "batch_size": (loader.batch_size or 1) * sampler.num_replicas,
        "shuffle": sampler.shuffle, "seed": sampler.seed,
        "rank": sampler.rank, "world_size": sampler.num_replicas}
