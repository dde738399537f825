"""CABS: the batch size coupled to the learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from adabatch.controllers.base import Controller
from adabatch.estimators.averages import MovingAverage, check_smoothing
from adabatch.estimators.floor import LossFloor
from adabatch.estimators.moments import GradientMoments
from adabatch.preconditioners import preconditioned_trace, preconditioner_of
from adabatch.state import check_version

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class CABS(Controller):
    """Coupled adaptive batch size: m = scale · lr · T / (F − f_star + eps).

    T is the smoothed trace of the covariance of the per-sample gradients, F the smoothed loss. Averages are weighted by samples (a batch of 64 counts
    16 times one of 4) and bias-corrected. The result is the wish, neither rounded nor bounded: that is the scheduler's part.

    Plain SGD is treated as published; with momentum the scheduler hands in lr·(1 − dampening)/(1 − momentum), an extension of ours. So are the following.

    Adam, AdamW, RMSprop, Adagrad: T becomes tr(PΣ), P the diagonal preconditioner read from the optimizer's state. A step −lr·P∘g gains lr·⟨∇F, P∇F⟩ and
    pays lr²·tr(PΣ·PH)/(2m); with the published rule's assumptions taken in the coordinates P^(−½)w, lr·PH = 1 and F − F* = lr·⟨∇F, P∇F⟩/2, its derivation
    gives m = lr·tr(PΣ)/(F − F*). Decoupled or coupled, weight decay brings no noise and enters through P alone. Where theory is thin: v̂ holds noise itself, so
    that P ∝ √m where noise dominates, and lags by about 5/(1 − β₂) steps; Adam's first steps have a P of a few gradients. The wish often sits at a bound.

    Clipping by norm, max_grad_norm: the step is the lr's times κ = min(1, max_grad_norm/‖g‖), and so is the effective lr; κ is smoothed as T is.

    f_star='auto' estimates the floor online (`LossFloor`): as published, with 0, until there is an estimate, and F − f_star is then at least its own
    standard error, without which the batch runs away to its cap near the floor.

    By theory and simulation, not by the paper: with f_star = 0 the rule stalls at an excess loss of F*/(4·scale − 1) whatever the lr, where F* is the floor of
    the loss, and with f_star = F* exactly it runs to its upper bound near the floor. It picks where noise and progress balance; it does not save samples.

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
        self.clipping = None if max_grad_norm is None else MovingAverage(smoothing)
        self.floor = LossFloor() if f_star == "auto" else None
        self._optimizer: Optimizer | None = None
        self._parameters: dict[str, Any] = {}

    @classmethod
    def reference(cls, scale: float = 1.0, smoothing: float = 0.95, eps: float = 0.0) -> ReferenceCABS:
        """The authors' TensorFlow code, number for number: see `ReferenceCABS`."""
        return ReferenceCABS(scale, smoothing, eps)

    @property
    def saved(self) -> tuple[str, ...]:
        """The averages in use."""
        return tuple(name for name in ("trace", "loss", "clipping", "floor") if getattr(self, name) is not None)

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
        """Take one step's raw moments and raw loss, and the base effective lr (the plain one where there is a preconditioner); give the wish in samples.

        A trace whose average is negative wishes 0; a smoothed loss at or below f_star wishes infinity: the noise is then all there is. Before the first
        step of an optimizer with a preconditioner the wish is NaN.

        Raises:
            ValueError: a batch of one has no variance; what the preconditioned trace needs is missing.
        """
        raw = moments.variance_trace if self._optimizer is None else preconditioned_trace(moments, self._parameters, self._optimizer, lr)
        if self.clipping is not None:
            norm = math.sqrt(moments.grad_sq_norm)
            lr *= self.clipping.update(min(1.0, self.max_grad_norm / (norm + CLIP_EPS)), moments.batch_size)
        trace, gap = self.trace.update(raw, moments.n_measured), self._gap(loss, moments.batch_size, lr)
        if math.isnan(trace):
            return math.nan
        numerator = self.scale * lr * max(0.0, trace)
        if gap <= 0:
            return math.inf if numerator else 0.0
        return numerator / gap

    def _gap(self, loss: float, samples: int, lr: float) -> float:
        average = self.loss.update(loss, samples)
        if self.floor is None:
            return average - self.f_star + self.eps
        floor = self.floor.update(loss, samples, lr)
        if math.isnan(floor):
            return average + self.eps
        errors = [error for error in (self.loss.std_error(), self.floor.std_error) if math.isfinite(error)]
        return max(average - floor, math.hypot(*errors)) + self.eps

    @property
    def needs_effective_lr(self) -> bool:
        """False where a preconditioner makes the step per unit of gradient."""
        return self._optimizer is None

    @property
    def needs(self) -> frozenset[str]:
        """Σ g_i² elementwise, for a preconditioned trace."""
        return frozenset() if self._optimizer is None else frozenset({"second_moment"})

    def bind(self, optimizer: Optimizer, effective_lr: Any = None, parameters: dict[str, Any] | None = None) -> None:
        """Take the optimizer's preconditioner, if it has one, unless the user gave an effective lr: see `Controller.bind`."""
        preconditioned = effective_lr is None and preconditioner_of(optimizer) is not None
        self._optimizer = optimizer if preconditioned else None
        self._parameters = dict(parameters or {}) if preconditioned else {}


class ReferenceCABS:
    """CABS as the authors' TensorFlow code computes it: m = scale · lr · ξ / (F + eps).

    ξ is the smoothed mean of ‖g_i‖² − ‖g‖² (divisor m, so biased), F the smoothed loss; the averages start at 0 and 1, weigh all steps alike and are not
    bias-corrected, so the first wishes are low. They are updated before use. The code then rounds half to even and clips to 16..2048: bounds that the
    scheduler applies.

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
        """Take one step's raw moments, raw loss and lr; give the unrounded, unbounded wish in samples."""
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
        return {"version": self.version, "trace_average": self.trace_average, "loss_average": self.loss_average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, self.version, type(self).__name__)
        self.trace_average, self.loss_average = state["trace_average"], state["loss_average"]

    def __repr__(self) -> str:
        return f"CABS.reference(scale={self.scale}, smoothing={self.smoothing}, eps={self.eps})"


def _check_factors(scale: float, eps: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
