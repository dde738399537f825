"""Tracing of one call of a layer without a rule: its parameters are measured in the operations in
which they meet samples, and it need not be run again.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from adabatch._types import Args, Kwargs
from adabatch.estimators.gradients import is_transformed
from adabatch.grad_sample.functional.apart import KNOWN, keeps_apart
from adabatch.grad_sample.functional.expression import Leaf, Operation, function_name
from adabatch.grad_sample.functional.flow import Flow, Roles, SampleFlow, operation_name
from adabatch.grad_sample.functional.traced_op import TracedOp
from adabatch.grad_sample.functional.tracer import (
    ATTRIBUTES, CannotTrace, ParameterTracer, Tap, flat_values,
)

Node = torch.autograd.graph.Node


class LayerFlow(SampleFlow):
    """What operations that are seen make of the samples, and nothing else."""

    def of(self, value: object) -> Flow | None:
        flow = self._flows.get(id(value))
        return flow if flow is not None and flow.reference() is value else None


class LayerTracer(ParameterTracer):
    """Watches the operations of one call of a layer.

    Args:
        parameters: the layer's, by their names in the model.
        inputs: the tensors that the layer is called with, and whether each carries samples.
        tap: as for ParameterTracer.

    Attributes:
        failed: something inside cannot be measured in its operations.
        operations: in which parameters met samples.
    """

    def __init__(
        self, parameters: dict[str, Tensor], inputs: Sequence[tuple[Tensor, bool]], tap: Tap
    ):
        self.failed = False
        self.operations: list[TracedOp] = []
        self._taps: set[Node | None] = {tensor.grad_fn for tensor, _ in inputs}
        n_samples = next(tensor.shape[0] for tensor, carries in inputs if carries)
        roles = Roles()
        roles.begin(n_samples)
        flow = LayerFlow(n_samples, roles)
        for tensor, carries in inputs:
            if carries:
                flow.add(tensor, 0)
            else:
                flow.add_constant(tensor)

        super().__init__(parameters, flow, tap)

    def _tap_outputs(self, operation: TracedOp, outputs: list[Tensor]) -> Sequence[Tensor]:
        self.operations.append(operation)
        found = super()._tap_outputs(operation, outputs)
        self._taps.update(each.grad_fn for each in found)
        return found

    def __torch_function__(
        self, function: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Leaf:
        kwargs = kwargs or {}
        if (self.failed or function in ATTRIBUTES or torch.compiler.is_compiling()
                or is_transformed()):
            return function(*args, **kwargs)
        inputs = [(value, flow.dim) for value in flat_values((*args, *kwargs.values()))
                  if isinstance(value, Tensor) and (flow := self._flow.of(value)) is not None]
        if inputs and operation_name(function) not in KNOWN:
            self._fail()
            return function(*args, **kwargs)
        try:
            output = super().__torch_function__(function, types, args, kwargs)
        except CannotTrace:
            self._fail()
            return function(*args, **kwargs)
        if inputs:
            with torch._C.DisableTorchFunction():
                apart = self._keeps_apart(function, args, kwargs, inputs, output)
            if not apart:
                self._fail()
        return output

    def _fail(self) -> None:
        self.failed = True
        for operation in self.operations:
            operation.active = False

    def _keeps_apart(
        self, function: Operation, args: Args, kwargs: Kwargs,
        inputs: Sequence[tuple[Tensor, int]], output: object,
    ) -> bool:
        outputs = [value for value in flat_values((output,)) if isinstance(value, Tensor)]
        flows = [self._flow.of(value) for value in outputs]
        if any(flow is None or flow.roles for flow in flows) or self._flow.roles.open:
            return False
        dims = [(value, flow.dim) for value, flow in zip(outputs, flows, strict=True)
                if flow is not None]
        name = function_name(function)
        return keeps_apart(name, operation_name(function), args, kwargs, inputs, dims)

    def measures(
        self, outputs: Sequence[object], parameters: Collection[Tensor], walks: bool
    ) -> bool:
        """Whether the operations show all of the layer's gradient.

        Args:
            outputs: of the layer.
            parameters: its own.
            walks: look as well for uses of the parameters that were not seen.
        """
        carrying = [each for each in outputs if isinstance(each, Tensor) and each.requires_grad]
        flows = [self._flow.of(each) for each in carrying]
        if any(flow is None or flow.dim != 0 for flow in flows) or (
                walks and not self.failed and self._has_unseen_use(
                    [each.grad_fn for each in carrying], set(map(id, parameters)))):
            self._fail()
        return not self.failed

    def _has_unseen_use(self, nodes: Sequence[Node | None], parameters: Collection[int]) -> bool:
        """Whether the outputs reach a parameter other than through an operation with a tap."""
        seen, stack = set(self._taps), [*nodes]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in parameters:
                return True
            stack.extend(below for below, _ in node.next_functions)
        return False
