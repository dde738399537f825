"""What the scheduler keeps of each step: losses, seconds, epochs, and the record of the history."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from adabatch._transfers import is_remote
from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.layers import LayerStatistics
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import trace_error
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import BatchSource, State


def scalar_loss(loss: Tensor | float) -> float:
    """A step's loss as a number.

    Raises:
        ValueError: a tensor of several values.
        TypeError: not a number.

    Example:
        >>> scalar_loss(0.5)
        0.5
    """
    if isinstance(loss, Tensor):
        _check_scalar(loss)
        loss = loss.detach()
    try:
        return float(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"step() takes the loss of the step as a scalar tensor or a number, got {loss!r}"
        ) from error


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ValueError(
            "step() takes the scalar loss of the step, got a tensor of shape "
            f"{tuple(loss.shape)}: reduce it first, e.g. losses.mean()"
        )


class LossPool:
    """Pools the losses of a batch's micro-batches: Σ m_j l_j / m for means over them, Σ l_j for
    sums. A loop that reports only one loss, on the last micro-batch, reports the batch's own.

    Args:
        loader: where micro-batches come from.
        summed: the losses are sums over the samples.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> LossPool(ResizableBatchSampler(10, 4), summed=False).pool(0.5)
        0.5
    """

    def __init__(self, loader: BatchSource, summed: bool):
        self._micro, self._summed = loader.micro_batches, summed
        self._attempt, self._calls = -1, 0
        self._total: Tensor | float = 0.0

    def pool(self, loss: Tensor | float) -> Tensor | float | None:
        """Take one loss; the batch's, or None while micro-batches of it are to come. One on an
        accelerator is not read: the result is a tensor there.

        Raises:
            ValueError, TypeError: not a scalar.
        """
        micro = self._micro
        if micro is None or micro.count == 1:
            return _taken(loss)
        if self._attempt != micro.attempt:
            self._attempt, self._total, self._calls = micro.attempt, 0.0, 0
        self._calls += 1
        whole = self._summed or (micro.is_last and self._calls == 1)
        self._total = self._total + _taken(loss) * (1 if whole else micro.size)
        if not micro.is_last:
            return None
        return self._total if whole else self._total / micro.batch_size


def _taken(loss: Tensor | float) -> Tensor | float:
    if not isinstance(loss, Tensor) or not is_remote(loss):
        return scalar_loss(loss)
    _check_scalar(loss)
    return loss.detach().reshape(()).clone()  # a compiled step may overwrite it before it is read


class StepClock:
    """Seconds from step to step.

    Example:
        >>> clock = StepClock()
        >>> math.isnan(clock.lap()), clock.lap() >= 0
        (True, True)
    """

    def __init__(self) -> None:
        self._before = math.nan

    def lap(self) -> float:
        """Seconds since the last call; NaN at the first."""
        before, self._before = self._before, time.perf_counter()
        return self._before - before

    def reset(self) -> None:
        """The next lap is a first one."""
        self._before = math.nan


class EpochCount:
    """Counts the epochs that have ended, from the loader's position in samples.

    An epoch ends with the step after which no further batch is drawn, so that a size set there
    holds from the first batch of the next epoch. Where the length of an epoch is not known, and
    for an epoch that was broken off, the end is seen one step late, when the position restarts.

    Example:
        >>> from adabatch import ResizableBatchSampler
        >>> sampler = ResizableBatchSampler(10, 4)
        >>> count = EpochCount(sampler)
        >>> [count.after_step() for _ in range(2) for batch in sampler]
        [0, 0, 1, 1, 1, 2]
    """

    def __init__(self, loader: BatchSource):
        self._loader = loader
        self.ended, self._position, self._at_end = 0, math.inf, True
        self._iteration: int | None = None

    def after_step(self) -> int:
        """Call once a step: how many epochs have ended."""
        loader = self._loader
        position, total, iteration = loader.position, loader.num_samples, loader.n_iterations
        known = iteration is not None and self._iteration is not None
        restarted = iteration != self._iteration if known else position <= self._position
        broken_off = restarted and not self._at_end
        # With drop_last a smaller size may draw what was left over: that epoch has been counted.
        counted = self._at_end and not restarted
        left = math.inf if total is None else total - position
        self._at_end = counted or left <= 0 or (loader.drop_last and left < loader.batch_size)
        self.ended += broken_off + (self._at_end and not counted)
        self._position, self._iteration = position, iteration
        return self.ended

    def state_dict(self) -> State:
        """Plain numbers."""
        return {"ended": self.ended, "position": self._position, "at_end": self._at_end}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict()."""
        self.ended, self._position = state["ended"], state["position"]
        self._at_end, self._iteration = state["at_end"], None


class Recorder:
    """Writes what was seen and decided in a step into the history.

    Attributes:
        trace: the moving average of the variance trace.

    Raises:
        TypeError: `diagnostics` is not a history.

    Example:
        >>> Recorder(Diagnostics()).trace.count
        0
    """

    def __init__(self, diagnostics: Diagnostics):
        if not isinstance(diagnostics, Diagnostics):
            raise TypeError(
                "diagnostics must be None, for a new history, or an adabatch.Diagnostics() to "
                f"append to, got {diagnostics!r}; to write it to a file during the run, call "
                "scheduler.diagnostics.to_jsonl(path)"
            )
        self.diagnostics, self.trace = diagnostics, MovingAverage()

    def record(self, moments: GradientMoments | None, *, dropped: str, **fields: Any) -> None:
        """Append one record.

        Args:
            moments: of the step, unless they were dropped before the controller saw them.
            dropped: why the measurement was not used; empty where it was.
            fields: further fields of a `Record`.
        """
        if moments is not None:
            trace, n_measured = moments.variance_trace, moments.n_measured
            error, freedom = trace_error(moments)
            self.trace.update(trace, n_measured, error, freedom)
            if not dropped:
                fields |= {
                    "variance_trace": trace, "grad_sq_norm": moments.grad_sq_norm,
                    "true_grad_sq_norm": moments.true_grad_sq_norm, "n_measured": n_measured,
                    "variance_trace_step_error": error,
                }
                if moments.by_parameter or moments.by_group:
                    fields["layers"] = LayerStatistics.of_step(moments)
        self.diagnostics.append(dropped=dropped, **fields)
