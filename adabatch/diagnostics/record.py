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
    and `snr` are NaN; the averages and their standard errors keep the value they had, NaN before the first measurement.

    Fields that end in `_std_error` are standard errors of the averages: for T from the errors of the steps where inner_products are measured, else from the spread of
    the steps around the average, which counts a drift as noise (`MovingAverage`). `_low` and `_high` are the ends of 90 % intervals of ratios (`fieller`):
    they lie unevenly around the ratio, and `_high` is inf where the divisor might be 0.

    Attributes:
        step: number of the step, from 0 or 1 as the scheduler counts.
        samples_seen: samples the run has used, this batch included.
        batch_size: m, the size of this step's batch.
        proposed_batch_size: the controller's proposal, neither rounded nor bounded; NaN when it made none.
        proposed_low, proposed_high: the proposal's interval, at the scheduler's `confidence` if it has one; NaN where the rule has none.
        next_batch_size: the size asked for from the next batch on.
        lr: the base effective learning rate that the controller was told.
        loss: mean loss of the batch; loss_ema: its average; loss_std_error.
        f_star: floor of the loss that the controller takes, NaN if it has none; f_star_std_error: 0 for one that was given.
        n_measured: s, the samples that variance_trace is from; 0 if there are none, or not known.
        variance_trace: T̂, in units of squared gradient; variance_trace_ema: its average; variance_trace_std_error.
        variance_trace_step_error: standard error of this step's T̂, NaN without inner_products.
        grad_sq_norm: ‖g‖²; grad_sq_norm_ema: its average.
        true_grad_sq_norm: Ĝ² = ‖g‖² − T̂/m, which may be negative on one batch; true_grad_sq_norm_ema: its average; true_grad_sq_norm_std_error.
        noise_scale: T̂/Ĝ², in samples; inf where Ĝ² is not above zero.
        noise_scale_ema: the ratio of the two averages (never the average of the ratios); noise_scale_low, noise_scale_high.
        snr: m·Ĝ²/T̂, signal-to-noise ratio of the batch gradient, a negative Ĝ² counted as 0.
        snr_ema: the same from the two averages, for this step's m.
        preconditioned_trace_ema: the average of tr(PΣ) that the controller keeps, NaN if it has none; preconditioned_trace_std_error.
        seconds: wall-clock time of the step, NaN if not timed; samples_per_second: m / seconds.
        measured: whether this step's measurement was made and used.
        dropped: why a measurement was thrown away, "" if none was.

    Example:
        >>> values = dict.fromkeys(FIELDS, 0.0) | {"step": 1, "batch_size": 64, "next_batch_size": 72, "variance_trace": 4.0, "measured": True, "dropped": ""}
        >>> record = Record(**values)
        >>> record.next_batch_size, record.variance_trace
        (72, 4.0)
    """

    step: int
    samples_seen: int
    batch_size: int
    proposed_batch_size: float
    proposed_low: float
    proposed_high: float
    next_batch_size: int
    lr: float
    loss: float
    loss_ema: float
    loss_std_error: float
    f_star: float
    f_star_std_error: float
    n_measured: int
    variance_trace: float
    variance_trace_step_error: float
    variance_trace_ema: float
    variance_trace_std_error: float
    grad_sq_norm: float
    grad_sq_norm_ema: float
    true_grad_sq_norm: float
    true_grad_sq_norm_ema: float
    true_grad_sq_norm_std_error: float
    noise_scale: float
    noise_scale_ema: float
    noise_scale_low: float
    noise_scale_high: float
    snr: float
    snr_ema: float
    preconditioned_trace_ema: float
    preconditioned_trace_std_error: float
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

ADDED: dict[str, float] = {
    **dict.fromkeys(("proposed_low", "proposed_high", "loss_std_error", "f_star", "f_star_std_error", "variance_trace_step_error"), math.nan),
    **dict.fromkeys(("true_grad_sq_norm_std_error", "noise_scale_low", "noise_scale_high"), math.nan),
    **dict.fromkeys(("preconditioned_trace_ema", "preconditioned_trace_std_error"), math.nan),
    "n_measured": 0,
}
"""Fields that files of the first releases lack, and what stands for them."""

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
