"""CABS: the batch size coupled to the learning rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from adabatch._checks import function, positive, real, smoothing as checked_smoothing
from adabatch.controllers.base import Controller, measured
from adabatch.estimators.averages import JointAverages, MovingAverage, Ratio
from adabatch.estimators.moments import trace_error
from adabatch.estimators.loss_floor import LossFloor
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import NO_INTERVAL, EffectiveLr, RunContext
from adabatch.preconditioners import preconditioned_trace, preconditioner_of

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class ReferenceCABS(Controller):
    """CABS as the authors' TensorFlow code computes it: m = scale · lr · ξ / (F + eps).

    ξ is the smoothed mean of ‖g_i‖² − ‖g‖² (divisor m, so biased), F the smoothed loss. The
    averages start at 0 and 1, weight all steps alike and are not bias-corrected, so that the first
    proposals are low and no interval is known; they are updated before use. The published code then
    rounds half to even and clips to 16..2048: bounds that the scheduler applies.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> round(CABS.reference().propose(moments, loss=1.0, lr=4.0), 12)  # 4 · (0.05 · 1) / 1
        0.2

    Reference: Balles, Romero, Hennig (2017), arXiv 1612.05086, and their published code.
    """

    init_args = ("scale", "smoothing", "eps", "effective_lr")
    state_attrs = ("trace_average", "loss_average")
    needs_effective_lr = True
    effective_lr: EffectiveLr | None = None

    def __init__(self, scale: float = 1.0, smoothing: float = 0.95, eps: float = 0.0,
                 effective_lr: EffectiveLr | None = None):
        self.scale, self.smoothing = positive("scale", scale), checked_smoothing(smoothing)
        self.eps = real("eps", eps, at_least=0)
        if effective_lr is not None:
            self.effective_lr = function("effective_lr", effective_lr)
        self.trace_average, self.loss_average = 0.0, 1.0

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        keep = self.smoothing
        self.loss_average = keep * self.loss_average + (1 - keep) * loss
        raw = measured(moments).biased_variance_trace
        self.trace_average = keep * self.trace_average + (1 - keep) * raw
        numerator, gap = self.scale * lr * self.trace_average, self.loss_average + self.eps
        if gap:
            return numerator / gap
        # What floats give in the authors' code, where Python would raise.
        return math.copysign(math.inf, numerator) if numerator else math.nan

    def __repr__(self) -> str:
        return super().__repr__().replace("ReferenceCABS", "CABS.reference")


class CABS(Controller):
    """Coupled adaptive batch size: m = scale · lr · T / (F − f_star + eps).

    T is the smoothed trace of the covariance of the per-sample gradients, F the smoothed loss, both
    weighted by samples and bias-corrected. lr is the effective one: for SGD with momentum
    lr·(1 − dampening)/(1 − momentum). For Adam, AdamW, RMSprop and Adagrad T becomes tr(PΣ), P the
    diagonal preconditioner read from the optimizer's state, and lr is the plain one. Where the
    gradient is clipped, lr is multiplied by the smoothed κ = min(1, max_grad_norm/‖g‖).
    Derivations and limits: adabatch/controllers/README.md.

    Args:
        f_star: floor of the loss, F*; 0 as published. Losses with an entropy floor, label smoothing
            or weight decay inside need their own. 'auto' estimates it (`LossFloor`): 0 until there
            is an estimate, and F − f_star is then at least its standard error.
        max_grad_norm: what the loop clips the gradient's norm to; None if it does not, or if wrap
            does the clipping.
        effective_lr: a callable of a param group that gives its step per unit of gradient, for
            optimizers other than those above; it takes the preconditioner's place.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> CABS().propose(moments, loss=0.5, lr=4.0)  # 4 · 2 / 0.5
        16.0

    Reference: Balles, Romero, Hennig (2017), arXiv 1612.05086.
    """

    init_args = ("scale", "f_star", "smoothing", "eps", "max_grad_norm", "effective_lr")
    effective_lr: EffectiveLr | None = None
    reference = ReferenceCABS

    def __init__(self, scale: float = 1.0, f_star: float | str = 0.0, smoothing: float = 0.95,
                 eps: float = 0.0, max_grad_norm: float | None = None,
                 effective_lr: EffectiveLr | None = None):
        self.scale, self.smoothing = positive("scale", scale), checked_smoothing(smoothing)
        self.f_star = f_star if f_star == "auto" else real("f_star", f_star, or_else="'auto'")
        self.eps = real("eps", eps, at_least=0)
        self.max_grad_norm: float | None = None
        if effective_lr is not None:
            self.effective_lr = function("effective_lr", effective_lr)
        self.trace, self.loss = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint, self.clipping = JointAverages(self.trace, self.loss), MovingAverage(smoothing)
        self.floor = LossFloor() if f_star == "auto" else None
        self.state_attrs = ("trace", "loss", "joint", *(["floor"] if f_star == "auto" else []))
        if max_grad_norm is not None:
            self._clip_to(positive("max_grad_norm", max_grad_norm))
        self._optimizer: Optimizer | None = None
        self._parameters: Mapping[str, Tensor] = {}
        self._lr = math.nan
        self._warned = False

    @property
    def needs_effective_lr(self) -> bool:
        return self._optimizer is None

    @property
    def requires(self) -> frozenset[str]:
        return frozenset() if self._optimizer is None else frozenset({"preconditioned_trace"})

    def bind(self, context: RunContext) -> None:
        """Take the optimizer's preconditioner, if it has one, and the norm of the clipping;
        ValueError where the constructor was given another norm."""
        if context.max_grad_norm not in (None, self.max_grad_norm):
            if self.max_grad_norm is not None:
                raise ValueError(f"CABS(max_grad_norm={self.max_grad_norm!r}), but optimizer.step()"
                                 f" clips to {context.max_grad_norm!r}: leave max_grad_norm of "
                                 "CABS at None")
            self._clip_to(context.max_grad_norm)
        preconditioner = preconditioner_of(context.optimizer)
        preconditioned = self.effective_lr is None and preconditioner is not None
        self._optimizer = context.optimizer if preconditioned else None
        self._parameters = dict(context.parameters) if preconditioned else {}

    def _clip_to(self, max_grad_norm: float | None) -> None:
        self.max_grad_norm = max_grad_norm
        self.state_attrs = (*self.state_attrs, "clipping")

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The proposal: 0 for a smoothed trace that is negative; infinity for a smoothed loss at or
        below f_star; NaN before the first step of an optimizer with a preconditioner."""
        moments = measured(moments)
        raw: tuple[float, ...]
        if self._optimizer is None:
            raw = (moments.variance_trace, moments.n_measured, *trace_error(moments))
        else:
            trace = preconditioned_trace(moments, self._parameters, self._optimizer, lr)
            raw = (trace, moments.n_measured)
        if self.max_grad_norm is not None:
            kept = self.max_grad_norm / (math.sqrt(moments.grad_sq_norm) + CLIP_EPS)
            lr *= self.clipping.update(min(1.0, kept), moments.batch_size)
        self._lr = lr
        trace, average = self.joint.update(raw, (loss, moments.batch_size))
        if self.floor is not None:
            self.floor.update(loss, moments.batch_size, lr)
        if math.isnan(trace):
            return math.nan
        numerator, gap = self.scale * lr * max(0.0, trace), self._gap(average)
        if loss < 0 or gap < 0:
            self._check_loss(loss, gap)
        if gap <= 0:
            return math.inf if numerator else 0.0
        return numerator / gap

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Fieller's of scale·lr·T/(F − f_star + eps); without an upper end where the loss might be
        at its floor. The errors of f_star='auto' and of κ count as independent."""
        return self._ratio().interval(level) if self._has_proposed else NO_INTERVAL

    def latest_interval(self) -> Ratio | tuple[float, float]:
        return self._ratio() if self._has_proposed else NO_INTERVAL

    @property
    def _has_proposed(self) -> bool:
        return not math.isnan(self._lr) and self.trace.count > 0

    def _ratio(self) -> Ratio:
        floor, floor_error = self._floor()
        trace_error, loss_error, covariance = self.joint.errors()
        trace_variance, scale = trace_error**2, self.scale * self._lr
        if self.clipping.count and self.clipping.average > 0:
            relative = self.clipping.std_error() / self.clipping.average
            trace_variance += (self.trace.average * relative) ** 2
        variances = scale**2 * trace_variance, loss_error**2 + floor_error**2
        numerator, gap = scale * self.trace.average, self.loss.average - floor + self.eps
        return Ratio(numerator, gap, variances, scale * covariance,
                     min(self.trace.freedom, self.loss.freedom))

    def metrics(self) -> dict[str, float]:
        """f_star and f_star_std_error; with a preconditioner preconditioned_trace_ema and
        preconditioned_trace_std_error."""
        floor, error = self._floor()
        if self.floor is not None:
            floor, error = self.floor.bounded, self.floor.std_error
        found = {"f_star": floor, "f_star_std_error": error}
        if self._optimizer is not None:
            found["preconditioned_trace_ema"] = self.trace.average
            found["preconditioned_trace_std_error"] = self.trace.std_error()
        return found

    def _check_loss(self, loss: float, gap: float) -> None:
        """Warn once of a loss that cannot be above its floor."""
        floor, _ = self._floor()
        if self._warned or not (gap < 0 or (floor == 0 and loss < -self.eps)):
            return
        self._warned = True
        warnings.warn(
            f"CABS divides by the loss above its floor, which must be positive: got a loss of "
            f"{loss:.4g} and f_star={floor:.4g}, so that the proposed batch size means nothing. "
            "Pass the floor, CABS(f_star=...), below all losses of the run; or f_star='auto'; or "
            "use a controller that does not read the loss, such as NormTest()", stacklevel=6)

    def _floor(self) -> tuple[float, float]:
        if self.floor is None:
            return float(self.f_star), 0.0
        known = not math.isnan(self.floor.bounded)
        return (self.floor.bounded, self.floor.std_error) if known else (0.0, 0.0)

    def _gap(self, average: float) -> float:
        floor, error = self._floor()
        if self.floor is None or math.isnan(self.floor.bounded):
            return average - floor + self.eps
        errors = [part for part in (self.loss.std_error(), error) if math.isfinite(part)]
        return max(average - floor, math.hypot(*errors)) + self.eps
