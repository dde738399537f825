"""Down and up again: CyclicBS, OneCycleBS.

References: Smith (2017), "Cyclical learning rates for training neural networks", arXiv 1506.01186;
Smith, Topin (2018), "Super-convergence", arXiv 1708.07120; both upside down: sizes fall where lrs
grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from typing_extensions import Unpack

from adabatch._checks import choice, function, integer, real
from adabatch.schedules.base import Bounds, BSScheduler, clipped, rounded
from adabatch.schedules.cosine import base_below_maximum
from adabatch.schedules.managers import Loader

CYCLE_MODES = ("triangular", "triangular2", "exp_range")


def triangle(step: int, step_size_down: int, step_size_up: int) -> tuple[int, float]:
    """Number of the cycle (from 1) and depth in it: 0 at its ends, 1 after step_size_down steps.

    Example:
        >>> [triangle(step, 2, 2) for step in range(5)]
        [(1, 0.0), (1, 0.5), (1, 1.0), (1, 0.5), (2, 0.0)]
    """
    total = float(step_size_down + step_size_up)
    turn = step_size_down / total
    cycle = math.floor(1 + step / total)
    position = 1.0 + step / total - cycle
    return cycle, position / turn if position <= turn else (position - 1) / (turn - 1)


class CyclicBS(BSScheduler):
    """Cycle the batch size from base down to min_batch_size and back:
    round(base - (base - min) · depth · scale). Step it after each batch.

    The scale is 1 ("triangular"), 0.5^(cycle - 1) ("triangular2"), gamma^step ("exp_range"), or
    scale_fn of the cycle (from 1) or the step.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`; min_batch_size is the lower end.
        base_batch_size: upper end of the cycle, in samples; None: the first size.
        step_size_down, step_size_up: steps in each half, at least 1; up None: as many as down.
        mode: "triangular", "triangular2" or "exp_range"; ignored if scale_fn is given.
        gamma: base of "exp_range", greater than 0.
        scale_fn: a function with values in [0, 1]. The state holds the plain attributes of an
            object, but no function.
        scale_mode: "cycle" or "iterations": the argument of scale_fn.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: one is out of range, or min_batch_size not below the base.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=100)
        >>> schedule = CyclicBS(loader, step_size_down=2, min_batch_size=20)
        >>> schedule.step(); schedule.step()
        >>> schedule.batch_size
        20
    """

    callables = ("scale_fn",)

    def __init__(
        self, dataloader: Loader | None, base_batch_size: int | None = None,
        step_size_down: int = 2000, step_size_up: int | None = None, mode: str = "triangular",
        gamma: float = 1.0, scale_fn: Callable[[int], float] | None = None,
        scale_mode: str = "cycle", **bounds: Unpack[Bounds],
    ):
        given = base_batch_size
        self._given_base = None if given is None else integer("base_batch_size", given)
        self.step_size_down = integer("step_size_down", step_size_down, at_least=1)
        self.step_size_up = self.step_size_down
        if step_size_up is not None:
            self.step_size_up = integer("step_size_up", step_size_up, at_least=1)
        self.gamma = float(real("gamma", gamma, above=0))
        self.scale_fn = None if scale_fn is None else function("scale_fn", scale_fn)
        self.mode = mode if scale_fn is not None else choice("mode", mode, CYCLE_MODES)
        self.scale_mode = choice("scale_mode", scale_mode, ("cycle", "iterations"))
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        given = self._given_base
        self.base_batch_size = self.batch_size_manager.base_batch_size if given is None else given
        if not self.min_batch_size < self.base_batch_size:
            raise ValueError("min_batch_size must be below the base batch size "
                             f"({self.base_batch_size}), got {self.min_batch_size}")

    def _scale(self, cycle: int) -> float:
        if self.scale_fn is not None:
            return self.scale_fn(cycle if self.scale_mode == "cycle" else self.last_epoch)
        if self.mode == "triangular2":
            return 0.5 ** (cycle - 1)
        return self.gamma**self.last_epoch if self.mode == "exp_range" else 1.0

    def get_new_bs(self) -> int:
        base = self.base_batch_size
        if self.last_epoch == 0:
            return self.batch_size if self._given_base is None else base
        cycle, depth = triangle(self.last_epoch, self.step_size_down, self.step_size_up)
        return rounded(base - (base - self.min_batch_size) * depth * self._scale(cycle))


def anneal(start: float, end: float, fraction: float, strategy: str) -> float:
    """From start (fraction 0) to end (1), in a straight line ("linear") or half a cosine ("cos").

    Example:
        >>> anneal(10, 20, 0.5, "linear"), anneal(10, 20, 1.0, "cos")
        (15.0, 20.0)
    """
    if strategy == "linear":
        return (end - start) * fraction + start
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * fraction))


class OneCycleBS(BSScheduler):
    """Shrink the batch size from base to min_batch_size, then grow it to max_batch_size, within
    total_steps steps; then finished. The zeroth step keeps the size in use.

    Args:
        dataloader, **bounds: see :class:`BSScheduler`.
        total_steps: steps of the cycle.
        decay_percentage: the fraction of them that shrinks the batch, a float in (0, 1); each part
            must round to at least one step.
        base_batch_size: where the curve starts, in samples, above min_batch_size; None: the first
            size.
        strategy: "cos" or "linear".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: one is out of range, the base not below max_batch_size, or there is no upper
            bound.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=50)
        >>> bounds = {"min_batch_size": 10, "max_batch_size": 200}
        >>> schedule = OneCycleBS(loader, total_steps=2, decay_percentage=0.5, **bounds)
        >>> schedule.step()
        >>> schedule.batch_size
        10
        >>> schedule.step()
        >>> schedule.batch_size, schedule.finished
        (200, True)
    """

    def __init__(
        self, dataloader: Loader | None, total_steps: int, decay_percentage: float = 0.3,
        base_batch_size: int | None = None, strategy: str = "cos", **bounds: Unpack[Bounds],
    ):
        total_steps = integer("total_steps", total_steps, at_least=2)
        valid = isinstance(decay_percentage, float)
        if not (valid and 0 < decay_percentage < 1):
            error = ValueError if valid else TypeError
            raise error("decay_percentage must be a float between 0 and 1, "
                        f"got {decay_percentage!r}")
        self.end_step_1 = round(total_steps * decay_percentage)
        self.end_step_2 = total_steps - self.end_step_1
        if self.end_step_1 < 1 or self.end_step_2 < 1:
            raise ValueError(f"decay_percentage {decay_percentage} of total_steps {total_steps} "
                             "leaves a part without a step: take more steps")
        self._given_base = base_batch_size
        self.strategy = choice("strategy", strategy, ("cos", "linear"))
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        self.base_batch_size = base_below_maximum(self, self._given_base, self.min_batch_size + 1)

    def get_new_bs(self) -> int:
        low, high, step = self.min_batch_size, self.max_batch_size, self.last_epoch
        if step == 0:
            return self.batch_size
        if step <= self.end_step_1:
            new_bs = anneal(self.base_batch_size, low, step / self.end_step_1, self.strategy)
        else:
            step -= self.end_step_1
            new_bs = anneal(low, high, step / self.end_step_2, self.strategy)
            self._finished = step == self.end_step_2
        return clipped(rounded(new_bs), low, high)
