"""CABS: the batch size coupled to the learning rate."""

from __future__ import annotations

import math
from typing import Any

from adabatch.estimators.averages import MovingAverage, check_smoothing
from adabatch.estimators.moments import GradientMoments
from adabatch.state import check_version


class CABS:
    """Coupled adaptive batch size: m = scale · lr · T / (F − f_star + eps).

    T is the smoothed trace of the covariance of the per-sample gradients, F the smoothed loss. Averages are weighted by samples (a batch of 64 counts
    16 times one of 4) and bias-corrected. The result is the wish, neither rounded nor bounded: that is the scheduler's part.

    Plain SGD is treated as published; with momentum the scheduler hands in lr·(1 − dampening)/(1 − momentum), an extension of ours.

    By theory and simulation, not by the paper: with f_star = 0 the rule stalls at an excess loss of F*/(4·scale − 1) whatever the lr, where F* is the floor of
    the loss, and with f_star = F* exactly it runs to its upper bound near the floor. It picks where noise and progress balance; it does not save samples.

    Args:
        scale: factor c on the rule, > 0.
        f_star: floor of the loss, F*; 0 as published. Losses with an entropy floor, label smoothing or weight decay inside need their own.
        smoothing: μ of both averages, 0 <= μ < 1.
        eps: added to the denominator, >= 0.

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

    needs_effective_lr = True
    version = 1

    def __init__(self, scale: float = 1.0, f_star: float = 0.0, smoothing: float = 0.95, eps: float = 0.0):
        _check_factors(scale, eps)
        if not math.isfinite(f_star):
            raise ValueError(f"f_star must be a finite number, got {f_star!r}")
        self.scale, self.f_star, self.eps = scale, f_star, eps
        self.trace, self.loss = MovingAverage(smoothing), MovingAverage(smoothing)

    @classmethod
    def reference(cls, scale: float = 1.0, smoothing: float = 0.95, eps: float = 0.0) -> ReferenceCABS:
        """The authors' TensorFlow code, number for number: see `ReferenceCABS`."""
        return ReferenceCABS(scale, smoothing, eps)

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments and raw loss, and the base effective lr; give the wished batch size, in samples.

        A trace whose average is negative wishes 0; a smoothed loss at or below f_star wishes infinity: the noise is then all there is.

        Raises:
            ValueError: a batch of one has no variance.
        """
        trace = max(0.0, self.trace.update(moments.variance_trace, moments.n_measured))
        gap = self.loss.update(loss, moments.batch_size) - self.f_star + self.eps
        numerator = self.scale * lr * trace
        if gap <= 0:
            return math.inf if numerator else 0.0
        return numerator / gap

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain numbers."""
        return {"version": self.version, "trace": self.trace.state_dict(), "loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict().

        Raises:
            ValueError: unknown version.
        """
        check_version(state, self.version, type(self).__name__)
        self.trace.load_state_dict(state["trace"])
        self.loss.load_state_dict(state["loss"])

    def __repr__(self) -> str:
        return f"CABS(scale={self.scale}, f_star={self.f_star}, smoothing={self.trace.smoothing}, eps={self.eps})"


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
