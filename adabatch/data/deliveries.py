"""What the training loop is given in one epoch: batches of the size that is current when each is asked for, whole or in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.pin_memory import pin_memory

from adabatch.data.chunks import ChunkBuffer, ChunkPlan, Reply
from adabatch.data.epochs import Epoch, StreamEpoch
from adabatch.data.joining import COLUMN, cut, join, learn_layout
from adabatch.data.sampler import ResizableBatchSampler
from adabatch.micro_batches.batches import MicroBatches

if TYPE_CHECKING:
    from adabatch.data.loader import AdaptiveDataLoader

# Shares that are not all equal repeat after world_size batches at most; workers fetch no more than a few ahead.
_PLANNED = 16


class EpochIterator:
    """One epoch's batches, drawn through the loader's engine.

    Args:
        loader: gives sampler, engine, collate_fn and micro-batches.
        generation: of the sampler's newest iterator.
    """

    def __init__(self, loader: AdaptiveDataLoader, generation: int):
        self._loader, self._sampler, self._micro = loader, loader.batch_sampler, loader.micro_batches
        self._generation = generation
        if self._micro.is_cut:
            loader.learn_layout()
        self._whole = loader.collate_in == "consumer"
        self._sized, self._processes = self._sampler.is_sized, self._sampler.processes
        self._pace = loader._pace
        cycle = SizesAhead(self._sampler, self._micro, in_parts=self._sized and not self._whole)
        left = self._sampler._left / self._processes.world_size if self._sized else math.inf
        self._plan = ChunkPlan(loader.num_workers, cycle, self._pace, left)
        self.epoch = self._new_epoch()
        self._buffer: ChunkBuffer | None = None

    def __iter__(self) -> Iterator[Any]:
        sampler = self._sampler
        try:
            while True:
                size = sampler.batch_size
                n = self._upcoming(size)
                if n == 0:
                    break
                sampler._count(size, n)
                if self._pace is not None:
                    self._pace.asked(size)
                if self._micro.is_cut:
                    yield from self._micro_batches(n)
                    continue
                share = sampler._draws(n)
                batch = self._whole_batch(share)
                self._advance(n, share)
                yield batch
                batch = None  # it need not be kept while the next is waited for
                sampler._check_newest(self._generation)
            if self._buffer is not None:
                self._buffer.finish()
            sampler._go_to(sampler.epoch + 1)
        finally:
            self._close()

    def _close(self) -> None:
        buffer, self._buffer = self._buffer, None  # it holds this object's methods: the cycle would keep loader and workers
        if buffer is not None and not self._loader.persistent_workers:
            # At once, and not when the last traceback that holds the engine's iterator is let go of.
            getattr(buffer.replies, "_shutdown_workers", lambda: None)()

    def _new_epoch(self) -> Epoch:
        loader = self._loader
        progress, loader._progress = loader._progress, None
        # A position that a loaded state gave is not this epoch's where set_epoch chose another since.
        progress = progress if self._sampler.position else None
        if loader.is_stream:
            return StreamEpoch(self._sampler, self._generation, self._plan, progress, loader.num_workers)
        return Epoch(self._sampler, self._generation, self._plan, progress)

    def _upcoming(self, size: int) -> int:
        """Samples of the next batch, 0 at the end: known beforehand where the epoch's length is, otherwise when they are here."""
        sampler, world = self._sampler, self._processes.world_size
        if self._sized:
            return sampler._upcoming(size)
        # Equal shares: nobody knows how much is left, and all processes must come to the end together.
        share = size // world
        self._ask(share, [])
        got = self._buffer.fill(share)
        return 0 if sampler.drop_last and got < share else got * world

    def _whole_batch(self, share: int) -> Any:
        if self._whole:
            return self._cut_whole(share)(0, share, [])
        if self._sized:
            self._ask(share, [])
        self._fill(share)
        return self._buffer.take(share)

    def _micro_batches(self, n: int) -> Iterator[Any]:
        share = self._sampler._draws(n)
        pieces = self._cut_whole(share) if self._whole else self._take_parts(share)
        sizes, part, at = self._micro.start(n, self._processes, share), 0, 0
        advanced, kept = False, []
        while part < len(sizes):
            size = sizes[part]
            batch = pieces(at, size, sizes[part + 1 :])
            kept.append((batch, size, _versions(batch)))
            self._micro.advance(part, size)
            if self._micro.is_last and not advanced:
                self._advance(n, share)
                advanced = True
            yield batch
            self._sampler._check_newest(self._generation)
            part, at = part + 1, at + size
            if self._micro.failed:
                self._put_back(kept)
                sizes, part, at, kept = self._micro.start(n, self._processes, share), 0, 0, []
        self._micro.end()

    def _advance(self, n: int, share: int) -> None:
        self._sampler._position += n
        self.epoch.delivered(share)

    def _put_back(self, kept: list[tuple[Any, int, list[int]]]) -> None:
        if any(_versions(batch) != versions for batch, _, versions in kept):
            raise RuntimeError(
                "the batch cannot be tried again, because its tensors were changed in place. Write inputs = inputs / 255 instead of inputs /= 255, "
                "or set max_micro_batch_size low enough to begin with."
            )
        if not self._whole:
            for batch, size, _ in reversed(kept):
                self._buffer.put_back(batch, size)

    # -- where the samples come from

    def _take_parts(self, n: int) -> Callable[[int, int, list[int]], Any]:
        asked = 0 if self._sized else n

        def take(at: int, size: int, rest: list[int]) -> Any:
            nonlocal asked
            if at + size > asked:
                self._ask(at + size - asked, rest)
                asked = at + size
            self._fill(size)
            return self._buffer.take(size)

        return take

    def _cut_whole(self, n: int) -> Callable[[int, int, list[int]], Any]:
        loader = self._loader
        if self._sized:
            self._ask(n, [])
        self._fill(n)
        samples = self._buffer.take(n)
        if self._micro.is_cut and loader._layout is None:
            loader._layout = learn_layout(loader.collate_fn, samples[0])
        batch = loader.collate_fn(samples)
        if loader.pin_memory and torch.cuda.is_available():
            batch = pin_memory(batch)
        return lambda at, size, rest: batch if size == n else cut(batch, loader._layout, at, at + size)

    def _fill(self, size: int) -> None:
        got = self._buffer.fill(size)
        if got < size:
            raise RuntimeError(f"the sampler gave only {got} of the {size} samples that its length promised")

    def _ask(self, size: int, rest: list[int]) -> None:
        self._plan.ask(size, rest)
        if self._buffer is None:
            # Not before the first size is asked for: the engine draws the first chunks as soon as it is opened.
            replies = self._loader._open(self.epoch.requests())
            self._buffer = ChunkBuffer(replies, self._cut, self._join, self._received)

    def _received(self, reply: Reply) -> Reply:
        if reply.layout is not None and not self._whole:
            self._loader._layout = reply.layout
        if self._pace is not None:
            self._pace.measure(reply)
        return self.epoch.received(reply, self._cut)

    def _cut(self, batch: Any, start: int, stop: int) -> Any:
        return cut(batch, COLUMN if self._whole else self._loader._layout, start, stop)

    def _join(self, parts: list[Any]) -> Any:
        return join(parts, COLUMN if self._whole else self._loader._layout, self._loader.join_fn, self._loader.pin_memory)


class SizesAhead:
    """What this process will ask for in the batches after the present one, if the size stays. Keeps no loader: the plan outlives the epoch."""

    def __init__(self, sampler: ResizableBatchSampler, micro: MicroBatches, in_parts: bool):
        self._sampler, self._micro, self._in_parts = sampler, micro, in_parts

    def __call__(self) -> list[int]:
        sampler, processes = self._sampler, self._sampler.processes
        size, world = sampler.batch_size, processes.world_size
        if not sampler.is_sized or size % world == 0:
            shares = [size // world]
        else:
            at = sampler.position + sampler.last_size
            shares = [processes.share(at + batch * size, size) for batch in range(min(world // math.gcd(size, world), _PLANNED))]
        return [part for share in shares for part in self._micro.sizes(size, processes, share)] if self._in_parts else shares


def _versions(batch: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]
