"""NoiseScale: a batch of so many noise scales."""

from __future__ import annotations

from adabatch.controllers.base import Controller, check_positive, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import JointAverages, trace_and_signal
from adabatch.estimators.moments import GradientMoments


class NoiseScale(Controller):
    """m = scale·T/G², the simple noise scale: at scale = 1 the noise in the batch gradient is as large as its signal.

    T̂ and the unbiased Ĝ² are smoothed each by itself, weighted by samples, then divided and clamped; an average of ratios would be badly biased. Where the
    smoothed Ĝ² is not above 0 the proposal is infinite.

    Where theory is thin: T/G² ignores the curvature, momentum, and Adam's geometry; at batches far below it Ĝ² is a small difference of large numbers, and the
    interval is open above for many steps; for language models it is reported to lie orders of magnitude below the batch size at which larger
    batches cease to pay.

    Args:
        scale: c, > 0.
        smoothing: μ of both averages, 0 <= μ < 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)  # T = 4, Ĝ² = 2
        >>> NoiseScale(scale=0.5).propose(moments, loss=1.0, lr=0.1)
        1.0

    References:
        McCandlish, Kaplan, Amodei et al. (2018), "An empirical model of large-batch training", arXiv 1812.06162; for the warning Merrill et al. (2025),
        arXiv 2505.23971.
    """

    needs_effective_lr = False
    arguments = ("scale", "smoothing")
    saved = ("trace", "square", "joint")

    def __init__(self, scale: float = 1.0, smoothing: float = 0.95):
        check_positive(scale=scale)
        self.scale, self.smoothing = scale, smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.square)

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments; give the proposed batch size, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        trace, square = self.joint.update(*trace_and_signal(moments))
        return ratio(self.scale * trace, square)

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """scale times the noise scale's, which has no upper end where G² might be 0: see `Controller.proposal_interval`."""
        return self.joint.ratio_interval(level, scale=self.scale)
