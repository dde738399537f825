"""A batch sampler whose batch size may be set while it runs, and whose position in the epoch can be saved."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from adabatch.data.arguments import checked_int, checked_sampler, is_sampler, sample_count
from adabatch.data.permutation import KeyedPermutation

_VERSION = 1
# Indices worked out at a time: enough to make NumPy's cost per call small, few enough for the first batch to come at once.
_BLOCK = 1024
_KEYS = {"version", "epoch", "position", "batch_size", "num_samples", "shuffle", "seed", "sampler", "generator"}


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

    Attributes:
        sampler: the caller's own sampler, or None.
        shuffle, seed: as given; load_state_dict sets the seed to the saved one.
        n_batches: batches drawn so far, over all epochs.
        recent: (size asked for, size drawn) of the last batches drawn, newest last.
        runs_ahead: batches are drawn before they are delivered, where a DataLoader has workers.

    Raises:
        TypeError: an argument of the wrong type, a data set without length, an iterator that is used up after one epoch, a batch sampler.
        ValueError: a number out of range, or a sampler together with ``shuffle``.

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
    ) -> None:
        sampler = data_source if sampler is None and is_sampler(data_source) else sampler
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r} of type {type(flag).__name__}.")
        if sampler is not None and shuffle:
            raise ValueError(f"shuffle=True, but the order is the sampler's own ({type(sampler).__name__}). Pass either a sampler or shuffle=True.")
        self.sampler = None if sampler is None else checked_sampler(sampler)
        self._num_samples = sample_count(data_source) if sampler is None else None
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = checked_int("seed", seed, 0, 2**64 - 1)
        self.drop_last = drop_last
        self.n_batches = self._epoch = self._position = 0
        self.recent: deque[tuple[int, int]] = deque(maxlen=4096)
        # Which iterator is the newest, and whether it has drawn anything: an epoch begun is not begun again.
        self._generation, self._begun = 0, False
        # Of the caller's own sampler: the state to begin the epoch from (set by load_state_dict), and the one it was begun from.
        self._restore = self._begun_from = None

    @property
    def batch_size(self) -> int:
        """Samples of the batches drawn from now on."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._batch_size = checked_int("batch_size", batch_size, 1)

    @property
    def epoch(self) -> int:
        """The epoch being drawn; after its end and before the first batch, the epoch that comes next."""
        return self._epoch

    @property
    def position(self) -> int:
        """Samples of the present epoch drawn so far."""
        return self._position

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
        left = max(0, self.num_samples - self._position)
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

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
        if generator is None and self._generator is not None:
            generator = self._generator.get_state()
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self.batch_size,
            "num_samples": self._num_samples,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "sampler": self.sampler.state_dict() if self._stateful else None,
            "generator": generator,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state`` was saved. Batch size and seed become the saved ones; ``drop_last`` stays.

        The built-in orders are resumed exactly. A sampler of the caller's own that has ``state_dict`` and ``load_state_dict`` goes on by itself; any other
        starts its epoch again, from the saved state of its ``generator`` if it has one, and ``position`` indices are drawn and dropped: the same samples
        remain only if it repeats its order.

        Raises:
            ValueError: an unknown version, missing or unknown entries, or a state of another data set or another kind of order. Nothing is changed then.
            TypeError: an entry that should be an integer is none. Nothing is changed then.

        Warns:
            UserWarning: a random sampler of torch's without a generator cannot repeat its order.
        """
        version = state.get("version")
        if version != _VERSION:
            raise ValueError(f"Unknown version of the sampler's state: got {version!r}, this adabatch reads {_VERSION}.")
        if state.keys() != _KEYS:
            raise ValueError(f"The sampler's state must have the entries {sorted(_KEYS)}, got {sorted(state)}.")
        saved = (state["num_samples"], state["shuffle"], state["sampler"] is not None, state["generator"] is not None)
        here = (self._num_samples, self.shuffle, self._stateful, self._generator is not None)
        if saved != here:
            names = "num_samples", "shuffle", "sampler with a state_dict", "sampler with a generator"
            differing = ", ".join(f"{name}: saved {theirs}, here {ours}" for name, theirs, ours in zip(names, saved, here, strict=True) if theirs != ours)
            raise ValueError(f"The state belongs to another order of samples ({differing}). Build the sampler as in the run that saved it.")
        epoch = checked_int("epoch", state["epoch"], 0, 2**64 - 1)
        position = checked_int("position", state["position"], 0)
        batch_size = checked_int("batch_size", state["batch_size"], 1)
        self.seed = checked_int("seed", state["seed"], 0, 2**64 - 1)
        self.batch_size = batch_size
        self._go_to(epoch, position)
        if self._stateful:
            self.sampler.load_state_dict(state["sampler"])
        elif position == 0 and self._generator is not None:
            # Now, not at the first draw: a DataLoader may share the generator and draw from it in between, as it did in the run that saved the state.
            self._generator.set_state(state["generator"])
        else:
            self._restore = state["generator"]
            if position and self._restore is None and isinstance(self.sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
                warnings.warn(
                    f"{type(self.sampler).__name__} has no generator, so its order cannot be repeated: resumed at position {position} of a new order, the "
                    "epoch repeats some samples and leaves out others. Give the sampler a generator, or use shuffle=True of ResizableBatchSampler.",
                    stacklevel=2,
                )

    @property
    def _stateful(self) -> bool:
        return hasattr(self.sampler, "state_dict") and hasattr(self.sampler, "load_state_dict")

    @property
    def _generator(self) -> torch.Generator | None:
        generator = getattr(self.sampler, "generator", None)
        return generator if isinstance(generator, torch.Generator) and not self._stateful else None

    def _go_to(self, epoch: int, position: int = 0) -> None:
        self._epoch, self._position = epoch, position
        self._begun = False
        self._begun_from = self._restore = None
        self._generation += 1

    def _batches(self, generation: int) -> Iterator[list[int]]:
        order = self._begin(generation)
        while True:
            size = self.batch_size
            batch = list(islice(order, size))
            if not batch or (self.drop_last and len(batch) < size):
                break
            self._count(size, len(batch))
            self._position += len(batch)
            yield batch
            self._check_newest(generation)
        self._go_to(self._epoch + 1)

    # AdaptiveDataLoader draws through these itself, and counts what it delivers: position and recent are then those of delivered batches.

    def _start(self) -> int:
        if self._begun:
            self._go_to(self._epoch + 1)
        self._generation += 1
        return self._generation

    def _begin(self, generation: int) -> Iterator[int]:
        self._check_newest(generation)
        order = self._order()
        # Not before: iterators that draw nothing begin no epoch.
        self._begun = True
        return order

    def _count(self, asked: int, n: int) -> None:
        self.n_batches += 1
        self.recent.append((asked, n))

    def _check_newest(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError(
                "This iterator of a ResizableBatchSampler is out of date: iter(), set_epoch() or load_state_dict() came after it, and the sampler keeps one "
                "position. For two loops at once build two samplers (and two loaders)."
            )

    def _order(self) -> Iterator[int]:
        """The indices of the present epoch from the present position on."""
        start, n = self._position, self._num_samples
        if n is None:
            return self._order_of_sampler(start)
        if not self.shuffle:
            return iter(range(start, n))
        permutation = KeyedPermutation(n, self.seed, self._epoch)
        return chain.from_iterable(permutation(range(at, min(at + _BLOCK, n))).tolist() for at in range(start, n, _BLOCK))

    def _order_of_sampler(self, start: int) -> Iterator[int]:
        if self._generator is not None:
            if self._restore is not None:
                self._generator.set_state(self._restore)
            self._begun_from = self._generator.get_state()
        self._restore = None
        return islice(self.sampler, 0 if self._stateful else start, None)
