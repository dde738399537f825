"""The inner-product test: enough samples that the batch gradient is a direction of descent."""

from __future__ import annotations

from adabatch.controllers.base import Controller, check_choice, check_positive, ratio
from adabatch.controllers.norm_test import SIGNALS
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.intervals import NO_INTERVAL, JointAverages
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.one_step import mean_error, ratio_interval


class InnerProductTest(Controller):
    """m = V/(θ²·signal²), V = Var_i⟨g_i, g⟩ with divisor m − 1; augmented: the larger of this and (T − V/‖g‖²)/(ν²·signal).

    V/‖g‖² is the part of the trace along g; the rest is the part across it, which the orthogonality test bounds. Such an m is smaller than the norm
    test's, as noise across g costs a step less than noise along it.

    signal='raw' takes this step's V, T̂ and ‖g‖², as published; 'smoothed' averages V, the part across and the unbiased Ĝ² each by itself and divides
    the averages. Where theory is thin: g is the batch's own gradient, so that E V = GᵀΣG + tr(Σ²)/m, and for a batch below the noise scale V is mostly the
    second part; and as for the norm test neither momentum nor Adam enters. The published rule never shrinks the batch: wrap it in Monotone.

    Args:
        theta: θ, the error of ⟨g, G⟩ allowed relative to ‖G‖², > 0.
        nu: ν of the orthogonality test, > 0; None leaves it out. Usual: 5.84.
        signal: 'smoothed' or 'raw'.
        smoothing: μ of the averages for 'smoothed', 0 <= μ < 1.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> grads = torch.tensor([[3.0, 1.0], [1.0, -1.0]])  # g = (2, 0): ⟨g_i, g⟩ = 6 and 2, their variance 8
        >>> moments = GradientMoments(2, sq_norms=grads.square().sum(1), grad_sq_norm=4.0, inner_products=2 * grads[:, 0])
        >>> InnerProductTest(theta=1.0, signal="raw").propose(moments, loss=1.0, lr=0.1)  # 8 / 4²
        0.5
        >>> InnerProductTest(theta=1.0, nu=0.5, signal="raw").propose(moments, loss=1.0, lr=0.1)  # the variance across g is 2: 2 / (0.25 · 4)
        2.0

    References:
        Bollapragada, Byrd, Nocedal (2017), "Adaptive sampling strategies for stochastic optimization", arXiv 1710.11258.
    """

    needs = frozenset({"inner_products"})
    needs_effective_lr = False
    arguments = ("theta", "nu", "signal", "smoothing")
    saved = ("along", "across", "square", "joint")

    def __init__(self, theta: float = 0.9, nu: float | None = None, signal: str = "smoothed", smoothing: float = 0.95):
        check_positive(theta=theta, **({} if nu is None else {"nu": nu}))
        check_choice("signal", signal, SIGNALS)
        self.theta, self.nu, self.signal, self.smoothing = theta, nu, signal, smoothing
        self.along, self.across, self.square = MovingAverage(smoothing), MovingAverage(smoothing), MovingAverage(smoothing)
        self.joint = JointAverages(self.along, self.across, self.square)
        self._latest: GradientMoments | None = None
        if signal == "raw":
            self.saved = ()

    @classmethod
    def augmented(cls, theta: float = 0.9, nu: float = 5.84, signal: str = "smoothed", smoothing: float = 0.95) -> InnerProductTest:
        """With the orthogonality test, at the usual ν."""
        return cls(theta, nu, signal, smoothing)

    def propose(self, moments: GradientMoments, *, loss: float, lr: float) -> float:
        """Take one step's raw moments with inner_products; give the proposed batch size, in samples.

        Raises:
            ValueError: measured without inner_products, or a batch of one.
        """
        variance, square = moments.inner_product_variance, moments.grad_sq_norm
        across = moments.variance_trace - (variance / square if square else 0.0)
        self._latest = moments if self.signal == "raw" else None
        if self.signal == "smoothed":
            measured, signal = moments.n_measured, (moments.true_grad_sq_norm, moments.batch_size)
            variance, across, square = self.joint.update((variance, measured), (across, measured), signal)
        proposal = ratio(variance, self.theta**2 * square**2 if square > 0 else 0.0)
        return proposal if self.nu is None else max(proposal, ratio(across, self.nu**2 * square))

    def proposal_interval(self, level: float = 0.9) -> tuple[float, float]:
        """That of V/(θ²G⁴), with 2·Ĝ²·SE(Ĝ²) for the error of Ĝ⁴; augmented the larger ends of both tests': see `Controller.proposal_interval`.

        For the raw signal those of this one step: of the variance along the direction of its g, V/‖g‖², and of that across it, over θ²·E‖g‖² and ν²·E‖g‖²
        (`adabatch.estimators.one_step.ratio_interval`). The direction counts as given. None where several processes share a batch.
        """
        if self.signal == "raw":
            return self._of_one_step(level)
        along = self.joint.ratio_interval(level, denominator=2, scale=1 / self.theta**2, power=2)
        if self.nu is None:
            return along
        across = self.joint.ratio_interval(level, numerator=1, denominator=2, scale=1 / self.nu**2)
        return max(along[0], across[0]), max(along[1], across[1])

    def _of_one_step(self, level: float) -> tuple[float, float]:
        moments = self._latest
        if moments is None or moments.totals is not None or not moments.grad_sq_norm > 0:
            return NO_INTERVAL
        square = moments.grad_sq_norm
        weights = 1.0 if moments.weights is None else moments.weights
        corrections = 1.0 if moments.corrections is None else moments.corrections
        along = corrections * (moments.inner_products.double() - weights * square).square() / square
        across = corrections * moments.centred_sq_norms - along
        mean = moments.inner_product_variance / square
        ends = [ratio_interval(mean, mean_error(along, moments), moments, level, 1 / self.theta**2)]
        if self.nu is not None:
            ends.append(ratio_interval(moments.variance_trace - mean, mean_error(across, moments), moments, level, 1 / self.nu**2))
        return max(low for low, _ in ends), max(high for _, high in ends)
