"""AdaScale: a fixed large batch, whose lr follows the gain it has over a small one."""

from __future__ import annotations

import functools
from collections.abc import Callable

from adabatch._checks import positive
from adabatch.controllers.base import Controller, measured, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments


def gain(batch_size: float, base_batch_size: float, noise_scale: float) -> float:
    """AdaScale's r = (T/B₀ + G²)/(T/B + G²) = S(φ + B₀)/(φ + B): how many steps at the base batch
    size one step at B is worth, between 1 (no noise) and S (all noise).

    Example:
        >>> [gain(256, 64, noise_scale) for noise_scale in (0.0, 128.0, float("inf"))]
        [1.0, 2.0, 4.0]

    References:
        Johnson, Agrawal, Gu, Guestrin (2020), "AdaScale SGD", arXiv 2007.05105.
    """
    ratio = batch_size / base_batch_size
    if noise_scale > 1:  # divided through, for a noise scale that is infinite or near it
        return ratio * (1 + base_batch_size / noise_scale) / (1 + batch_size / noise_scale)
    return ratio * (noise_scale + base_batch_size) / (noise_scale + batch_size)


class AdaScale(Controller):
    """Keeps the batch at `batch_size` and steps with lr · r, r = (T/B₀ + G²)/(T/B + G²), between 1
    and B/B₀; r = 1 before the first measurement.

    One step is worth r steps of the base batch B₀: an lr schedule made for the base is read at
    `base_steps` = Σ r, not at the number of steps, LambdaLR(optimizer, lambda _:
    schedule(controller.base_steps)). Leave `coupling` at 'none'; coupling='adascale' is the same
    gain under a batch that another controller moves. Choose the base lr with room for a gain of
    B/B₀, and warm up: see adabatch/controllers/README.md.

    Example:
        >>> import torch
        >>> rule = AdaScale(batch_size=64, base_batch_size=16)
        >>> moments = GradientMoments(2, torch.tensor([17.0, 17.0]), grad_sq_norm=9.0)  # T 16, G² 1
        >>> rule.propose(moments, loss=1.0, lr=0.1), rule.lr_factor()(64)
        (64.0, 1.6)

    Reference: Johnson, Agrawal, Gu, Guestrin (2020), "AdaScale SGD", arXiv 2007.05105.
    """

    init_args = ("batch_size", "base_batch_size", "smoothing")
    state_attrs = ("trace", "square", "base_steps")

    def __init__(self, batch_size: int, base_batch_size: int, smoothing: float = 0.95):
        self._first_batch_size = self.batch_size = positive("batch_size", batch_size)
        self.base_batch_size = positive("base_batch_size", base_batch_size)
        if batch_size < base_batch_size:
            raise ValueError(
                f"batch_size ({batch_size}) must not be below base_batch_size ({base_batch_size}), "
                "for which the lr was chosen: did you mean AdaScale("
                f"batch_size={base_batch_size}, base_batch_size={batch_size})?")
        self.smoothing = smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.base_steps = 0.0

    def lr_factor(self) -> Callable[[int], float]:
        """r as a function of the batch size."""
        noise_scale = ratio(self.trace.average, self.square.average) if self.trace.count else 0.0
        base = self.base_batch_size
        return functools.partial(gain, base_batch_size=base, noise_scale=noise_scale)

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.base_steps += self.lr_factor()(max(1, samples))

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        moments = measured(moments)
        self.trace.update(moments.variance_trace, moments.n_measured)
        self.square.update(moments.true_grad_sq_norm, moments.batch_size)
        return float(self.batch_size)
