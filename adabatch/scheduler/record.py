"""The scheduler's part of the history: one record a step."""

from __future__ import annotations

import math
import time
from typing import Any

from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.layers import LayerStatistics
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import trace_error
from adabatch.estimators.moments import GradientMoments
from adabatch.scheduler.pipeline import StepRecord

HISTORY = ("append", "state_dict", "load_state_dict")


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


class Recorder:
    """Writes what was seen and decided in a step into the history.

    Args:
        diagnostics: the history.

    Attributes:
        trace: the moving average of the variance trace.

    Raises:
        TypeError: what is given is no history.

    Example:
        >>> Recorder(Diagnostics()).trace.count
        0
    """

    def __init__(self, diagnostics: Diagnostics):
        if isinstance(diagnostics, type) or not all(callable(getattr(diagnostics, name, None)) for name in HISTORY):
            raise TypeError(
                f"diagnostics must be None, for a new history, or an adabatch.Diagnostics() to append to, got {diagnostics!r}; to write it to a file while the "
                "run goes on, call scheduler.diagnostics.to_jsonl(path)"
            )
        self.diagnostics, self.trace = diagnostics, MovingAverage()

    def record(self, seen: StepRecord, usable: GradientMoments | None, **decided: Any) -> None:
        """Append one record.

        Args:
            seen: the step, settled.
            usable: its moments, unless they were dropped.
            decided: samples_seen, proposed_batch_size, next_batch_size, lr, loss (a mean over the samples), dropped; proposed_low, proposed_high, and what
                the controller reads (`Controller.readings`).
        """
        fields: dict[str, Any] = {}
        if usable is not None:
            self.trace.update(usable.variance_trace, usable.n_measured, *trace_error(usable))
        if usable is not None and not decided["dropped"]:
            fields = {name: getattr(usable, name) for name in ("variance_trace", "grad_sq_norm", "true_grad_sq_norm")}
            fields |= {"n_measured": usable.n_measured, "variance_trace_step_error": trace_error(usable)[0]}
            fields["layers"] = LayerStatistics.of_step(usable)
        self.diagnostics.append(
            step=seen.step, batch_size=seen.samples or seen.batch_size, seconds=seen.seconds, measured=seen.measured, **decided, **fields
        )
