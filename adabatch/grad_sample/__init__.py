"""Per-sample gradients: taps on the layers, one rule per layer family, factors that answer statistics without building the gradients."""

from adabatch.grad_sample import activation, conv, embedding, linear, normalization  # noqa: F401  (importing registers the rules)
from adabatch.grad_sample.hooks import GradSampleHooks
from adabatch.grad_sample.registry import register_grad_sampler

__all__ = ["GradSampleHooks", "register_grad_sampler"]
