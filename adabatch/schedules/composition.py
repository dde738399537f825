"""Several schedules over one loader: in sequence or all at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from adabatch._checks import integers
from adabatch.schedules.base import BSScheduler


class _Composition(BSScheduler):
    """At least two schedules, past their zeroth step, that write to one loader in the same way."""

    unsaved = (*BSScheduler.unsaved, "_started")

    def __init__(self, schedulers: Sequence[BSScheduler]):  # in place of BSScheduler's constructor
        kind = type(self).__name__
        if not isinstance(schedulers, (list, tuple)):
            found = type(schedulers).__name__
            raise TypeError(f"{kind} needs a list or tuple of schedules, got {found}")
        for i, each in enumerate(schedulers):
            if not isinstance(each, BSScheduler):
                found = type(each).__name__
                raise TypeError(f"schedulers[{i}] must be a batch-size schedule, got {found}")
        if len(schedulers) < 2:
            raise ValueError(f"{kind} needs at least two schedules, got {len(schedulers)}")
        first, kinds = schedulers[0], [type(each.batch_size_manager) for each in schedulers]
        for i, each in enumerate(schedulers):
            if each.dataloader is not first.dataloader:
                raise ValueError(f"{kind} needs schedules of one loader, but that of "
                                 f"schedulers[{i}] differs from that of schedulers[0]")
            if not issubclass(kinds[i], kinds[0]):
                raise ValueError(f"{kind} needs managers of one class, got {kinds[0].__name__} in "
                                 f"schedulers[0] and {kinds[i].__name__} in schedulers[{i}]")
        self.schedulers = self._started = tuple(schedulers)
        self.dataloader, self.batch_size_manager = first.dataloader, first.batch_size_manager
        self.max_batch_size = max(each.max_batch_size for each in schedulers)
        self.min_batch_size = min(each.min_batch_size for each in schedulers)
        self.verbose = self._finished = False
        self.last_epoch = 0

    def _rewind(self) -> None:
        super()._rewind()
        for schedule in self._started:
            schedule._rewind()

    def _restart(self) -> None:
        super()._restart()
        for schedule in self._started:
            schedule._restart()


class SequentialBS(_Composition):
    """Run one schedule after the other: schedulers[i] from milestones[i - 1] on. Build the first
    schedule first.

    The loader returns to its first size, and the first schedule repeats its zeroth step. At its
    milestone a schedule continues from the size in use with its first step, not its zeroth: a
    ConstantBS that comes second only divides. Finished when the last milestone has passed and the
    last schedule is finished. Right after construction ``last_bs`` is the first size;
    ``batch_size`` is the size in use.

    Args:
        schedulers: at least two, over one loader.
        milestones: one fewer, each at least the one before, the first at least 1.

    Raises:
        TypeError, ValueError: an argument is not of this form, or the loaders differ.

    Example:
        >>> from adabatch.schedules import ConstantBS, ExponentialBS, VirtualBatchSize
        >>> bounds = {"batch_size_manager": VirtualBatchSize(10), "max_batch_size": 999}
        >>> first = ConstantBS(None, factor=10, milestone=2, **bounds)
        >>> second = ExponentialBS(None, gamma=2.0, **bounds)
        >>> schedule = SequentialBS([first, second], milestones=[3])
        >>> [schedule.step() or schedule.batch_size for _ in range(5)]
        [100, 10, 20, 40, 80]
    """

    def __init__(self, schedulers: Sequence[BSScheduler], milestones: Sequence[int]):
        super().__init__(schedulers)
        self._started = self.schedulers[:1]
        self.milestones = integers("milestones", milestones, at_least=1)
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones must be sorted, got {self.milestones}")
        n = len(self.schedulers)
        if len(self.milestones) != n - 1:
            raise ValueError(f"{n} schedules need {n - 1} milestones, got {len(self.milestones)}")
        self._last_bs = self.batch_size_manager.base_batch_size
        for schedule in self.schedulers:
            schedule._rewind()
        self.set_batch_size(self.batch_size_manager.base_batch_size)
        self.schedulers[0].step()

    @property
    def finished(self) -> bool:
        past = self.last_epoch > self.milestones[-1]
        return self._finished or (past and self.schedulers[-1].finished)

    def step(self, **kwargs: object) -> None:
        """Step the schedule whose turn it is, with the keyword arguments."""
        self.last_epoch += 1
        if self.finished:
            return
        turn = bisect_right(self.milestones, self.last_epoch)
        schedule = self.schedulers[turn]
        if turn and self.milestones[turn - 1] == self.last_epoch:
            schedule._restart()
        if not schedule.finished:
            schedule.step(**kwargs)
            self._last_bs = schedule.last_bs


class ChainedBSScheduler(_Composition):
    """Step all schedules (at least two, over one loader), in order, at each step: their effects
    multiply. Finished when all are. Errors as in :class:`SequentialBS`.

    Example:
        >>> from adabatch.schedules import ConstantBS, ExponentialBS, VirtualBatchSize
        >>> bounds = {"batch_size_manager": VirtualBatchSize(10), "max_batch_size": 999}
        >>> first = ConstantBS(None, factor=10, milestone=2, **bounds)
        >>> schedule = ChainedBSScheduler([first, ExponentialBS(None, gamma=1.1, **bounds)])
        >>> [schedule.step() or schedule.batch_size for _ in range(3)]
        [110, 12, 13]
    """

    def __init__(self, schedulers: Sequence[BSScheduler]):
        super().__init__(schedulers)
        self._last_bs = self.schedulers[-1].last_bs

    @property
    def finished(self) -> bool:
        return all(schedule.finished for schedule in self.schedulers)

    def step(self, **kwargs: object) -> None:
        self.last_epoch += 1
        for schedule in self.schedulers:
            schedule.step(**kwargs)
        self._last_bs = self.schedulers[-1].last_bs
