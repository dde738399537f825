"""The norm test and the inner-product test: how far the batch gradient may err."""

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

    θ is the error allowed relative to the gradient.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)  # T 4, Ĝ² 2
        >>> NormTest(theta=0.5).propose(moments, loss=1.0, lr=0.1)
        8.0

    Reference: Byrd, Chin, Nocedal, Wu (2012), Mathematical Programming 134.
    """

    init_args = ("theta", "signal", "smoothing")

    def __init__(self, theta: float = 0.9, signal: str = "smoothed", smoothing: float = 0.95):
        self.theta, self.signal = positive("theta", theta), choice("signal", signal, SIGNALS)
        self.smoothing = smoothing
        self.trace, self.square = MovingAverage(smoothing), MovingAverage(smoothing)
        self.state_attrs = ("trace", "square") if signal == "smoothed" else ()

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
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


class InnerProductTest(Controller):
    """m = V/(θ²·signal²), V = Var_i⟨g_i, g⟩ with divisor m − 1; augmented: the larger of this and
    (T − V/‖g‖²)/(ν²·signal).

    V/‖g‖² is the part of the trace along g, the rest the part across it, which the orthogonality
    test bounds. Such an m is smaller than the norm test's, as noise across g costs a step less.
    signal='raw' takes this step's V, T̂ and ‖g‖², as published, and has no interval; 'smoothed'
    divides the averages of V, of the part across and of the unbiased Ĝ². The published rule never
    shrinks the batch: wrap it in Monotone. Limits: adabatch/controllers/README.md.

    θ is the error of ⟨g, G⟩ allowed relative to ‖G‖², ν (None omits it, 5.84 is usual) that of the
    orthogonality test.

    Example:
        >>> import torch
        >>> grads = torch.tensor([[3.0, 1.0], [1.0, -1.0]])  # g = (2, 0): ⟨g_i, g⟩ = 6 and 2, V = 8
        >>> norms, products = grads.square().sum(1), 2 * grads[:, 0]
        >>> moments = GradientMoments(2, norms, grad_sq_norm=4.0, inner_products=products)
        >>> InnerProductTest(theta=1.0, signal="raw").propose(moments, loss=1.0, lr=0.1)  # 8 / 4²
        0.5
        >>> rule = InnerProductTest(theta=1.0, nu=0.5, signal="raw")
        >>> rule.propose(moments, loss=1.0, lr=0.1)  # the variance across g is 2: 2 / (0.25 · 4)
        2.0

    Reference: Bollapragada, Byrd, Nocedal (2017), arXiv 1710.11258.
    """

    requires = frozenset({"inner_products"})
    init_args = ("theta", "nu", "signal", "smoothing")

    def __init__(self, theta: float = 0.9, nu: float | None = None, signal: str = "smoothed",
                 smoothing: float = 0.95):
        self.theta, self.nu = positive("theta", theta), None if nu is None else positive("nu", nu)
        self.signal, self.smoothing = choice("signal", signal, SIGNALS), smoothing
        self.along, self.across = MovingAverage(smoothing), MovingAverage(smoothing)
        self.square = MovingAverage(smoothing)
        self.state_attrs = ("along", "across", "square") if signal == "smoothed" else ()

    @classmethod
    def augmented(cls, theta: float = 0.9, nu: float = 5.84, signal: str = "smoothed",
                  smoothing: float = 0.95) -> InnerProductTest:
        """With the orthogonality test, at the usual ν."""
        return cls(theta, nu, signal, smoothing)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        moments = measured(moments)
        variance, square = moments.inner_product_variance, moments.grad_sq_norm
        across = moments.variance_trace - (variance / square if square else 0.0)
        if self.signal == "raw":
            return self._rule(variance, across, square)
        variance = self.along.update(variance, moments.n_measured)
        across = self.across.update(across, moments.n_measured)
        square = self.square.update(moments.true_grad_sq_norm, moments.batch_size)
        return self._rule(variance, across, square)

    def _inputs(self, level: float) -> list[Input]:
        averages = (self.along, self.across, self.square) if self.signal == "smoothed" else ()
        return [ends_of(average, level) for average in averages]

    def _rule(self, *inputs: float) -> float:
        variance, across, square = inputs
        proposal = ratio(variance, self.theta**2 * square**2 if square > 0 else 0.0)
        return proposal if self.nu is None else max(proposal, ratio(across, self.nu**2 * square))
