"""One step of the history, and the averages over the steps before it.

Legend: m samples in the batch, g_i the gradient of sample i's loss, g the mean of the g_i,
T = tr Cov(g_i) the variance trace, G² = ‖E g_i‖² the squared norm of the true gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import NamedTuple

from adabatch._table import html
from adabatch.estimators.averages import JointAverages, MovingAverage, Ratio
from adabatch.interfaces import State

LEVEL = 0.9
NO_METRICS: Mapping[str, float] = {}  # never written to


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """What is known about one optimizer step: plain numbers, sizes in samples.

    Statistics are of per-sample gradients of the per-sample loss, for any reduction of the
    loss: T̂ has the divisor m − 1, ‖g‖² is of the batch mean. `_ema`: moving averages weighted by
    samples, for display; no controller reads them. `_std_error`: standard errors of the averages,
    for T from the errors within the steps where inner products are measured, else from the spread
    of the steps. `_low`, `_high`: ends of 90 % intervals of ratios (`fieller`); `_high` is inf
    where the divisor might be 0.

    Of a step that measured nothing, or whose measurement was dropped, the moments are NaN and the
    averages keep their values, NaN before the first one. What a run does not have, such as
    proposals in a run without a controller, is NaN, or None for `next_batch_size`.

    Attributes:
        step: number of the step, as the scheduler counts.
        samples_seen: samples the run has used, this batch included.
        batch_size: m, samples of the step.
        proposed_batch_size: the controller's proposal, neither rounded nor bounded;
            proposed_low, proposed_high: its interval.
        next_batch_size: the size from the next batch on; None where nothing sets it.
        lr: the lr that the controller was passed, without the factors of a coupling; where the
            rule needs the step per unit of gradient, with momentum's 1/(1 − momentum).
        loss: mean loss of the batch; loss_ema, loss_std_error.
        f_star: the controller's floor of the loss; f_star_std_error: 0 for a given one.
        n_measured: s, the samples that variance_trace is from; 0 if nothing was measured.
        variance_trace: T̂; variance_trace_ema, variance_trace_std_error.
        variance_trace_step_error: standard error of this step's T̂; needs inner products.
        grad_sq_norm: ‖g‖²; grad_sq_norm_ema.
        true_grad_sq_norm: Ĝ² = ‖g‖² − T̂/m, which may be negative on one batch;
            true_grad_sq_norm_ema, true_grad_sq_norm_std_error.
        noise_scale: T̂/Ĝ², in samples; inf where Ĝ² is not above zero. noise_scale_ema: ratio of
            the two averages, not the average of ratios; noise_scale_low, noise_scale_high.
        snr: m·Ĝ²/T̂, a negative Ĝ² counted as 0; snr_ema: the same of the averages, at this m.
        preconditioned_trace_ema: the controller's average of tr(PΣ);
            preconditioned_trace_std_error.
        seconds: wall-clock time of the step; samples_per_second: m / seconds.
        measured: whether the step was measured and the measurement was used.
        dropped: why a measurement was dropped, else "".
        metrics: {name: number} of what a controller or a statistic of your own reports by
            metrics(); a column of the history, too.

    Example:
        >>> record = Averages().record(Row(
        ...     step=7, samples_seen=448, batch_size=64, proposed_batch_size=72.4,
        ...     next_batch_size=72, loss=2.5, n_measured=64, variance_trace=8.0, grad_sq_norm=0.75,
        ...     true_grad_sq_norm=0.625, seconds=0.5, measured=True))
        >>> record.noise_scale, record.snr, record.samples_per_second
        (12.8, 5.0, 128.0)
        >>> record
        Record(step 7, 448 samples, batch 64 → 72, loss 2.5, variance trace 8, noise scale 12.8)
    """

    step: int
    samples_seen: int
    batch_size: int
    proposed_batch_size: float
    proposed_low: float
    proposed_high: float
    next_batch_size: int | None
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
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        named = (("loss", "loss_ema"), ("variance trace", "variance_trace_ema"))
        moments = [f"{label} {shown(self, name)}" for label, name in named
                   if not math.isnan(getattr(self, name))]
        step = f"step {self.step}, {self.samples_seen:,} samples"
        return f"Record({', '.join([step, _size(self), *moments, *_scale(self)])})"

    def _repr_html_(self) -> str:
        errors = {*ERRORS.values(), *(end for ends in INTERVALS.values() for end in ends)}
        rows = [(name, shown(self, name)) for name in FIELDS if name not in errors]
        rows += [(name, number(value)) for name, value in self.metrics.items()]
        return html([("field", "value"), *(row for row in rows if row[1] not in ("-", ""))])


FIELDS: dict[str, str] = {
    each.name: str(each.type) for each in fields(Record) if each.name != "metrics"}
"""{name of a field: its type, "int", "int | None", "float", "bool" or "str"}, in order."""

ERRORS = {
    "loss_ema": "loss_std_error", "f_star": "f_star_std_error",
    "variance_trace": "variance_trace_step_error",
    "variance_trace_ema": "variance_trace_std_error",
    "true_grad_sq_norm_ema": "true_grad_sq_norm_std_error",
    "preconditioned_trace_ema": "preconditioned_trace_std_error",
}
"""{field: the field that holds its standard error}."""

INTERVALS = {
    "noise_scale_ema": ("noise_scale_low", "noise_scale_high"),
    "proposed_batch_size": ("proposed_low", "proposed_high"),
}
"""{field: the fields that hold the ends of its interval}."""



class Row(NamedTuple):
    """The fields of a `Record` that are stored: all others are worked out from them."""

    step: int
    samples_seen: int
    batch_size: int
    proposed_batch_size: float = math.nan
    proposed_low: float | Ratio = math.nan  # a Ratio until both ends are worked out
    proposed_high: float = math.nan
    next_batch_size: int | None = None
    lr: float = math.nan
    loss: float = math.nan
    f_star: float = math.nan
    f_star_std_error: float = math.nan
    n_measured: int = 0
    variance_trace: float = math.nan
    variance_trace_step_error: float = math.nan
    grad_sq_norm: float = math.nan
    true_grad_sq_norm: float = math.nan
    preconditioned_trace_ema: float = math.nan
    preconditioned_trace_std_error: float = math.nan
    seconds: float = math.nan
    measured: bool = False
    dropped: str = ""
    metrics: Mapping[str, float] = NO_METRICS

    def worked_out(self) -> Row:
        """The same with the ends of the proposal's interval."""
        ratio = self.proposed_low
        if not isinstance(ratio, Ratio):
            return self
        low, high = ratio.interval(LEVEL)
        return self._replace(proposed_low=low, proposed_high=high)


GIVEN = Row._fields[:-1]
"""Fields that are stored, in order, all but `metrics`."""

_given_values = attrgetter(*GIVEN)
_inputs = attrgetter("batch_size", "n_measured", "loss", "variance_trace",
                     "variance_trace_step_error", "grad_sq_norm", "true_grad_sq_norm")


class Averages:
    """Moving averages of the loss and the moments, weighted by samples; of T̂ by measured ones.

    Args:
        smoothing: μ, 0 <= μ < 1.

    Raises:
        ValueError: smoothing outside [0, 1).
    """

    def __init__(self, smoothing: float = 0.95):
        names = ("loss", "variance_trace", "grad_sq_norm", "true_grad_sq_norm")
        self._means = {name: MovingAverage(smoothing) for name in names}
        self._joint = JointAverages(self._means["variance_trace"], self._means["true_grad_sq_norm"])

    @property
    def smoothing(self) -> float:
        """μ."""
        return self._means["loss"].smoothing

    @property
    def is_empty(self) -> bool:
        """Whether no value was taken yet."""
        return not any(mean.count for mean in self._means.values())

    def update(self, size: int, measured: int, loss: float, trace: float, error: float,
               square: float, signal: float) -> None:
        """Take a step's m, s, F, T̂ and its standard error, ‖g‖², Ĝ²; NaN for what is not known."""
        measured = measured or size
        self._joint.update((trace, measured, error, measured - 1), (signal, size))
        self._means["loss"].update(loss, size)
        self._means["grad_sq_norm"].update(square, size)

    def take(self, record: Record) -> None:
        """Update with a record that was worked out elsewhere."""
        self.update(*_inputs(record))

    def record(self, given: Row) -> Record:
        """Update with the fields GIVEN of a step, and work out the others."""
        row = given.worked_out()._asdict()
        size, trace, signal = row["batch_size"], row["variance_trace"], row["true_grad_sq_norm"]
        self.update(size, row["n_measured"], row["loss"], trace, row["variance_trace_step_error"],
                    row["grad_sq_norm"], signal)
        for name, mean in self._means.items():
            row[f"{name}_ema"] = mean.average
            if name != "grad_sq_norm":
                row[f"{name}_std_error"] = mean.std_error()
        smoothed = row["variance_trace_ema"], row["true_grad_sq_norm_ema"]
        known = self._means["variance_trace"].count > 0
        low, high = self._joint.ratio_interval(LEVEL) if known else (math.nan, math.nan)
        row |= {"noise_scale": noise_scale(trace, signal), "snr": snr(size, trace, signal)}
        row |= {"noise_scale_ema": noise_scale(*smoothed), "snr_ema": snr(size, *smoothed)}
        row |= {"noise_scale_low": low, "noise_scale_high": high}
        row["samples_per_second"] = size / row["seconds"] if row["seconds"] > 0 else math.nan
        return Record(**row)

    def state_dict(self) -> State:
        """Plain numbers."""
        means = {name: mean.state_dict() for name, mean in self._means.items()}
        return {"means": means, "joint": self._joint.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: averages that do not fit.
        """
        missing = self._means.keys() - state["means"].keys()
        if missing:
            raise ValueError(f"the diagnostics' state lacks the averages {sorted(missing)}: "
                             "pass what Diagnostics.state_dict() returned")
        fresh = Averages()
        for name, mean in fresh._means.items():
            mean.load_state_dict(state["means"][name])
        fresh._joint.load_state_dict(state["joint"])
        self._means, self._joint = fresh._means, fresh._joint


def row_of(record: Record) -> Row:
    """The fields of a record that are stored."""
    return Row._make([*_given_values(record), record.metrics])


def noise_scale(variance_trace: float, true_grad_sq_norm: float) -> float:
    """T/G² in samples: a T below zero counts as 0; inf where G² is not above zero.

    Example:
        >>> noise_scale(6.0, 2.0), noise_scale(6.0, -0.1)
        (3.0, inf)
    """
    if math.isnan(variance_trace) or math.isnan(true_grad_sq_norm):
        return math.nan
    return max(variance_trace, 0.0) / true_grad_sq_norm if true_grad_sq_norm > 0 else math.inf


def snr(batch_size: float, variance_trace: float, true_grad_sq_norm: float) -> float:
    """m·G²/T: a G² below zero counts as 0; inf without noise, NaN without noise and signal.

    Example:
        >>> snr(16, 4.0, 0.5), snr(16, 4.0, -0.5), snr(16, 0.0, 0.5)
        (2.0, 0.0, inf)
    """
    if math.isnan(variance_trace) or math.isnan(true_grad_sq_norm):
        return math.nan
    if variance_trace <= 0:
        return math.inf if true_grad_sq_norm > 0 else math.nan
    return batch_size * max(true_grad_sq_norm, 0.0) / variance_trace


def number(value: float) -> str:
    """A number for a person, "-" for NaN.

    Example:
        >>> number(12345.6), number(0.0123456), number(math.nan)
        ('12,346', '0.01235', '-')
    """
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def field_value(record: Record, name: str) -> float | str | None:
    """A field by its name."""
    value: float | str | None = getattr(record, name)
    return value


def _uncertainty(record: Record, name: str) -> tuple[float, ...]:
    """(standard error,) or the two ends of the interval of a field; () where it has none."""
    names = INTERVALS.get(name) or ((ERRORS[name],) if name in ERRORS else ())
    return tuple(getattr(record, error) for error in names)


def has_error(record: Record, name: str) -> bool:
    """Whether the field's standard error or interval is known and says something."""
    found = _uncertainty(record, name)
    if name not in INTERVALS:
        return bool(found) and 0 < found[0] < math.inf
    value = field_value(record, name)
    known = isinstance(value, float) and not math.isnan(value)
    return known and 0 <= found[0] < math.inf and (found[0] > 0 or found[1] < math.inf)


def shown(record: Record, name: str) -> str:
    """A field for a person, with its error where it has one: "2.5 ± 0.1", "218 (106 to 866)"."""
    value = field_value(record, name)
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else "-" if value is None else str(value)
    if not has_error(record, name):
        return number(value)
    low, *ends = _uncertainty(record, name)
    if not ends:
        return f"{number(value)} ± {low:.3g}"
    high = ends[0]
    interval = f"above {low:.3g}" if math.isinf(high) else f"{low:.3g} to {high:.3g}"
    return f"{number(value)} ({interval})"


def brief(record: Record) -> str:
    """Sizes and noise scale: "batch 24 → 26, noise scale 218 (106 to 866)"."""
    return ", ".join([_size(record), *_scale(record)])


def _size(record: Record) -> str:
    following = "" if record.next_batch_size is None else f" → {record.next_batch_size:,}"
    return f"batch {record.batch_size:,}{following}"


def _scale(record: Record) -> list[str]:
    known = not math.isnan(record.noise_scale_ema)
    return [f"noise scale {shown(record, 'noise_scale_ema')}"] if known else []
