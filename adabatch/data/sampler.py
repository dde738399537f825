"""A batch sampler whose batch size may change while it runs, and whose position can be saved."""

from __future__ import annotations

import warnings
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from zlib import crc32

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset, Sampler

from adabatch._checks import check_version, integer
from adabatch._types import Part, Source
from adabatch.data.order import (
    MAX_SAMPLES, MAX_WORD, SHUFFLING, EpochAware, KeyedPermutation, Shard, StreamOrder,
    check_shared, generator_of, indices, length_of)
from adabatch.interfaces import BatchSource, State

VERSION = 1
_KEYS = {
    "version", "epoch", "position", "batch_size", "num_samples", "shuffle", "seed", "sampler",
    "generator"}
_OUTDATED = (
    "This iterator of a ResizableBatchSampler is out of date: iter(), set_epoch() or "
    "load_state_dict() came after it, and the sampler keeps one position. For two loops at once "
    "build two samplers (and two loaders).")


class ResizableBatchSampler(Sampler[list[int]], BatchSource):
    """Batches of indices, of the size that ``batch_size`` has when a batch is drawn.

    Every sample comes exactly once an epoch under any sequence of sizes; the last batch is shorter,
    or dropped with ``drop_last``. An epoch has one order and one position in it, counted in
    samples: (epoch, position) resumes a run, whatever sizes came before.

    Each ``iter()`` starts the next epoch: 0, 1, … An epoch left by ``break`` counts as begun; an
    iterator that drew nothing leaves its epoch to the next one. Only the newest one may be drawn
    from. In a plain ``DataLoader`` with workers a new size lags by the ``num_workers ·
    prefetch_factor`` batches drawn ahead, which ``position`` and ``len()`` count. A data set may
    grow or shrink between epochs: each epoch has the samples that are there when it begins.

    Args:
        data_source: a data set with a length, or the number of samples; or, as in torch's
            BatchSampler, a torch Sampler (any iterable without ``__getitem__`` counts as one).
        batch_size: samples of the next batch, >= 1. May be set at any time.
        shuffle: the order is a KeyedPermutation of (seed, epoch); otherwise 0 … n−1.
        sampler: a user's order of indices, any iterable (a list too); excludes ``shuffle``.
        seed: of the shuffle, 0 … 2⁶⁴ − 1.
        drop_last: drop a last batch shorter than requested. May be set at any time.
        rank, world_size: of this process among those that share the order. Sizes and positions are
            global; each process draws its part of every batch, equal to within one sample. All
            have equally many batches with at least one sample in each; the last ones may differ
            a little from the requested size.

    Attributes:
        sampler: the user's sampler, or None.
        shuffle, seed: as given; load_state_dict sets the saved seed.
        shard: rank and world_size.
        is_sized: whether the length of the epoch is known in advance and kept to.
        n_batches: batches drawn so far, over all epochs.
        n_delivered: the same of this epoch; an AdaptiveDataLoader counts micro-batches.
        recent: (size requested, size drawn) of the latest batches, newest last.
        last_local_size: samples of the latest batch drawn in this process.
        runs_ahead, n_iterations, micro_batches: see BatchSource.

    Raises:
        TypeError: a wrong type, a data set without length, an iterator, a batch sampler.
        ValueError: a number out of range, a sampler together with ``shuffle``, fewer samples than
            processes, or a sampler that processes cannot share.

    Example:
        >>> batches = ResizableBatchSampler(10, batch_size=4)
        >>> for batch in batches:
        ...     print(batch, len(batches))
        ...     batches.batch_size = 3
        [0, 1, 2, 3] 3
        [4, 5, 6] 3
        [7, 8, 9] 3
        >>> _ = next(iter(batches))
        >>> batches
        ResizableBatchSampler(10 samples, batch 3, position 3 of 10, epoch 1)
        >>> resumed = ResizableBatchSampler(10, batch_size=1)
        >>> resumed.load_state_dict(batches.state_dict())
        >>> next(iter(resumed))
        [3, 4, 5]
    """

    runs_ahead = True
    n_iterations: int | None = None
    micro_batches: None = None
    n_batches: int = 0
    n_delivered: int = 0
    position: int = 0
    recent: deque[tuple[int, int]] = deque(maxlen=0)  # noqa: RUF012 replaced by __init__

    def __init__(
        self, data_source: int | Sized | Iterable[int] | None, batch_size: int, *,
        shuffle: bool | None = False, sampler: Iterable[int] | None = None, seed: int = 0,
        drop_last: bool = False, rank: int = 0, world_size: int = 1,
    ) -> None:
        if sampler is None and _is_sampler(data_source):
            sampler = data_source  # type: ignore[assignment]
        shuffle = False if shuffle is None else shuffle  # as torch's DataLoader takes it
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                kind = type(flag).__name__
                raise TypeError(f"{name} must be True or False, got {flag!r} of type {kind}.")
        if sampler is not None and shuffle:
            name = type(sampler).__name__
            raise ValueError(f"the sampler ({name}) decides the order: omit it or shuffle=True.")
        self.sampler: Source = None if sampler is None else _checked_sampler(sampler)
        self._num_samples = _sample_count(data_source) if sampler is None else None
        sized = sampler is None and isinstance(data_source, Sized)
        self._data_source: Sized | None = data_source if sized else None  # type: ignore[assignment]
        self.shard = Shard(rank, world_size)
        shared = world_size > 1 and not isinstance(sampler, StreamOrder)
        self.is_sized = sampler is None or shared
        if shared:
            self.shard.check_epoch(check_shared(sampler) if sampler else self._num_samples or 0)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = integer("seed", seed, 0, MAX_WORD)
        self.drop_last = drop_last
        self.last_local_size = self._epoch = 0
        self.recent = deque(maxlen=4096)
        # Which iterator is the newest, and whether it drew anything.
        self._iterator_id, self._begun = 0, False
        # What len() said of a whole epoch, and how many epochs in a row were left at that.
        self._said: set[int] = set()
        # What its len() said when the epoch began, and whether a warning came that it was not so.
        self._promised: int | None = None
        self._warned = False
        self._left_early = 0
        # Checksums of the first 1, 2, … indices of a user's order, and the one of a loaded state.
        self._checksums, self._expected = array("L"), 0
        # A user's generator: a loaded state to begin from, and the one the epoch began from.
        self._restore: Tensor | None = None
        self._begun_from: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Samples of the batches drawn from now on, of all processes together."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        # A loop may set it for every batch: the plain case first.
        valid = type(batch_size) is int and batch_size >= self.shard.world_size
        self._batch_size = batch_size if valid else self.shard.check_batch_size(batch_size)

    @property
    def epoch(self) -> int:
        """The epoch being drawn; after its end and before the first batch, the one that follows."""
        return self._epoch

    @property
    def last_size(self) -> int:
        """Samples of the latest batch, of all processes together; 0 before the first."""
        return self.recent[-1][1] if self.recent else 0

    @property
    def num_samples(self) -> int | None:
        """Samples of a whole epoch; None for a sampler without a length."""
        if self._num_samples is None:
            return length_of(self.sampler)
        if not self.position and not self._begun:
            self._count_samples()
        return self._num_samples

    def _count_samples(self) -> None:
        """Look at the data set's length again, which may have changed since the last epoch."""
        if self._data_source is not None and len(self._data_source) != self._num_samples:
            self._num_samples = len(self._data_source)
            self.shard.check_epoch(self._num_samples)

    @property
    def samples_left(self) -> int | None:
        """Samples of the present epoch still to be drawn; None for a sampler without a length."""
        total = self.num_samples
        return None if total is None else max(0, total - self.position)

    @property
    def batches_left(self) -> int:
        """Batches left in this epoch at the present size; TypeError where that is not known."""
        whole, others = self.sizes_to_come()
        return whole + len(others)

    def __len__(self) -> int:
        """Batches of this epoch: those drawn and those left; TypeError where not known."""
        return self.said(self.batches_left)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    def describe(self) -> str:
        """What repr() says inside the parentheses."""
        total = self.num_samples
        known, place = ("unknown length", "") if total is None else (f"{total} samples",
                                                                     f" of {total}")
        shard = self.shard
        rank = f", rank {shard.rank} of {shard.world_size}" if shard.world_size > 1 else ""
        position = f"position {self.position}{place}, epoch {self._epoch}{rank}"
        return f"{known}, batch {self.batch_size}, {position}"

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self.new_iterator())

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` start ``epoch``: at a position loaded for it, or its beginning.

        Calls the ``set_epoch`` of a user's sampler too. TypeError, ValueError: not an int >= 0.
        """
        epoch = integer("epoch", epoch, 0, MAX_WORD)
        if self._begun or epoch != self._epoch:
            self.go_to(epoch)
        if isinstance(self.sampler, EpochAware):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> State:
        """Where the next batch begins: plain numbers, readable with ``weights_only=True``.

        Of a user's sampler its ``state_dict()``, else the state of its ``generator``, if any.
        """
        generator = self._begun_from if self._begun else self._restore
        source = generator_of(self.sampler)
        if generator is None and source is not None:
            generator = source.get_state()
        return {
            "version": VERSION, "epoch": self._epoch, "position": self.position,
            "batch_size": self.batch_size,
            "num_samples": None if self._num_samples is None else self.num_samples,
            "shuffle": self.shuffle, "seed": self.seed,
            "sampler": self.sampler.state_dict() if isinstance(self.sampler, Part) else None,
            "generator": generator, "batches": self.n_delivered,
            "order": self._checksum()}

    def load_state_dict(self, state: State) -> None:
        """Let the next ``iter()`` continue where ``state`` was saved, with any number of processes.

        Batch size (at least one sample for each process) and seed become the saved ones;
        ``drop_last`` stays. A user's sampler with a ``state_dict`` resumes itself; any other
        starts its epoch again, from the saved state of its ``generator`` if it has one, and
        ``position`` indices are skipped: right only if it repeats its order.

        Raises (and changes nothing):
            ValueError: an unknown version, missing or unknown entries, or a state of another data
                set or kind of order.
            TypeError: an entry that must be an integer is not.

        Warns:
            UserWarning: a random sampler of torch without a generator cannot repeat its order.
        """
        epoch, position, batch_size, self.seed = self._checked(state)
        generator = generator_of(self.sampler)
        self.batch_size = max(batch_size, self.shard.world_size)
        self.go_to(epoch, position)
        self.n_delivered = state.get("batches", 0)
        self._expected = state.get("order", 0)
        if isinstance(self.sampler, Part):
            self.sampler.load_state_dict(state["sampler"])
        elif position == 0 and generator is not None:
            # Now, not at the first draw: a DataLoader may share the generator and draw from it in
            # between, as in the run that saved the state.
            generator.set_state(state["generator"])
        else:
            self._restore = state["generator"]
            if position and self._restore is None and isinstance(self.sampler, SHUFFLING):
                warnings.warn(
                    f"{type(self.sampler).__name__} has no generator, so its order cannot be "
                    f"repeated: resumed at position {position} of a new order, the epoch repeats "
                    "some samples and omits others. Give it a generator, or use shuffle=True.",
                    stacklevel=2)

    def _checked(self, state: State) -> tuple[int, int, int, int]:
        """(epoch, position, batch_size, seed) of a state that belongs to an order of this kind."""
        check_version(state, VERSION, "ResizableBatchSampler")
        if state.keys() - {"batches", "order"} != _KEYS:  # which older states do not have
            raise ValueError(
                f"The sampler's state must have the entries {sorted(_KEYS)}, got {sorted(state)}.")
        self._count_samples()
        stateful, generated = (state[name] is not None for name in ("sampler", "generator"))
        wrong = [f"{name}: saved {saved}, here {here}" for name, saved, here in (
            ("num_samples", state["num_samples"], self._num_samples),
            ("shuffle", state["shuffle"], self.shuffle),
            ("sampler with a state_dict", stateful, isinstance(self.sampler, Part)),
            ("sampler with a generator", generated, generator_of(self.sampler) is not None),
        ) if saved != here]
        if wrong:
            raise ValueError(
                f"The state belongs to another order of samples ({', '.join(wrong)}). Build the "
                "sampler as in the run that saved it.")
        return (
            integer("epoch", state["epoch"], 0, MAX_WORD),
            integer("position", state["position"], 0),
            integer("batch_size", state["batch_size"], 1),
            integer("seed", state["seed"], 0, MAX_WORD))

    def _batches(self, iterator_id: int) -> Iterator[list[int]]:
        order = self.open_order(iterator_id)
        while True:
            requested = self.batch_size
            size = self.upcoming(requested)
            batch = list(islice(order, self.local_draw(size)))
            short = self.drop_last and self._num_samples is None and len(batch) < size
            if not batch or short:
                break
            self.record(requested, len(batch) if self.shard.world_size == 1 else size)
            self.position += self.last_size
            self.n_delivered += 1
            yield batch
            self.check_current(iterator_id)
        self.finish()

    # AdaptiveDataLoader draws through what follows, and counts the batches that it delivers.

    def go_to(self, epoch: int, position: int = 0) -> None:
        """Let the next iterator start here; the present one is out of date."""
        self._look_for_early_ends()
        self._epoch, self.position = epoch, position
        self._begun, self.n_delivered = False, 0
        self._begun_from = self._restore = None
        self._checksums, self._expected = array("L"), 0
        self._iterator_id += 1

    def finish(self) -> None:
        """The epoch is over. Warns, once, where its samples are not as many as its length says."""
        said = self._promised
        missing = 0 if said is None else said - self.position
        if missing < 0 or missing >= (self.batch_size if self.drop_last else self.shard.world_size):
            stream = isinstance(self.sampler, StreamOrder)
            name = type(self.sampler.dataset if stream else self.sampler).__name__
            if not self._warned:
                warnings.warn(
                    f"{name} gave {self.position} samples in an epoch, but its len() says {said}: "
                    "len(), batches_left and schedules by epochs are off. Correct its __len__"
                    + (", and let each worker give its own part of the samples "
                       "(torch.utils.data.get_worker_info)." if stream else "."), stacklevel=4)
            self._warned = True
        self.go_to(self._epoch + 1)

    def said(self, left: int) -> int:
        """What len() says where `left` batches are left; kept, to notice loops that count to it."""
        if not self.n_delivered:
            self._said.add(left)
        return self.n_delivered + left

    def _look_for_early_ends(self) -> None:
        """Warn where two epochs in a row were left after as many batches as len() had said."""
        early = self._begun and self.n_delivered in self._said and bool(self.samples_left)
        early = early and self.batches_left > 0
        self._left_early = self._left_early + 1 if early else 0
        if self._left_early == 2:
            warnings.warn(
                f"Two epochs were left after {self.n_delivered} batches, as many as len() said "
                f"when they began, with {self.samples_left} samples to come: the batch size has "
                "changed since. Iterate until the loader ends (for batch in loader), or compare "
                "with the present len(), which is updated at every batch.", stacklevel=4)

    def new_iterator(self) -> int:
        """The id of a new iterator, the only one that may be drawn from."""
        if self._begun:
            self.go_to(self._epoch + 1)
        self._iterator_id += 1
        return self._iterator_id

    def is_current(self, iterator_id: int) -> bool:
        """Whether this is the newest iterator."""
        return iterator_id == self._iterator_id

    def check_current(self, iterator_id: int) -> None:
        """Raise RuntimeError unless this is the newest iterator."""
        if iterator_id != self._iterator_id:
            raise RuntimeError(_OUTDATED)

    def open_order(self, iterator_id: int, skip: int = 0) -> Iterator[int]:
        """This process's indices of the present epoch from the present position on.

        skip: samples between the state of a user's sampler and the position.
        """
        self.check_current(iterator_id)
        # Not before: iterators that draw nothing begin no epoch.
        self._begun = True
        start, n = self.position, self._num_samples
        if n is not None:
            permutation = KeyedPermutation(n, self.seed, self._epoch) if self.shuffle else None
            return indices(self.shard.positions(start, n), permutation)
        generator = generator_of(self.sampler)
        if generator is not None:
            if self._restore is not None:
                generator.set_state(self._restore)
            self._begun_from = generator.get_state()
        self._restore = None
        self._promised = None if self.is_sized else length_of(self.sampler)
        skipped = skip if isinstance(self.sampler, Part) else start
        repeats = not isinstance(self.sampler, (Part, StreamOrder)) and generator is None
        order = self._summed(skipped) if repeats else islice(self.sampler, skipped, None)
        if self.is_sized:
            order = self._as_long_as_said(order, start)
        return self.shard.of_order(order, start, self.num_samples if self.is_sized else None)

    def _as_long_as_said(self, order: Iterator[int], start: int) -> Iterator[int]:
        """A user's order that processes share; RuntimeError unless it has len() indices."""
        at = start
        for at, index in enumerate(order, start + 1):
            if at > (self.num_samples or 0):
                break
            yield index
        if at != self.num_samples:
            more = "more than" if at > (self.num_samples or 0) else f"{at} instead of"
            raise RuntimeError(
                f"{type(self.sampler).__name__} gave {more} the {self.num_samples} indices that "
                "its length promised, by which processes divide an epoch: correct its __len__, or "
                "what it yields.")

    def _checksum(self) -> int:
        """Of the indices of a user's sampler up to the position; 0: unknown."""
        known = 0 < self.position <= len(self._checksums)
        return self._checksums[self.position - 1] if known else self._expected

    def _summed(self, skipped: int) -> Iterator[int]:
        """A user's order after `skipped` indices; RuntimeError unless those are the saved ones."""
        checksum, sums, random = 0, self._checksums, isinstance(self.sampler, SHUFFLING)
        for at, index in enumerate(self.sampler):
            if at == skipped and self._expected and not random and checksum != self._expected:
                raise RuntimeError(
                    f"{type(self.sampler).__name__} does not repeat the order of the run that "
                    "saved the state: some samples would come twice and others never. Give it a "
                    "generator attribute (torch.Generator) that it draws from, or state_dict and "
                    "load_state_dict, or let it depend on its set_epoch alone; or use "
                    "shuffle=True.")
            integral = isinstance(index, (int, np.integer))
            checksum = crc32(str(index).encode(), checksum) if integral else 0
            sums.append(checksum)
            if at >= skipped:
                yield index

    def sizes_to_come(self) -> tuple[int, list[int]]:
        """(whole batches, sizes of the others) left in the epoch; TypeError where not known."""
        left = self.samples_left
        if left is None:
            raise TypeError(
                "the number of batches is unknown, as the data set or sampler has no __len__: give "
                "it one, or count the batches as they come")
        return self.shard.sizes_to_come(self.batch_size, left, self.drop_last)

    def upcoming(self, requested: int) -> int:
        """Samples of the next batch; the requested size where the length need not be known."""
        if not self.is_sized:
            return requested
        left = max(0, (self.num_samples or 0) - self.position)
        return self.shard.next_size(requested, left, self.drop_last)

    def local_draw(self, size: int) -> int:
        """Samples that this process draws for the next batch; at least one, see Shard.positions."""
        if self.shard.world_size == 1:
            return size
        return max(min(1, size), self.shard.local_size(self.position, size))

    def take_back(self) -> None:
        """The batch recorded last could not be read, and does not count."""
        self.n_batches -= 1
        self.recent.pop()

    def record(self, requested: int, size: int) -> None:
        """Count a batch that begins at the present position."""
        self.n_batches += 1
        self.last_local_size = self.shard.local_size(self.position, size)
        self.recent.append((requested, size))


def _is_sampler(source: object) -> bool:
    iterable = isinstance(source, Iterable) and not hasattr(source, "__getitem__")
    return isinstance(source, Sampler) or iterable


def _checked_sampler(sampler: object) -> Iterable[int]:
    kind = type(sampler).__name__
    if not isinstance(sampler, Iterable):
        raise TypeError(f"sampler must be an iterable of indices, got {sampler!r} of type {kind}.")
    if isinstance(sampler, Iterator):
        raise TypeError(
            f"sampler must start again at each iter(), got an iterator ({kind}), which is used up "
            "after one epoch. Pass a list or a Sampler.")
    if isinstance(sampler, BatchSampler):
        raise TypeError(
            f"sampler must yield indices, got a batch sampler ({kind}), which yields lists of "
            "them. Pass the sampler inside it.")
    return sampler


def _sample_count(source: object) -> int:
    if isinstance(source, IterableDataset):
        raise TypeError(
            f"{type(source).__name__} is an iterable-style data set, which has no indices to "
            "sample. Pass a map-style data set.")
    if isinstance(source, Sized):
        return len(source)
    return integer("data_source must have a length, or", source, 0, MAX_SAMPLES)
