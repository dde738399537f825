"""Operations in which what is computed from parameters alone meets samples: their per-sample
gradients, by running the operation again for each sample.

Sums, concatenations and products with the samples need not be run again, if only expansions and
slices lie between them and the parameter: a sample's gradient is a slice or sum of its output's.

Legend: N samples, S measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.functional.expression import (
    Leaves, Operation, ParameterExpression, run_leaves,
)
from adabatch.grad_sample.layers.generic import per_sample_grads
from adabatch.kernels import accumulation_dtype

SIGNS = {"add": (1, 1), "radd": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}
EXPANSIONS = ("expand", "expand_as", "broadcast_to")


@dataclass(eq=False)
class TracedOp:
    """An operation in which traced parameters meet samples.

    What is computed from parameters alone may have a row for every sample (an expanded class token)
    or be the same for all (a weight). `aligned` are the places of those with a row each;
    `may_align` of those whose shape allows it, tried if the operation fails without.
    """

    name: str
    function: Operation
    leaves: Leaves
    tree: TreeSpec
    tensors: list[Tensor]
    batched: list[bool]
    positions: list[int]
    parameters: dict[str, Tensor]
    aligned: frozenset[int]
    may_align: frozenset[int]

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        """Per-sample gradients of the traced parameters through this operation, by name."""
        grads = self._direct_grads(tensors, backprops, rows)
        if grads is None:
            grads = self._grads_run_again(tensors, backprops, rows)
        return {name: Dense(grad) for name, grad in grads.items()}

    def _grads_run_again(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Tensor]:
        if rows is None:
            rows = torch.arange(backprops[0].shape[0], device=backprops[0].device)
        picked = [tensor.index_select(0, rows) if each else tensor
                  for tensor, each in zip(tensors, self.batched, strict=True)]
        outer = [grad.index_select(0, rows) for grad in backprops]
        arguments = ([rows, *picked], [True, *self.batched], outer, self.name)
        try:
            return per_sample_grads(self._run, self.parameters, *arguments)
        except RuntimeError:
            if self.aligned >= self.may_align:
                raise
            self.aligned = self.may_align
            return per_sample_grads(self._run, self.parameters, *arguments)

    def _run(self, parameters: dict[str, Tensor], row: Tensor, *inputs: Tensor) -> list[Tensor]:
        leaves = run_leaves(self.leaves, parameters, {})
        for position in self.aligned:
            leaves[position] = leaves[position].index_select(0, row)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value
        args, kwargs = tree_unflatten(leaves, self.tree)
        return tree_flatten(self.function(*args, **kwargs))[0]

    def _direct_grads(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Tensor] | None:
        """{parameter: [S, *shape]} without running the operation again; None where that is not
        known."""
        if len(backprops) != 1 or self.may_align - self.aligned:
            return None
        if any(tensor.is_complex() for tensor in (*backprops, *tensors)):
            return None
        leaves = [_Operand(leaf, place in self.aligned)
                  if isinstance(leaf, ParameterExpression) else leaf
                  for place, leaf in enumerate(self.leaves)]
        for position, tensor, each in zip(self.positions, tensors, self.batched, strict=True):
            leaves[position] = _Operand(tensor, each)
        args, kwargs = tree_unflatten(leaves, self.tree)
        grad = backprops[0] if rows is None else backprops[0].index_select(0, rows)
        grad = grad.to(accumulation_dtype(grad, *self.parameters.values()))
        parts = _parts(function_name(self.function).strip("_"), args, kwargs, grad, rows)
        if parts is None:
            return None
        grads: dict[str, Tensor] = {}
        for part in parts:
            pulled = _pull_to_parameter(*part)
            if pulled is None:
                return None
            parameter, own = pulled
            grads[parameter] = grads[parameter] + own if parameter in grads else own
        return grads if grads.keys() == self.parameters.keys() else None


def function_name(function: Operation) -> str:
    """The name of an operation, "" where it has none: torch.Tensor.add_ is "add_"."""
    return getattr(function, "__name__", "")


def identity(tensor: Tensor) -> Tensor:
    """The operation of `ParameterTracer.tap_rows`."""
    return tensor


@dataclass
class _Operand:
    """An input with samples, or what is computed from parameters, among an operation's arguments;
    `batched`: it has a row for each sample."""

    value: Tensor | ParameterExpression
    batched: bool


# (expression, whether it has a row for each sample, its gradient [S, ...])
Parts = list[tuple[ParameterExpression, bool, Tensor]]


def _parts(
    name: str, args: Args, kwargs: Kwargs, grad: Tensor, rows: Tensor | None
) -> Parts | None:
    """The gradients of the expressions in the output's shape; None where they are not known."""
    if name in ("cat", "concat"):
        return _slices(args, kwargs, grad)
    if kwargs or len(args) != 2 or not all(isinstance(arg, _Operand) for arg in args):
        return None
    if name in SIGNS:
        return [(arg.value, arg.batched, grad if sign > 0 else -grad)
                for arg, sign in zip(args, SIGNS[name], strict=True)
                if isinstance(arg.value, ParameterExpression)]
    if name.removeprefix("r") == "mul":
        own, samples = args if isinstance(args[0].value, ParameterExpression) else args[::-1]
        tensor = samples.value
        if isinstance(tensor, Tensor) and samples.batched and tensor.dim() == grad.dim():
            tensor = tensor if rows is None else tensor.index_select(0, rows)
            return [(own.value, own.batched, grad * tensor)]
    return None


def _slices(args: Args, kwargs: Kwargs, grad: Tensor) -> Parts | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if len(args) > 2 or not set(kwargs) <= {"dim"} or not isinstance(dim, int):
        return None
    dim %= grad.dim()
    if dim == 0 or not isinstance(tensors, (list, tuple)):
        return None
    parts, start = [], 0
    for each in tensors:
        if not (isinstance(each, _Operand) and each.batched):
            return None
        length = each.value.shape[dim]
        if isinstance(each.value, ParameterExpression):
            parts.append((each.value, True, grad.narrow(dim, start, length)))
        start += length
    return parts


def _pull_to_parameter(
    expression: ParameterExpression, batched: bool, grad: Tensor
) -> tuple[str, Tensor] | None:
    """(parameter, its gradients [S, *shape]) through expansions and slices; None of others."""
    grad = grad.unsqueeze(1)  # [S, 1, ...]: each sample's own row
    if batched and not _repeats_rows(expression):
        return None
    grad = _sum_to(grad, (1, *expression.shape[1:]) if batched else expression.shape)
    while expression.function is not None:
        parents = [leaf for leaf in expression.leaves if isinstance(leaf, ParameterExpression)]
        name = function_name(expression.function)
        if len(parents) != 1 or parents[0] is not expression.leaves[0]:
            return None
        if name in EXPANSIONS:
            grad = _sum_to(grad, parents[0].shape)
        elif name == "__getitem__":
            _, index = tree_unflatten(list(expression.leaves), expression.tree)[0]
            index = index if isinstance(index, tuple) else (index,)
            if not all(each is None or each is Ellipsis or type(each) in (int, slice)
                       for each in index):
                return None
            whole, own_rows = grad.new_zeros(len(grad), *parents[0].shape), (slice(None), *index)
            whole[own_rows] = grad
            grad = whole
        else:
            return None
        expression = parents[0]
    return expression.name, grad


def _repeats_rows(expression: ParameterExpression) -> bool:
    """Whether its last operation is an expansion of one row."""
    if expression.function is None or function_name(expression.function) not in EXPANSIONS:
        return False
    parent = expression.leaves[0]
    return isinstance(parent, ParameterExpression) and (
        len(parent.shape) < len(expression.shape) or parent.shape[0] == 1)


def _sum_to(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradients [S, *shape] of what was broadcast to [S, ...]."""
    extra = grad.dim() - 1 - len(shape)
    grad = grad.sum(tuple(range(1, 1 + extra))) if extra else grad
    spread = tuple(dim for dim, size in enumerate(shape, start=1)
                   if size == 1 and grad.shape[dim] != 1)
    return grad.sum(spread, keepdim=True) if spread else grad
