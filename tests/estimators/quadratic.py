"""A noisy quadratic on which all is known: l_i(w) = F* + ½ Σ h w² + ⟨ξ_i, w⟩ + η_i with ξ_i normal
of variances Σ and η_i normal; many runs of SGD at once.

Legend: R runs, m samples, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Quadratic:
    """The problem.

    Attributes:
        curvature: h [D].
        variances: the diagonal of Σ [D].
        floor: F*.
        loss_noise: standard deviation of η.
        preconditioner: P [D].
    """

    curvature: np.ndarray = field(default_factory=lambda: np.linspace(0.5, 2, 12))
    variances: np.ndarray = field(default_factory=lambda: 6 / np.arange(1, 13))
    floor: float = 0.7
    loss_noise: float = 0.5
    preconditioner: np.ndarray = field(default_factory=lambda: np.linspace(2, 0.2, 12))

    @property
    def trace(self) -> float:
        """T."""
        return float(self.variances.sum())

    @property
    def preconditioned_trace(self) -> float:
        """tr(PΣ)."""
        return float((self.preconditioner * self.variances).sum())

    def batch(self, w, m, rng):
        """Per-sample gradients [R, m, D] and losses [R, m] at w [R, D]."""
        noise = np.sqrt(self.variances) * rng.standard_normal((len(w), m, len(self.variances)))
        losses = self.loss(w)[:, None] + np.einsum("rmd,rd->rm", noise, w)
        losses = losses + self.loss_noise * rng.standard_normal((len(w), m))
        return (self.curvature * w)[:, None] + noise, losses

    def loss(self, w):
        """F [R]."""
        return self.floor + (self.curvature * w**2).sum(-1) / 2

    def grad_sq_norm(self, w):
        """G² [R]."""
        return ((self.curvature * w) ** 2).sum(-1)


def statistics(problem, grads, losses):
    """{name: [R]} of one step's batches, from their definitions: T̂, its error for normal
    gradients, Ĝ², tr(PΣ), the loss."""
    m = grads.shape[1]
    mean = grads.mean(1)
    centred = grads - mean[:, None]
    distances = (centred**2).sum(2)
    trace = distances.sum(1) / (m - 1)
    error = m / (m - 1) * np.sqrt(distances.var(1, ddof=1) / m * (m - 1) / (m - 2))
    signal = (mean**2).sum(1) - trace / m
    weighted = (problem.preconditioner * centred**2).sum((1, 2)) / (m - 1)
    found = {"trace": trace, "error": error, "signal": signal, "weighted": weighted, "m": m}
    return found | {"loss": losses.mean(1), "distances": distances, "mean": mean}


def runs(problem, start, sizes, lr=0.0, seed=0):
    """Yields (statistics, true G² [R], true F [R]) of each step of SGD from start [R, D], one batch
    size a step; lr = 0 stays where it is."""
    rng, w = np.random.default_rng(seed), start.copy()
    for m in sizes:
        grads, losses = problem.batch(w, m, rng)
        yield statistics(problem, grads, losses), problem.grad_sq_norm(w), problem.loss(w)
        w = w - lr * grads.mean(1)
