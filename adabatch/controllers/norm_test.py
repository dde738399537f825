"""The norm test: the batch gradient's error may be a share of the gradient itself."""

from __future__ import annotations

from adabatch.controllers.base import Controller, check_choice, check_positive, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import NO_INTERVAL, JointAverages, trace_and_signal, trace_error
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.one_step import ratio_interval

SIGNALS = ("raw", "smoothed")


class NormTest(Controller):
    """m = T/(θ²·signal): the batch at which the variance T/m of its gradient is θ² of the gradient's squared norm.

    signal='raw' takes T̂ and ‖g‖² of this one step, as published. ‖g‖² holds the noise T/m itself, so that the proposal stays below about m/θ²: a batch can
    grow only step by step. signal='smoothed' divides the averages of T̂ and of the unbiased Ĝ²; where the latter is not above 0 the proposal is infinite.

    Where theory is thin: the test asks for descent at a step of plain gradient descent; momentum, which averages noise over steps, and Adam, which steps in
    another geometry, do not enter. At small batches the raw ‖g‖² is mostly noise, and the smoothed Ĝ² needs many steps to stand clear of 0.

    The published rule never shrinks the batch: Monotone(NormTest(signal="raw")), whose size is then the larger of the present one and the proposal, rounded up.

    Args:
        theta: θ, the error allowed relative to the gradient, > 0.
        signal: 'smoothed' or 'raw'.
        smoothing: μ of the averages for 'smoothed', 0 <= μ < 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)  # T = 4, Ĝ² = 2
        >>> NormTest(theta=0.5).propose(moments, loss=1.0, lr=0.1), NormTest(theta=0.5, signal="raw").propose(moments, loss=1.0, lr=0.1)
        (8.0, 4.0)

    References:
        Byrd, Chin, Nocedal, Wu (2012), "Sample size selection in optimization methods for machine learning", Mathematical Programming 134.
    """

    needs_effective_lr = False
    arguments = ("theta", "signal", "smoothing")
    saved = ("trace", "square", "joint")

    def __init__(self, theta: float = 0.9, signal: str = "smoothed", smoothing: float = 0.95):
        check_positive(theta=theta)
        check_choice("signal", signal, SIGNALS)
        self.theta, self.signal, self.smoothing = theta, signal, smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.square)
        self._latest: GradientMoments | None = None
        if signal == "raw":
            self.saved = ()

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments; give the proposed batch size, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        if self.signal == "raw":
            self._latest = moments
            return ratio(moments.variance_trace, self.theta**2 * moments.grad_sq_norm)
        trace, square = self.joint.update(*trace_and_signal(moments))
        return ratio(trace, self.theta**2 * square)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """That of T/(θ²G²): see `Controller.proposal_interval`. For the raw signal that of this one step's T/(θ²·E‖g‖²), whose errors need inner products
        (wrap(inner_products=True)); none without: see `adabatch.estimators.one_step.ratio_interval`."""
        if self.signal == "smoothed":
            return self.joint.ratio_interval(level, scale=1 / self.theta**2)
        if self._latest is None:
            return NO_INTERVAL
        return ratio_interval(self._latest.variance_trace, trace_error(self._latest)[0], self._latest, level, 1 / self.theta**2)
