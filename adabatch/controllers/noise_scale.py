"""NoiseScale: a batch of a multiple of the noise scale."""

from __future__ import annotations

from adabatch._checks import positive
from adabatch.controllers.base import Controller, measured, ratio
from adabatch.estimators.averages import JointAverages, MovingAverage, Ratio
from adabatch.estimators.moments import GradientMoments, trace_and_signal


class NoiseScale(Controller):
    """m = scale·T/G², the simple noise scale: at scale = 1 the noise in the batch gradient is as
    large as its signal.

    T̂ and the unbiased Ĝ² are smoothed separately, weighted by samples, then divided and clamped:
    an average of ratios would be badly biased. Where the smoothed Ĝ² is not above 0 the proposal is
    infinite. Limits: adabatch/controllers/README.md.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)  # T 4, Ĝ² 2
        >>> NoiseScale(scale=0.5).propose(moments, loss=1.0, lr=0.1)
        1.0

    Reference: McCandlish, Kaplan, Amodei et al. (2018), arXiv 1812.06162.
    """

    init_args = ("scale", "smoothing")
    state_attrs = ("trace", "square", "joint")

    def __init__(self, scale: float = 1.0, smoothing: float = 0.95):
        self.scale, self.smoothing = positive("scale", scale), smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.trace, self.square)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        trace, square = self.joint.update(*trace_and_signal(measured(moments)))
        return ratio(self.scale * trace, square)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Fieller's, without an upper end where G² might be 0."""
        return self.joint.ratio_interval(level, scale=self.scale)

    def latest_interval(self) -> Ratio:
        return self.joint.ratio(self.scale)
