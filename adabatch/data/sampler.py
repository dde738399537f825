"""A batch sampler whose batch size may be set while it runs, and whose position in the epoch can be saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from adabatch.data.arguments import checked_int, checked_sampler, is_sampler, sample_count
from adabatch.data.order import KeyedPermutation
from adabatch.data.orders import StreamOrder, check_shared, generator_of, indices, is_stateful
from adabatch.data.processes import Processes
from adabatch.data.sampler_state import VERSION, checked_state, warn_of_new_order


class ResizableBatchSampler(Sampler[list[int]]):
    """Batches of indices of whatever size ``batch_size`` has at the moment a batch is drawn.

    Every sample comes exactly once an epoch under any sequence of sizes; the last batch is shorter, or left out with ``drop_last``. There is one order an epoch
    and one position in it, counted in samples: where the next batch begins. So a run is resumed by (epoch, position), whatever sizes came before.

    Each ``iter()`` starts the next epoch: epoch 0 first, then 1, … An epoch broken off (``break``) counts as begun. After ``set_epoch`` or ``load_state_dict``
    the next ``iter()`` starts where these say; an iterator that has drawn nothing leaves its epoch to its successor. Only the newest iterator may be drawn
    from: there is one position.

    Inside a plain ``torch.utils.data.DataLoader(dataset, batch_sampler=...)`` a new size holds for the very next batch if ``num_workers=0``. Workers have
    ``num_workers · prefetch_factor`` batches drawn ahead, which come in the old size, and ``position`` and ``len()`` count them as drawn.

    Args:
        data_source: a data set with a length, or the number of samples; or, as in torch's BatchSampler, a torch Sampler (any iterable of indices without
            ``__getitem__`` is taken for one).
        batch_size: samples of the next batch, >= 1. Settable at any time.
        shuffle: the order is a KeyedPermutation of (seed, epoch); otherwise 0 … n−1.
        sampler: the caller's own order of indices, taken as it is, any iterable (a list too); excludes ``shuffle``.
        seed: of the shuffle, 0 … 2⁶⁴ − 1. Not used otherwise.
        drop_last: leave out a last batch shorter than asked for. Settable at any time.
        rank, world_size: of this process among those that share the order. Sizes and positions are global, the same in all; what is drawn is this process's
            share, within one sample of any other's. All have equally many batches, a sample in each: the last ones may differ a little from what is asked for.

    Attributes:
        sampler: the caller's own sampler, or None.
        shuffle, seed: as given; load_state_dict sets the seed to the saved one.
        n_batches: batches drawn so far, over all epochs.
        recent: (size asked for, size drawn) of the last batches drawn, newest last.
        share: of the last batch drawn, the samples that are this process's.
        runs_ahead: batches are drawn before they are delivered, where a DataLoader has workers.

    Raises:
        TypeError: an argument of the wrong type, a data set without length, an iterator that is used up after one epoch, a batch sampler.
        ValueError: a number out of range, a sampler together with ``shuffle``, fewer samples than processes, or a sampler that processes cannot share.

    Example:
        >>> batches = ResizableBatchSampler(10, batch_size=4)
        >>> for batch in batches:
        ...     print(batch, len(batches))
        ...     batches.batch_size = 3
        [0, 1, 2, 3] 2
        [4, 5, 6] 1
        [7, 8, 9] 0
        >>> len(batches), batches.epoch
        (4, 1)
        >>> resumed = ResizableBatchSampler(10, batch_size=1)
        >>> _ = next(iter(batches))
        >>> resumed.load_state_dict(batches.state_dict())
        >>> next(iter(resumed))
        [3, 4, 5]
    """

    runs_ahead = True

    def __init__(
        self,
        data_source: int | Sized | Iterable[int] | None,
        batch_size: int,
        *,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        sampler = data_source if sampler is None and is_sampler(data_source) else sampler
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r} of type {type(flag).__name__}.")
        if sampler is not None and shuffle:
            raise ValueError(f"shuffle=True, but the order is the sampler's own ({type(sampler).__name__}). Pass either a sampler or shuffle=True.")
        self.sampler = None if sampler is None else checked_sampler(sampler)
        self._num_samples = sample_count(data_source) if sampler is None else None
        self.processes = Processes(rank, world_size)
        # Whether the epoch's length is known beforehand and kept to.
        self.is_sized = sampler is None or (world_size > 1 and not isinstance(sampler, StreamOrder))
        if world_size > 1 and not isinstance(sampler, StreamOrder):
            self.processes.check_epoch(check_shared(sampler) if sampler is not None else self._num_samples)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = checked_int("seed", seed, 0, 2**64 - 1)
        self.drop_last = drop_last
        self.n_batches = self.share = self._epoch = self._position = 0
        self.recent: deque[tuple[int, int]] = deque(maxlen=4096)
        # Which iterator is the newest, and whether it has drawn anything: an epoch begun is not begun again.
        self._generation, self._begun = 0, False
        # Of the caller's own sampler: the state to begin the epoch from (set by load_state_dict), and the one it was begun from.
        self._restore = self._begun_from = None

    @property
    def batch_size(self) -> int:
        """Samples of the batches drawn from now on, of all processes together."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        valid = type(batch_size) is int and batch_size >= self.processes.world_size  # a loop may set it for every batch
        self._batch_size = batch_size if valid else self.processes.check_size(batch_size)

    @property
    def epoch(self) -> int:
        """The epoch being drawn; after its end and before the first batch, the epoch that comes next."""
        return self._epoch

    @property
    def position(self) -> int:
        """Samples of the present epoch drawn so far."""
        return self._position

    @property
    def last_size(self) -> int:
        """Samples of the last batch drawn, of all processes together; 0 before the first."""
        return self.recent[-1][1] if self.recent else 0

    @property
    def num_samples(self) -> int:
        """Samples of a whole epoch.

        Raises:
            TypeError: the caller's own sampler has no length.
        """
        if self._num_samples is not None:
            return self._num_samples
        try:
            return len(self.sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError) as error:
            name = type(self.sampler).__name__
            raise TypeError(f"The length is unknown: the sampler ({name}) has no __len__. Give it one, or count the batches as they come.") from error

    def __len__(self) -> int:
        """Batches still to come in the present epoch at the present batch size; before and after an epoch, those of a whole one.

        Raises:
            TypeError: the caller's own sampler has no length.
        """
        whole, others = self._to_come()
        return whole + len(others)

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self._start())

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` start ``epoch`` from its beginning; where a loaded state stands inside ``epoch``, from there.

        A sampler of the caller's own that has a ``set_epoch`` is told too.

        Raises:
            TypeError: ``epoch`` is no integer.
            ValueError: ``epoch`` is negative.
        """
        epoch = checked_int("epoch", epoch, 0, 2**64 - 1)
        if self._begun or epoch != self._epoch:
            self._go_to(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain numbers (and, for a sampler of the caller's own, its state), loadable with ``weights_only=True``.

        Of the caller's own sampler, its ``state_dict()`` is kept if it has one, otherwise the state its ``generator`` had when the epoch began if it has one.
        """
        generator = self._begun_from if self._begun else self._restore
        if generator is None and generator_of(self.sampler) is not None:
            generator = generator_of(self.sampler).get_state()
        return {
            "version": VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self.batch_size,
            "num_samples": self._num_samples,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "sampler": self.sampler.state_dict() if is_stateful(self.sampler) else None,
            "generator": generator,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state`` was saved, with any number of processes. Batch size (of at least a sample for each process) and seed
        become the saved ones; ``drop_last`` stays.

        The built-in orders are resumed exactly. A sampler of the caller's own that has ``state_dict`` and ``load_state_dict`` goes on by itself; any other
        starts its epoch again, from the saved state of its ``generator`` if it has one, and ``position`` indices are drawn and dropped: the same samples
        remain only if it repeats its order.

        Raises:
            ValueError: an unknown version, missing or unknown entries, or a state of another data set or another kind of order. Nothing is changed then.
            TypeError: an entry that should be an integer is none. Nothing is changed then.

        Warns:
            UserWarning: a random sampler of torch's without a generator cannot repeat its order.
        """
        epoch, position, batch_size, self.seed = checked_state(state, self._num_samples, self.shuffle, self.sampler)
        own = generator_of(self.sampler)
        self.batch_size = max(batch_size, self.processes.world_size)
        self._go_to(epoch, position)
        if is_stateful(self.sampler):
            self.sampler.load_state_dict(state["sampler"])
        elif position == 0 and own is not None:
            # Now, not at the first draw: a DataLoader may share the generator and draw from it in between, as it did in the run that saved the state.
            own.set_state(state["generator"])
        else:
            self._restore = state["generator"]
            if position and self._restore is None:
                warn_of_new_order(self.sampler, position)

    def _go_to(self, epoch: int, position: int = 0) -> None:
        self._epoch, self._position = epoch, position
        self._begun = False
        self._begun_from = self._restore = None
        self._generation += 1

    def _batches(self, generation: int) -> Iterator[list[int]]:
        order = self._begin(generation)
        while True:
            asked = self.batch_size
            size = self._upcoming(asked)
            batch = list(islice(order, self._draws(size)))
            if not batch or (self.drop_last and self._num_samples is None and len(batch) < size):
                break
            self._count(asked, len(batch) if self.processes.world_size == 1 else size)
            self._position += self.last_size
            yield batch
            self._check_newest(generation)
        self._go_to(self._epoch + 1)

    @property
    def _left(self) -> int:
        return max(0, self.num_samples - self._position)

    def _to_come(self) -> tuple[int, list[int]]:
        return self.processes.sizes_to_come(self.batch_size, self._left, self.drop_last)

    def _upcoming(self, asked: int) -> int:
        """Samples of the next batch: what is asked for where the epoch's length need not be known."""
        return self.processes.size_at(asked, self._left, self.drop_last) if self.is_sized else asked

    def _draws(self, size: int) -> int:
        """Samples of this process in the next batch; one at least, see Processes.positions."""
        return size if self.processes.world_size == 1 else max(min(1, size), self.processes.share(self._position, size))

    # AdaptiveDataLoader draws through these itself, and counts what it delivers: position and recent are then those of delivered batches.

    def _start(self) -> int:
        if self._begun:
            self._go_to(self._epoch + 1)
        self._generation += 1
        return self._generation

    def _begin(self, generation: int, skip: int = 0) -> Iterator[int]:
        self._check_newest(generation)
        order = self._order(skip)
        # Not before: iterators that draw nothing begin no epoch.
        self._begun = True
        return order

    def _count(self, asked: int, n: int) -> None:
        self.n_batches += 1
        self.share = self.processes.share(self._position, n)
        self.recent.append((asked, n))

    def _check_newest(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError(
                "This iterator of a ResizableBatchSampler is out of date: iter(), set_epoch() or load_state_dict() came after it, and the sampler keeps one "
                "position. For two loops at once build two samplers (and two loaders)."
            )

    def _order(self, skip: int) -> Iterator[int]:
        """This process's indices of the present epoch from the present position on; `skip` are between the state of a sampler of the caller's own and there."""
        start, n = self._position, self._num_samples
        if n is not None:
            return indices(self.processes.positions(start, n), KeyedPermutation(n, self.seed, self._epoch) if self.shuffle else None)
        generator = generator_of(self.sampler)
        if generator is not None:
            if self._restore is not None:
                generator.set_state(self._restore)
            self._begun_from = generator.get_state()
        self._restore = None
        order = islice(self.sampler, skip if is_stateful(self.sampler) else start, None)
        return self.processes.of_order(order, start, self.num_samples if self.is_sized else None)
