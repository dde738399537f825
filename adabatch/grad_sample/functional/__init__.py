"""Parameters used outside the layers that own them: traced, expressed, measured.

ForwardHooks is the only caller: it enters a ParameterTracer around the model's forward pass and
brackets every measured layer with enter_layer() and leave_layer(); the tracer gives it back a
TracedOp, with its outputs to be tapped, for each operation in which parameters meet samples.
"""

from adabatch.grad_sample.functional.traced_op import TracedOp
from adabatch.grad_sample.functional.tracer import ParameterTracer

__all__ = ["ParameterTracer", "TracedOp"]
