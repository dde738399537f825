"""Inner products ⟨G_n, g⟩ with the step's finished gradient g, without per-sample gradients.

While a pass runs, g is not known: the factors of every call are kept until it is. They hold the
measured rows of each layer's activations and output gradients, for all passes of a step: measure
a subset (samples=) where that is too much.
"""

from __future__ import annotations

from torch import Tensor

from adabatch.grad_sample.cost import LayerCost
from adabatch.grad_sample.factors.base import Factor
from adabatch.interfaces import Statistic


class InnerProducts(Statistic):
    """⟨G_n, g⟩ of each measured sample, [S], g the step's gradient as it is in p.grad.

    With them the trace is never negative and far steadier, and its standard error is known. Under
    DistributedDataParallel g is the gradient averaged over the processes, the samples are this
    process's own.
    """

    name = "inner_products"
    per_sample = True
    needs_gradient = True

    def of_factor(self, name: str, factor: Factor, grad: Tensor | None = None) -> Tensor | None:
        return None if grad is None else factor.dot(grad)

    def cost(self, layer: LayerCost, samples: int, measured: int, fused: bool) -> float:
        return measured * layer.product
