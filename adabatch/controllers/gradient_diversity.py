"""GradientDiversity: DiveBatch's rule, once an epoch."""

from __future__ import annotations

import math

from adabatch.controllers.base import Controller, check_positive, ratio
from adabatch.estimators.averages import MovingAverage, student_quantile
from adabatch.estimators.intervals import NO_INTERVAL, JointAverages, fieller
from adabatch.estimators.moments import GradientMoments

UNDECAYED = 1 - 1e-12  # of a moving average that is a mean


class GradientDiversity(Controller):
    """m = δ·n·Δ, with n·Δ = n·Σ‖g_i‖²/‖Σ g_i‖² over n samples = E‖g_i‖²/‖E g_i‖² = 1 + T/G²; once every n samples, the proposal holding in between.

    On one batch of m the plain m·Δ cannot exceed m where noise dominates, as ‖g‖² holds the noise T/m. So Σ m·mean‖g_i‖² and Σ m·Ĝ², Ĝ² unbiased, are summed
    over the epoch and divided at its end: our form of the published rule, which sums the gradients themselves while the parameters move. Before the first
    epoch has ended the proposal is the size in use. Where theory is thin: that batches up to n·Δ cost no convergence is a bound for plain SGD at fixed
    parameters, which move over the epoch; momentum and Adam do not enter.

    The published rule is paired with coupling='linear', which is unstable without a low max_batch_size: at a size near the noise scale T/G², where δ = 1 asks
    to be, a step is worth about half of what linear scaling takes it for, and the lr outgrows what the network can be trained at. Measured on scikit-learn's
    digits (20 epochs, sizes 16 to 1024, seeds 0 to 3): with 'linear' .52 to .98 held-out accuracy at lr .03, .10 to .97 at .1, all collapsed at .3; with
    'adascale' .96 to .98, .88 to .98, .98; with 'sqrt' .97 to .98, .98, .98. δ = .25 and .1 with 'linear' collapsed in four and two of twelve runs. So pair
    it with coupling='sqrt', or bound the size to a few times the first one.

    Args:
        delta: δ, > 0.
        epoch_samples: n, after which the rule is applied; None: at the end of each epoch, as the scheduler counts them.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> moments = GradientMoments(batch_size=2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)  # E‖g_i‖² = 6, Ĝ² = 2
        >>> rule = GradientDiversity(delta=0.5, epoch_samples=2)
        >>> rule.advance(samples=2, epoch=0)
        >>> rule.propose(moments, loss=1.0, lr=0.1)
        1.5

    References:
        Yin, Pananjady, Lam, Papailiopoulos, Ramchandran, Bartlett (2018), "Gradient diversity", arXiv 1706.05699; DiveBatch (2025), arXiv 2509.16173.
    """

    needs_effective_lr = False
    arguments = ("delta", "epoch_samples")
    saved = ("square_norms", "signals", "joint", "decided", "proposal", "samples", "epoch", "decided_at")

    def __init__(self, delta: float = 1.0, epoch_samples: int | None = None):
        check_positive(delta=delta, **({} if epoch_samples is None else {"epoch_samples": epoch_samples}))
        self.delta, self.epoch_samples = delta, epoch_samples
        self._begin()
        self.decided: list[float] = []  # X, Y, V_X, V_Y, V_XY and the degrees of freedom of the epoch that the proposal is of
        self.proposal = math.nan
        self.samples = self.epoch = self.decided_at = 0

    def advance(self, *, samples: int, epoch: int) -> None:
        """Count the samples and epochs: see `Controller.advance`."""
        self.samples += samples
        self.epoch = epoch

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments; give the proposed batch size of the last finished epoch, in samples.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self.joint.update((moments.mean_sq_norm, moments.batch_size), (moments.true_grad_sq_norm, moments.batch_size))
        epochs = self.epoch if self.epoch_samples is None else self.samples // self.epoch_samples
        if epochs > self.decided_at:
            norms, signals = self.square_norms, self.signals
            self.proposal, self.decided_at = ratio(self.delta * norms.average, signals.average), epochs
            errors = [norms.std_error() ** 2, signals.std_error() ** 2, self.joint.covariance()]
            self.decided = [norms.average, signals.average, *errors, signals.freedom]
            self._begin()
        return float(moments.batch_size) if math.isnan(self.proposal) else self.proposal

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """That of the last finished epoch's ratio; none before one has ended: see `Controller.proposal_interval`."""
        if not self.decided:
            return NO_INTERVAL
        norms, signals, of_norms, of_signals, both, freedom = self.decided
        variances = self.delta**2 * of_norms, of_signals
        return fieller(self.delta * norms, signals, variances, self.delta * both, student_quantile(level, freedom))

    def _begin(self) -> None:
        """Plain means over the epoch to come."""
        self.square_norms, self.signals = MovingAverage(UNDECAYED), MovingAverage(UNDECAYED)
        self.joint = JointAverages(self.square_norms, self.signals)
