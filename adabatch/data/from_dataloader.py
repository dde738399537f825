"""Taking over a plain DataLoader."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from adabatch.data.sampler import ResizableBatchSampler

logger = logging.getLogger(__name__)
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


def arguments_of(loader: DataLoader) -> tuple[dict[str, Any], ResizableBatchSampler | None]:
    """(arguments of an AdaptiveDataLoader that does what this loader does, its batch sampler if that can be used as it is).

    A shuffling loader gets the keyed order, seeded from its generator (or from torch's); a DistributedSampler gives way to the global order, of its seed, that
    all its processes share, with world_size times the batch size; any other sampler is taken as it is.

    Raises:
        ValueError: batching switched off, a batch sampler of the caller's own, or a DistributedSampler that is of another kind or data set.
        TypeError: not a DataLoader.

    Example:
        >>> arguments, _ = arguments_of(DataLoader(range(4), batch_size=2, shuffle=True))
        >>> arguments["batch_size"], arguments["shuffle"], arguments["num_workers"]
        (2, True, 0)
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch.utils.data.DataLoader or an adabatch.AdaptiveDataLoader, got {type(loader).__name__}")
    arguments = {name: getattr(loader, name) for name in KEPT if hasattr(loader, name)}
    if not arguments.get("pin_memory_device"):
        arguments.pop("pin_memory_device", None)
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        raise ValueError("the loader has no batch sampler (batch_size=None): there is no batch size to set. Build it with a batch_size.")
    if isinstance(batch_sampler, ResizableBatchSampler):
        return {**arguments, "batch_size": batch_sampler.batch_size, "drop_last": batch_sampler.drop_last}, batch_sampler
    if loader.batch_size is None:
        raise ValueError(
            f"the loader has a batch sampler of its own ({type(batch_sampler).__name__}), whose batch size cannot be set. "
            "Build the loader with batch_size= and sampler=, or give it a ResizableBatchSampler."
        )
    arguments |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if isinstance(loader.dataset, IterableDataset):
        return arguments, None
    if isinstance(loader.sampler, DistributedSampler):
        return {**arguments, **_of_distributed(loader)}, None
    if _is_plain_shuffle(loader):
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.sampler.generator).item())
        return {**arguments, "shuffle": True, "seed": seed}, None
    return {**arguments, "sampler": None if _is_sequential(loader) else loader.sampler}, None


def _is_plain_shuffle(loader: DataLoader) -> bool:
    """Whether the order is a fresh permutation of the whole data set at each epoch."""
    sampler = loader.sampler
    return type(sampler) is RandomSampler and sampler.data_source is loader.dataset and not sampler.replacement and sampler.num_samples == len(loader.dataset)


def _is_sequential(loader: DataLoader) -> bool:
    return type(loader.sampler) is SequentialSampler and loader.sampler.data_source is loader.dataset


def _of_distributed(loader: DataLoader) -> dict[str, Any]:
    sampler = loader.sampler
    if type(sampler) is not DistributedSampler or len(sampler.dataset) != len(loader.dataset):
        raise ValueError(
            f"the loader's sampler ({type(sampler).__name__}) shares its samples out by rules of its own, or those of another data set. Leave it away: "
            "the processes then share one order (rank= and world_size=)."
        )
    logger.info(
        "DistributedSampler is taken over: %s processes of global batches of %s x %s samples share one order, in which each sample comes once an epoch",
        *(sampler.num_replicas, sampler.num_replicas, loader.batch_size),
    )
    return {
        "batch_size": loader.batch_size * sampler.num_replicas,
        "shuffle": sampler.shuffle,
        "seed": sampler.seed,
        "rank": sampler.rank,
        "world_size": sampler.num_replicas,
    }
