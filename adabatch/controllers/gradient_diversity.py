"""GradientDiversity: DiveBatch's rule, once an epoch."""

from __future__ import annotations

import math

from adabatch._checks import positive
from adabatch.controllers.base import Controller, Input, ends_of, measured, ratio
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.moments import GradientMoments

UNDECAYED = 1 - 1e-12  # of a moving average that is a mean


class GradientDiversity(Controller):
    """m = δ·n·Δ, n·Δ = n·Σ‖g_i‖²/‖Σ g_i‖² over n samples = E‖g_i‖²/‖E g_i‖² = 1 + T/G², once every
    n samples, and kept in between.

    On one batch of m the plain m·Δ cannot exceed m where noise dominates, as ‖g‖² holds the noise
    T/m. So Σ m·mean‖g_i‖² and Σ m·Ĝ², Ĝ² unbiased, are summed over the epoch and divided at its
    end: our form of the published rule, which sums the gradients while the parameters move.
    Before the first epoch has ended the proposal is the size in use. Pair it with coupling='sqrt',
    or bound the size to a few times the first one: with 'linear' as published runs collapsed
    (adabatch/controllers/README.md).

    n is epoch_samples, or the epoch's where that is None.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)
        >>> rule = GradientDiversity(delta=0.5, epoch_samples=2)
        >>> rule.on_step(samples=2, epoch=0)
        >>> rule.propose(moments, loss=1.0, lr=0.1)  # E‖g_i‖² = 6, Ĝ² = 2
        1.5

    Reference: Yin et al. (2018), "Gradient diversity", arXiv 1706.05699; DiveBatch (2025), arXiv
    2509.16173.
    """

    init_args = ("delta", "epoch_samples")
    state_attrs = ("norms", "signals", "last_norms", "last_signals", "proposal", "samples", "epoch",
                   "decided_at")

    def __init__(self, delta: float = 1.0, epoch_samples: int | None = None):
        self.delta, self.epoch_samples = positive("delta", delta), epoch_samples
        if epoch_samples is not None:
            positive("epoch_samples", epoch_samples)
        self.norms, self.signals = MovingAverage(UNDECAYED), MovingAverage(UNDECAYED)
        self.last_norms, self.last_signals = MovingAverage(UNDECAYED), MovingAverage(UNDECAYED)
        self.proposal = math.nan
        self.samples = self.epoch = self.decided_at = 0

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.samples += samples
        self.epoch = epoch

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        moments = measured(moments)
        self.norms.update(moments.mean_sq_norm, moments.batch_size)
        self.signals.update(moments.true_grad_sq_norm, moments.batch_size)
        epochs = self.epoch if self.epoch_samples is None else self.samples // self.epoch_samples
        if epochs > self.decided_at:
            self.proposal = self._rule(self.norms.average, self.signals.average)
            self.decided_at, self.last_norms, self.last_signals = epochs, self.norms, self.signals
            self.norms, self.signals = MovingAverage(UNDECAYED), MovingAverage(UNDECAYED)
        return float(moments.batch_size) if math.isnan(self.proposal) else self.proposal

    def _inputs(self, level: float) -> list[Input]:
        if math.isnan(self.proposal):
            return []
        return [ends_of(average, level) for average in (self.last_norms, self.last_signals)]

    def _rule(self, *inputs: float) -> float:
        norms, signals = inputs
        return ratio(self.delta * norms, signals)
