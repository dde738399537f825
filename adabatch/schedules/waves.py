"""Sizes that rise and fall between two ends: along cosines, triangles, or once down and up.

References: Loshchilov, Hutter (2017), "SGDR: Stochastic gradient descent with warm restarts", arXiv
1608.03983; Smith (2017), "Cyclical learning rates for training neural networks", arXiv 1506.01186;
Smith, Topin (2018), "Super-convergence", arXiv 1708.07120; all upside down: sizes grow where lrs
fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from typing_extensions import Unpack

from adabatch._checks import choice, function, integer, real
from adabatch.schedules.base import UNBOUNDED, Bounds, BSScheduler, clipped, rounded
from adabatch.schedules.managers import Loader

CYCLE_MODES = ("triangular", "triangular2", "exp_range")


class _BaseBelowMaximum(BSScheduler):
    """Between a base size, given or else the first size, and a known upper bound above it."""

    above_minimum = 0  # the least distance of a given base from the lower bound

    def __init__(self, dataloader: Loader | None, base_batch_size: int | None,
                 **bounds: Unpack[Bounds]):
        self._given_base = base_batch_size
        super().__init__(dataloader, **bounds)

    def _prepare(self) -> None:
        base = self.batch_size_manager.base_batch_size
        if self._given_base is not None:
            at_least = self.min_batch_size + self.above_minimum
            base = integer("base_batch_size", self._given_base, at_least)
        if self.max_batch_size == UNBOUNDED:
            raise ValueError(f"{type(self).__name__} needs max_batch_size, as the length of the "
                             "data set is unknown")
        if not base < self.max_batch_size:
            raise ValueError("base_batch_size must be below max_batch_size "
                             f"({self.max_batch_size}), got {base}")
        self.base_batch_size = base


class CosineAnnealingBS(_BaseBelowMaximum):
    """Move the batch size from base to max_batch_size along half a cosine in total_iters epochs (at
    least 2), back in as many, and so on. There must be an upper bound. base_batch_size is in
    [min_batch_size, max_batch_size); None: the first size.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = CosineAnnealingBS(loader, total_iters=2, max_batch_size=100)
        >>> [schedule.step() or schedule.batch_size for _ in range(4)]
        [55, 100, 55, 10]
    """

    def __init__(self, dataloader: Loader | None, total_iters: int,
                 base_batch_size: int | None = None, **bounds: Unpack[Bounds]):
        self.total_iters = integer("total_iters", total_iters, at_least=2)
        super().__init__(dataloader, base_batch_size, **bounds)

    def _prepare(self) -> None:
        super()._prepare()
        self._unrounded: float = self.base_batch_size

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        base, top, angle = self.base_batch_size, self.max_batch_size, math.pi / self.total_iters
        if (self.last_epoch - 1 - self.total_iters) % (2 * self.total_iters) == 0:
            # Just past the top the ratio is 0/0: the first step down starts from the size in use.
            self._unrounded = self.batch_size + (base - top) * (1 - math.cos(angle)) / 2
        else:
            now, before = (
                1 + math.cos(math.pi * epoch / self.total_iters)
                for epoch in (self.last_epoch, self.last_epoch - 1)
            )
            self._unrounded = now / before * (self._unrounded - top) + top
        return clipped(rounded(self._unrounded), base, top)


class CosineAnnealingBSWithWarmRestarts(_BaseBelowMaximum):
    """Grow the batch size from base to max_batch_size along half a cosine in t_i epochs, at first
    t_0, then restart from the base with t_i · factor epochs. Bounds as in CosineAnnealingBS.

    batch_size(t) = round(base + (max - base) · (1 - cos(π t / t_i)) / 2), t = 0 ... t_i inclusive.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=10)
        >>> schedule = CosineAnnealingBSWithWarmRestarts(loader, t_0=2, max_batch_size=100)
        >>> [schedule.step() or schedule.batch_size for _ in range(4)]
        [55, 100, 10, 55]
    """

    def __init__(self, dataloader: Loader | None, t_0: int, base_batch_size: int | None = None,
                 factor: int = 1, **bounds: Unpack[Bounds]):
        self.t_0 = self.t_i = integer("t_0", t_0, at_least=1)
        self.t_cur = 0
        self.factor = integer("factor", factor, at_least=1)
        super().__init__(dataloader, base_batch_size, **bounds)

    def get_new_bs(self) -> int:
        if self.last_epoch == 0:
            return self.batch_size
        self.t_cur += 1
        if self.t_cur > self.t_i:
            self.t_cur = 0
            self.t_i *= self.factor
        base, top = self.base_batch_size, self.max_batch_size
        rise = (1 + math.cos(math.pi + math.pi * self.t_cur / self.t_i)) / 2
        return clipped(rounded(base + (top - base) * rise), base, top)


class CyclicBS(BSScheduler):
    """Cycle the batch size from base down to min_batch_size and back:
    round(base - (base - min) · depth · scale). Step it after each batch.

    The scale is 1 ("triangular"), 0.5^(cycle - 1) ("triangular2"), gamma^step ("exp_range"), or
    scale_fn of the cycle (from 1) or the step.

    Args:
        base_batch_size: upper end of the cycle, in samples; None: the first size.
        step_size_down, step_size_up: steps in each half; up None: as many as down.
        mode: "triangular", "triangular2" or "exp_range"; ignored if scale_fn is given.
        scale_fn: a function with values in [0, 1]; saved as in LambdaBS.
        scale_mode: "cycle" or "iterations": the argument of scale_fn.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=100)
        >>> schedule = CyclicBS(loader, step_size_down=2, min_batch_size=20)
        >>> [schedule.step() or schedule.batch_size for _ in range(4)]
        [60, 20, 60, 100]
    """

    callables = ("scale_fn",)

    def __init__(self, dataloader: Loader | None, base_batch_size: int | None = None,
                 step_size_down: int = 2000, step_size_up: int | None = None,
                 mode: str = "triangular", gamma: float = 1.0,
                 scale_fn: Callable[[int], float] | None = None, scale_mode: str = "cycle",
                 **bounds: Unpack[Bounds]):
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
        total = float(self.step_size_down + self.step_size_up)
        turn = self.step_size_down / total
        cycle = math.floor(1 + self.last_epoch / total)
        position = 1.0 + self.last_epoch / total - cycle
        depth = position / turn if position <= turn else (position - 1) / (turn - 1)
        return rounded(base - (base - self.min_batch_size) * depth * self._scale(cycle))


class OneCycleBS(_BaseBelowMaximum):
    """Shrink the batch size from base to min_batch_size, then grow it to max_batch_size, within
    total_steps steps; then finished. The zeroth step keeps the size in use. There must be an upper
    bound.

    Args:
        decay_percentage: the fraction of them that shrinks the batch, a float in (0, 1); each part
            must round to at least one step.
        base_batch_size: where the curve starts, between the bounds; None: the first size.
        strategy: "cos" or "linear".

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(1000), batch_size=50)
        >>> bounds = {"min_batch_size": 10, "max_batch_size": 200}
        >>> schedule = OneCycleBS(loader, total_steps=4, decay_percentage=0.5, **bounds)
        >>> [schedule.step() or schedule.batch_size for _ in range(4)]
        [30, 10, 105, 200]
    """

    above_minimum = 1

    def __init__(self, dataloader: Loader | None, total_steps: int, decay_percentage: float = 0.3,
                 base_batch_size: int | None = None, strategy: str = "cos",
                 **bounds: Unpack[Bounds]):
        total_steps = integer("total_steps", total_steps, at_least=2)
        valid = isinstance(decay_percentage, float)
        if not (valid and 0 < decay_percentage < 1):
            error = ValueError if valid else TypeError
            raise error("decay_percentage must be a float between 0 and 1, "
                        f"got {decay_percentage!r}")
        self.total_steps, self.decay_percentage = total_steps, decay_percentage
        self.end_step_1 = round(total_steps * decay_percentage)
        self.end_step_2 = total_steps - self.end_step_1
        if self.end_step_1 < 1 or self.end_step_2 < 1:
            raise ValueError(f"decay_percentage {decay_percentage} of total_steps {total_steps} "
                             "leaves a part without a step: take more steps")
        self.strategy = choice("strategy", strategy, ("cos", "linear"))
        super().__init__(dataloader, base_batch_size, **bounds)

    def get_new_bs(self) -> int:
        low, high, step = self.min_batch_size, self.max_batch_size, self.last_epoch
        if step == 0:
            return self.batch_size
        if step <= self.end_step_1:
            new_bs = _anneal(self.base_batch_size, low, step / self.end_step_1, self.strategy)
        else:
            step -= self.end_step_1
            new_bs = _anneal(low, high, step / self.end_step_2, self.strategy)
            self._finished = step == self.end_step_2
        return clipped(rounded(new_bs), low, high)


def _anneal(start: float, end: float, fraction: float, strategy: str) -> float:
    """From start (fraction 0) to end (1), in a straight line ("linear") or half a cosine."""
    if strategy == "linear":
        return (end - start) * fraction + start
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * fraction))
