"""CABS: the batch size coupled to the learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from adabatch._checks import check_controller
from adabatch.controllers.base import Controller
from adabatch.estimators.averages import MovingAverage, check_smoothing, student_quantile
from adabatch.estimators.intervals import NO_INTERVAL, JointAverages, fieller, trace_error
from adabatch.estimators.loss_floor import LossFloor
from adabatch.estimators.moments import GradientMoments
from adabatch.preconditioners import preconditioned_trace, preconditioner_of

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class CABS(Controller):
    """Coupled adaptive batch size: m = scale · lr · T / (F − f_star + eps).

    T is the smoothed trace of the covariance of the per-sample gradients, F the smoothed loss. Averages are weighted by samples (a batch of 64 counts
    16 times one of 4) and bias-corrected. The result is the proposal, neither rounded nor bounded: that is the scheduler's part.

    Plain SGD is treated as published; with momentum the scheduler hands in lr·(1 − dampening)/(1 − momentum), an extension of ours. So are the following.
    Where theory is thin: momentum's effective lr holds once the buffer is filled (1/(1 − momentum) steps) and while the size changes little in that time; at
    batches below about 16 of heavy-tailed gradients T̂ jumps, and its interval holds it less often than it says.

    Adam, AdamW, RMSprop, Adagrad: T becomes tr(PΣ), P the diagonal preconditioner read from the optimizer's state. A step −lr·P∘g gains lr·⟨∇F, P∇F⟩ and
    pays lr²·tr(PΣ·PH)/(2m); with the published rule's assumptions taken in the coordinates P^(−½)w, lr·PH = 1 and F − F* = lr·⟨∇F, P∇F⟩/2, its derivation
    gives m = lr·tr(PΣ)/(F − F*). Decoupled or coupled, weight decay brings no noise and enters through P alone. Where theory is thin: v̂ holds noise itself, so
    that P ∝ √m where noise dominates, and lags by about 5/(1 − β₂) steps; Adam's first steps have a P of a few gradients, and the P of a step is foretold from
    the step before (`adabatch.preconditioners.register_lookahead`): tr(PΣ) was .8 to 1.3 of the true one in the first steps of a trial, later 1.0. Measured
    with Adam on digits and Fashion-MNIST over a range of 10 in lr, the size does not flutter (1 to 2 % a step); it sticks to min_batch_size where the lr is
    low.

    Clipping by norm, max_grad_norm: the step is the lr's times κ = min(1, max_grad_norm/‖g‖), and so is the effective lr; κ is smoothed as T is.

    f_star='auto' estimates the floor online (`LossFloor`): as published, with 0, until there is an estimate, and F − f_star is then at least its own
    standard error, without which the batch runs away to its cap near the floor.

    By theory and simulation, not by the paper: with f_star = 0 the rule stalls at an excess loss of F*·k/(4·scale − k), where F* is the floor of the loss and
    k the mean of 1/(1 − lr·h/2) over the curvatures h, 1 for small steps: whatever the lr then. (On a quadratic to 3 %, with averages long enough: at
    scale = ½, where the denominator is small, smoothing = .95 adds 5 to 10 %.) With f_star = F* exactly it runs to its upper bound near the floor. It picks
    where noise and progress balance; it does not save samples.

    Args:
        scale: factor c on the rule, > 0.
        f_star: floor of the loss, F*; 0 as published. Losses with an entropy floor, label smoothing or weight decay inside need their own; or 'auto'.
        smoothing: μ of both averages, 0 <= μ < 1.
        eps: added to the denominator, >= 0.
        max_grad_norm: what the loop clips the gradient's norm to (clip_grad_norm_), None if it does not; wrap(max_grad_norm=) hands its own on.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> CABS().propose(moments, loss=0.5, lr=4.0)  # 4 · 2 / 0.5
        16.0

    References:
        Balles, Romero, Hennig (2017), "Coupling Adaptive Batch Sizes with Learning Rates", arXiv 1612.05086.
    """

    arguments = ("scale", "f_star", "smoothing", "eps", "max_grad_norm")

    def __init__(
        self, scale: float = 1.0, f_star: float | str = 0.0, smoothing: float = 0.95, eps: float = 0.0, max_grad_norm: float | None = None
    ):
        _check_factors(scale, eps)
        if f_star != "auto" and not (isinstance(f_star, (int, float)) and math.isfinite(f_star)):
            raise ValueError(f"f_star must be a finite number or 'auto', got {f_star!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be a positive number or None, got {max_grad_norm!r}")
        self.scale, self.f_star, self.smoothing, self.eps, self.max_grad_norm = scale, f_star, smoothing, eps, max_grad_norm
        self.trace, self.loss = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.loss)
        self.clipping = None if max_grad_norm is None else MovingAverage(smoothing)
        self.floor = LossFloor() if f_star == "auto" else None
        self._optimizer: Optimizer | None = None
        self._parameters: dict[str, Any] = {}
        self._lr = math.nan

    @classmethod
    def reference(cls, scale: float = 1.0, smoothing: float = 0.95, eps: float = 0.0) -> ReferenceCABS:
        """The authors' TensorFlow code, number for number: see `ReferenceCABS`."""
        return ReferenceCABS(scale, smoothing, eps)

    @property
    def saved(self) -> tuple[str, ...]:
        """The averages in use."""
        return tuple(name for name in ("trace", "loss", "joint", "clipping", "floor") if getattr(self, name) is not None)

    def clips(self, max_grad_norm: float) -> None:
        """Take what optimizer.step() clips the gradient's norm to: see `Controller.clips`.

        Raises:
            ValueError: another norm was given before.
        """
        if self.max_grad_norm not in (None, max_grad_norm):
            raise ValueError(f"CABS(max_grad_norm={self.max_grad_norm!r}) but wrap(max_grad_norm={max_grad_norm!r}): give it to wrap alone")
        self.max_grad_norm = max_grad_norm
        self.clipping = MovingAverage(self.smoothing) if self.clipping is None else self.clipping

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments and raw loss, and the base effective lr (the plain one where there is a preconditioner); give the proposal in samples.

        A trace whose average is negative proposals 0; a smoothed loss at or below f_star proposals infinity: the noise is then all there is. Before the first
        step of an optimizer with a preconditioner the proposal is NaN.

        Raises:
            ValueError: a batch of one has no variance; what the preconditioned trace needs is missing.
        """
        if self._optimizer is None:
            raw = (moments.variance_trace, moments.n_measured, *trace_error(moments))
        else:
            raw = (preconditioned_trace(moments, self._parameters, self._optimizer, lr), moments.n_measured)
        if self.clipping is not None:
            norm = math.sqrt(moments.grad_sq_norm)
            lr *= self.clipping.update(min(1.0, self.max_grad_norm / (norm + CLIP_EPS)), moments.batch_size)
        self._lr = lr
        trace, average = self.joint.update(raw, (loss, moments.batch_size))
        if self.floor is not None:
            self.floor.update(loss, moments.batch_size, lr)
        if math.isnan(trace):
            return math.nan
        numerator, gap = self.scale * lr * max(0.0, trace), self._gap(average)
        if gap <= 0:
            return math.inf if numerator else 0.0
        return numerator / gap

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """Fieller's of scale·lr·T/(F − f_star + eps): see `Controller.proposal_interval`.

        The errors of T (tr(PΣ), for which they come from residuals), of F and their covariance, and with f_star='auto' that of the fit, as if independent of
        F's; with max_grad_norm that of κ, as if independent of T's. It has no upper end where the loss might be at its floor. Where theory is thin: the floor
        is fitted to the very losses that F averages, its error holds if the form of the fit does, and P and the lr count as known.
        """
        if math.isnan(self._lr) or not self.trace.count:
            return NO_INTERVAL
        quantile = student_quantile(level, min(self.trace.freedom, self.loss.freedom))
        floor, floor_error = self._floor()
        trace_variance, scale = self.trace.std_error() ** 2, self.scale * self._lr
        if self.clipping is not None and self.clipping.average > 0:
            trace_variance += (self.trace.average * self.clipping.std_error() / self.clipping.average) ** 2
        variances = scale**2 * trace_variance, self.loss.std_error() ** 2 + floor_error**2
        return fieller(scale * self.trace.average, self.loss.average - floor + self.eps, variances, scale * self.joint.covariance(), quantile)

    def readings(self) -> dict[str, float]:
        """See `Controller.readings`."""
        floor, error = self._floor() if self.floor is None else (self.floor.bounded, self.floor.std_error)
        read = {"f_star": floor, "f_star_std_error": error}
        if self._optimizer is not None:
            read |= {"preconditioned_trace_ema": self.trace.average, "preconditioned_trace_std_error": self.trace.std_error()}
        return read

    def _floor(self) -> tuple[float, float]:
        """F* as the rule takes it, and its standard error."""
        if self.floor is None:
            return float(self.f_star), 0.0
        return (0.0, 0.0) if math.isnan(self.floor.bounded) else (self.floor.bounded, self.floor.std_error)

    def _gap(self, average: float) -> float:
        floor, error = self._floor()
        if self.floor is None or math.isnan(self.floor.bounded):
            return average - floor + self.eps
        errors = [part for part in (self.loss.std_error(), error) if math.isfinite(part)]
        return max(average - floor, math.hypot(*errors)) + self.eps

    @property
    def needs_effective_lr(self) -> bool:
        """False where a preconditioner makes the step per unit of gradient."""
        return self._optimizer is None

    @property
    def needs(self) -> frozenset[str]:
        """tr(PΣ) where there is a preconditioner."""
        return frozenset() if self._optimizer is None else frozenset({"preconditioned_trace"})

    def bind(self, optimizer: Optimizer, effective_lr: Any = None, parameters: dict[str, Any] | None = None) -> None:
        """Take the optimizer's preconditioner, if it has one, unless the user gave an effective lr: see `Controller.bind`."""
        preconditioned = effective_lr is None and preconditioner_of(optimizer) is not None
        self._optimizer = optimizer if preconditioned else None
        self._parameters = dict(parameters or {}) if preconditioned else {}


class ReferenceCABS:
    """CABS as the authors' TensorFlow code computes it: m = scale · lr · ξ / (F + eps).

    ξ is the smoothed mean of ‖g_i‖² − ‖g‖² (divisor m, so biased), F the smoothed loss; the averages start at 0 and 1, weigh all steps alike and are not
    bias-corrected, so the first proposals are low: their errors are not known, and the proposal has no interval (CABS has). They are updated before use. The code
    then rounds half to even and clips to 16..2048: bounds that the scheduler applies.

    Args:
        scale, smoothing, eps: as in CABS.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> round(CABS.reference().propose(moments, loss=1.0, lr=4.0), 12)  # 4 · (0.05 · 1) / 1
        0.2

    References:
        Balles, Romero, Hennig (2017), arXiv 1612.05086, and their published code.
    """

    needs_effective_lr = True
    version = 1

    def __init__(self, scale: float = 1.0, smoothing: float = 0.95, eps: float = 0.0):
        _check_factors(scale, eps)
        check_smoothing(smoothing)
        self.scale, self.smoothing, self.eps = scale, smoothing, eps
        self.trace_average, self.loss_average = 0.0, 1.0

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments, raw loss and lr; give the unrounded, unbounded proposal in samples."""
        keep = self.smoothing
        self.loss_average = keep * self.loss_average + (1 - keep) * loss
        self.trace_average = keep * self.trace_average + (1 - keep) * moments.biased_variance_trace
        numerator, gap = self.scale * lr * self.trace_average, self.loss_average + self.eps
        if gap:
            return numerator / gap
        # What floats give in the authors' code, where Python would raise.
        return math.copysign(math.inf, numerator) if numerator else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain numbers."""
        return {"version": self.version, "controller": type(self).__name__, "trace_average": self.trace_average, "loss_average": self.loss_average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version, or the state of another controller.
        """
        check_controller(state, self.version, type(self).__name__)
        self.trace_average, self.loss_average = state["trace_average"], state["loss_average"]

    def __repr__(self) -> str:
        return f"CABS.reference(scale={self.scale}, smoothing={self.smoothing}, eps={self.eps})"


def _check_factors(scale: float, eps: float) -> None:
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
