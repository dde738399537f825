"""One row of the history.

Legend: m samples in the batch, g_i the gradient of sample i's loss, g the mean of the g_i over the batch,
T = tr Cov(g_i) the variance trace, G² = ‖E g_i‖² the squared norm of the true gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Record:
    """What is known about one optimizer step. Sizes are in samples; plain Python numbers throughout.

    Every statistic is of per-sample gradients of the per-sample loss, whatever the reduction of the loss that was differentiated:
    T̂ has the divisor m − 1, ‖g‖² is of the batch mean. Fields that end in `_ema` are moving averages weighted by samples
    (`adabatch.estimators.averages`), made for display: no controller reads them.

    On a step that measures nothing, or whose measurement was dropped, `variance_trace`, `grad_sq_norm`, `true_grad_sq_norm`, `noise_scale`
    and `snr` are NaN; the averages and their standard error keep the value they had, NaN before the first measurement.

    Attributes:
        step: number of the step, from 0 or 1 as the scheduler counts.
        samples_seen: samples the run has used, this batch included.
        batch_size: m, the size of this step's batch.
        proposed_batch_size: the controller's wish, neither rounded nor bounded; NaN when it made none.
        next_batch_size: the size asked for from the next batch on.
        lr: the base effective learning rate that the controller was told.
        loss: mean loss of the batch; loss_ema: its average.
        variance_trace: T̂, in units of squared gradient; variance_trace_ema: its average.
        variance_trace_std_error: standard error of variance_trace_ema.
        grad_sq_norm: ‖g‖²; grad_sq_norm_ema: its average.
        true_grad_sq_norm: Ĝ² = ‖g‖² − T̂/m, which may be negative on one batch; true_grad_sq_norm_ema: its average.
        noise_scale: T̂/Ĝ², in samples; inf where Ĝ² is not above zero.
        noise_scale_ema: the ratio of the two averages (never the average of the ratios).
        snr: m·Ĝ²/T̂, signal-to-noise ratio of the batch gradient, a negative Ĝ² counted as 0.
        snr_ema: the same from the two averages, for this step's m.
        seconds: wall-clock time of the step, NaN if not timed; samples_per_second: m / seconds.
        measured: whether this step's measurement was made and used.
        dropped: why a measurement was thrown away, "" if none was.

    Example:
        >>> record = Record.from_tuple((1, 64, 64, 71.5, 72, 0.1, 2.3, 2.3, 4.0, 4.0, 0.5, 0.3, 0.3, 0.2, 0.2, 20.0, 20.0, 3.2, 3.2, 0.01, 6400.0, True, ""))
        >>> record.next_batch_size, record.noise_scale
        (72, 20.0)
    """

    step: int
    samples_seen: int
    batch_size: int
    proposed_batch_size: float
    next_batch_size: int
    lr: float
    loss: float
    loss_ema: float
    variance_trace: float
    variance_trace_ema: float
    variance_trace_std_error: float
    grad_sq_norm: float
    grad_sq_norm_ema: float
    true_grad_sq_norm: float
    true_grad_sq_norm_ema: float
    noise_scale: float
    noise_scale_ema: float
    snr: float
    snr_ema: float
    seconds: float
    samples_per_second: float
    measured: bool
    dropped: str

    @classmethod
    def from_tuple(cls, row: tuple) -> Record:
        """A record from its values in the order of the fields."""
        return cls(*row)


FIELDS: dict[str, str] = {field.name: str(field.type) for field in fields(Record)}
"""Name of every field and its type, "int", "float", "bool" or "str", in order."""

INDEX: dict[str, int] = {name: position for position, name in enumerate(FIELDS)}
"""Position of every field in a row."""


def noise_scale(variance_trace: float, true_grad_sq_norm: float) -> float:
    """T/G² in samples: a T below zero counts as 0, and a G² not above zero leaves the ratio unbounded.

    Example:
        >>> noise_scale(6.0, 2.0), noise_scale(6.0, -0.1)
        (3.0, inf)
    """
    if math.isnan(variance_trace) or math.isnan(true_grad_sq_norm):
        return math.nan
    return max(variance_trace, 0.0) / true_grad_sq_norm if true_grad_sq_norm > 0 else math.inf


def snr(batch_size: int, variance_trace: float, true_grad_sq_norm: float) -> float:
    """m·G²/T: a G² below zero counts as 0; without noise it is inf, with neither noise nor signal NaN.

    Example:
        >>> snr(16, 4.0, 0.5), snr(16, 4.0, -0.5), snr(16, 0.0, 0.5)
        (2.0, 0.0, inf)
    """
    if math.isnan(variance_trace) or math.isnan(true_grad_sq_norm):
        return math.nan
    if variance_trace <= 0:
        return math.inf if true_grad_sq_norm > 0 else math.nan
    return batch_size * max(true_grad_sq_norm, 0.0) / variance_trace
