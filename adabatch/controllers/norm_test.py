"""The norm test: the batch gradient's error may be a fraction of the gradient itself."""

from __future__ import annotations

from adabatch._checks import choice, positive
from adabatch.controllers.base import Controller, Input, ends_of, measured, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments

SIGNALS = ("raw", "smoothed")


class NormTest(Controller):
    """m = T/(θ²·signal): the batch whose gradient has a variance T/m of θ² times its squared norm.

    signal='raw' takes T̂ and ‖g‖² of this step, as published: ‖g‖² holds the noise T/m itself, so
    that the proposal stays below about m/θ² and a batch can grow only step by step; it has no
    interval. signal='smoothed' divides the averages of T̂ and of the unbiased Ĝ², and proposes
    infinity where the latter is not above 0. The published rule never shrinks the batch:
    Monotone(NormTest(signal="raw")), rounded up.

    Args:
        theta: θ, the error allowed relative to the gradient, > 0.
        signal: 'smoothed' or 'raw'.
        smoothing: μ of the averages for 'smoothed', 0 <= μ < 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.

    Example:
        >>> import torch
        >>> norms = torch.tensor([4.0, 8.0])
        >>> moments = GradientMoments(batch_size=2, sq_norms=norms, grad_sq_norm=4.0)  # T 4, Ĝ² 2
        >>> NormTest(theta=0.5).propose(moments, loss=1.0, lr=0.1)
        8.0
        >>> NormTest(theta=0.5, signal="raw").propose(moments, loss=1.0, lr=0.1)
        4.0

    References:
        Byrd, Chin, Nocedal, Wu (2012), "Sample size selection in optimization methods for machine
        learning", Mathematical Programming 134.
    """

    init_args = ("theta", "signal", "smoothing")

    def __init__(self, theta: float = 0.9, signal: str = "smoothed", smoothing: float = 0.95):
        self.theta, self.signal = positive("theta", theta), choice("signal", signal, SIGNALS)
        self.smoothing = smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.state_attrs = ("trace", "square") if signal == "smoothed" else ()

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The proposal from one step's raw moments, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        moments = measured(moments)
        if self.signal == "raw":
            return self._rule(moments.variance_trace, moments.grad_sq_norm)
        trace = self.trace.update(moments.variance_trace, moments.n_measured)
        return self._rule(trace, self.square.update(moments.true_grad_sq_norm, moments.batch_size))

    def _inputs(self, level: float) -> list[Input]:
        averages = (self.trace, self.square) if self.signal == "smoothed" else ()
        return [ends_of(average, level) for average in averages]

    def _rule(self, *inputs: float) -> float:
        trace, square = inputs
        return ratio(trace, self.theta**2 * square)
