"""Per-sample gradients: taps on the layers, one rule per layer family,
factored gradients that answer statistics."""

from adabatch.grad_sample import layers
from adabatch.grad_sample.hooks import GradSampleHooks
from adabatch.grad_sample.registry import register_grad_sampler

__all__ = ["GradSampleHooks", "layers", "register_grad_sampler"]
