"""adabatch: training that chooses its own batch size."""

from adabatch.estimators import GradientMoments
from adabatch.grad_sample import GradSampleHooks, register_grad_sampler

__all__ = ["GradSampleHooks", "GradientMoments", "register_grad_sampler"]
