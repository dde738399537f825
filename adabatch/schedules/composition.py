"""Several schedules over one loader: one after the other (SequentialBS), or all at each step (ChainedBSScheduler)."""

from bisect import bisect_right
from collections.abc import Sequence

from adabatch._checks import integers
from adabatch.schedules.base import BSScheduler


def check_members(kind: str, schedulers: object) -> tuple[BSScheduler, ...]:
    """Check that at least two schedules write to the same loader in the same way.

    Raises:
        TypeError: ``schedulers`` is no list or tuple of schedules.
        ValueError: there are fewer than two, or their loaders or the classes of their managers differ.

    Example:
        >>> check_members("SequentialBS", [])
        Traceback (most recent call last):
        ValueError: SequentialBS needs at least two schedules, got 0.
    """
    if not isinstance(schedulers, (list, tuple)):
        raise TypeError(f"{kind} needs a list or tuple of schedules, got {type(schedulers).__name__}.")
    for i, schedule in enumerate(schedulers):
        if not isinstance(schedule, BSScheduler):
            raise TypeError(f"schedulers[{i}] must be a batch-size schedule, got {type(schedule).__name__}.")
    if len(schedulers) < 2:
        raise ValueError(f"{kind} needs at least two schedules, got {len(schedulers)}.")
    first = schedulers[0]
    for i, schedule in enumerate(schedulers):
        if schedule.dataloader is not first.dataloader:
            raise ValueError(f"{kind} needs schedules of one loader; schedulers[{i}] has another than schedulers[0].")
        if not isinstance(schedule.batch_size_manager, type(first.batch_size_manager)):
            names = f"{type(schedule.batch_size_manager).__name__}, schedulers[0] {type(first.batch_size_manager).__name__}"
            raise ValueError(f"{kind} needs schedules with managers of one class; schedulers[{i}] has {names}.")
    return tuple(schedulers)


class SequentialBS(BSScheduler):
    """Run one schedule after the other: schedulers[i] from milestones[i - 1] on. Build the first schedule first.

    The loader goes back to its size at the start, and the first schedule does its zeroth step again. At its milestone a schedule goes on from the size in
    use with its first step, not its zeroth: a ConstantBS that comes second only divides. Finished when the last milestone is behind and the last
    schedule finished. Right after the construction ``last_bs`` is the size at the start; ``batch_size`` is the size in use.

    Args:
        schedulers: at least two, over one loader.
        milestones: one fewer, each at least the one before, the first at least 1.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: too few schedules or milestones, milestones unsorted, or the loaders differ.

    Example:
        >>> from adabatch.schedules import ConstantBS, ExponentialBS, VirtualBatchSize
        >>> size = {"dataloader": None, "batch_size_manager": VirtualBatchSize(10), "max_batch_size": 999}
        >>> schedule = SequentialBS([ConstantBS(factor=10, milestone=2, **size), ExponentialBS(gamma=2.0, **size)], milestones=[3])
        >>> sizes = []
        >>> for _ in range(5):
        ...     sizes.append(schedule.batch_size)
        ...     schedule.step()
        >>> sizes
        [100, 100, 10, 20, 40]
    """

    def __init__(self, schedulers: Sequence[BSScheduler], milestones: Sequence[int]):
        schedulers = check_members("SequentialBS", schedulers)
        milestones = integers("milestones", milestones, at_least=1)
        if milestones != sorted(milestones):
            raise ValueError(f"milestones must not fall from one to the next, got {milestones}.")
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(f"{len(schedulers)} schedules need {len(schedulers) - 1} milestones, got {len(milestones)}.")
        _adopt(self, schedulers)
        self.milestones = milestones
        self._last_bs = self.batch_size_manager._base_batch_size
        for schedule in schedulers:
            schedule._rewind()
        self.set_batch_size(self.batch_size_manager._base_batch_size)
        schedulers[0].step()

    @property
    def finished(self) -> bool:
        """Whether the last milestone is behind and the last schedule finished."""
        return self._finished or (self.last_epoch > self.milestones[-1] and self.schedulers[-1].finished)

    def step(self, **kwargs) -> None:
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

    def state_dict(self) -> dict:
        return super().state_dict() | {"schedulers": [schedule.state_dict() for schedule in self.schedulers]}

    def load_state_dict(self, state_dict: dict) -> None:
        _load_members(self.schedulers, state_dict)
        super().load_state_dict(state_dict)

    def _rewind(self) -> None:
        super()._rewind()
        self.schedulers[0]._rewind()

    def _restart(self) -> None:
        super()._restart()
        self.schedulers[0]._restart()


class ChainedBSScheduler(BSScheduler):
    """Step all schedules, in order, at each step: their effects multiply. Finished when all are.

    Args:
        schedulers: at least two, over one loader.

    Raises:
        TypeError: ``schedulers`` is no list or tuple of schedules.
        ValueError: there are fewer than two, or their loaders differ.

    Example:
        >>> from adabatch.schedules import ConstantBS, ExponentialBS, VirtualBatchSize
        >>> size = {"dataloader": None, "batch_size_manager": VirtualBatchSize(10), "max_batch_size": 999}
        >>> schedule = ChainedBSScheduler([ConstantBS(factor=10, milestone=2, **size), ExponentialBS(gamma=1.1, **size)])
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        12
    """

    def __init__(self, schedulers: Sequence[BSScheduler]):
        _adopt(self, check_members("ChainedBSScheduler", schedulers))
        self._last_bs = self.schedulers[-1].last_bs

    @property
    def finished(self) -> bool:
        """Whether all schedules are finished."""
        return all(schedule.finished for schedule in self.schedulers)

    def step(self, **kwargs) -> None:
        """Step every schedule with the keyword arguments."""
        self.last_epoch += 1
        for schedule in self.schedulers:
            schedule.step(**kwargs)
        self._last_bs = self.schedulers[-1].last_bs

    def state_dict(self) -> dict:
        return super().state_dict() | {"schedulers": [schedule.state_dict() for schedule in self.schedulers]}

    def load_state_dict(self, state_dict: dict) -> None:
        _load_members(self.schedulers, state_dict)
        super().load_state_dict(state_dict)

    def _rewind(self) -> None:
        super()._rewind()
        for schedule in self.schedulers:
            schedule._rewind()

    def _restart(self) -> None:
        super()._restart()
        for schedule in self.schedulers:
            schedule._restart()


def _adopt(composition: BSScheduler, schedulers: tuple[BSScheduler, ...]) -> None:
    """What BSScheduler's constructor sets, taken from the schedules: they have done their zeroth step and checked their bounds."""
    composition.schedulers = schedulers
    composition.dataloader = schedulers[0].dataloader
    composition.batch_size_manager = schedulers[0].batch_size_manager
    composition.max_batch_size = max(schedule.max_batch_size for schedule in schedulers)
    composition.min_batch_size = min(schedule.min_batch_size for schedule in schedulers)
    composition.verbose = False
    composition.last_epoch = 0
    composition._finished = False


def _load_members(schedulers: tuple[BSScheduler, ...], state_dict: dict) -> None:
    states = state_dict.get("schedulers", [])
    if len(states) != len(schedulers):
        raise ValueError(f"The state holds {len(states)} schedules, this one {len(schedulers)}. Build the schedule that was saved.")
    for schedule, state in zip(schedulers, states, strict=True):
        schedule.load_state_dict(state)
