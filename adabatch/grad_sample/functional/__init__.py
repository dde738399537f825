"""Parameters used outside the layers that own them: traced, expressed, measured."""

from adabatch.grad_sample.functional.traced_op import TracedOp
from adabatch.grad_sample.functional.tracer import ParameterTracer

__all__ = ["ParameterTracer", "TracedOp"]
