"""Per-sample gradients of traced parameters through operations so simple that nothing need be run again: sums, concatenations, products with the samples.

The gradient of one sample is a slice, or a sum, of its output gradient; what lies between the parameter and the operation may be expansions and slices.

Legend: S measured samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from adabatch.grad_sample.functional.expression import ParameterExpression

if TYPE_CHECKING:
    from adabatch.grad_sample.functional.traced_op import TracedOp

SIGNS = {"add": (1, 1), "radd": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}
EXPANSIONS = ("expand", "expand_as", "broadcast_to")


def direct_grads(operation: TracedOp, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None) -> dict[str, Tensor] | None:
    """The gradients {parameter: [S, *shape]}, or None where the operation is not of this kind.

    Args:
        operation: with leaves, tree and positions.
        tensors: its saved inputs.
        backprops: the gradient of its output, [N, ...].
        rows: the measured rows [S], or None for all.
    """
    if len(backprops) != 1 or operation.may_align - operation.aligned:
        return None
    leaves = list(operation.leaves)
    for position, tensor, batched in zip(operation.positions, tensors, operation.batched, strict=True):
        leaves[position] = _Samples(tensor, batched)
    leaves = [_Place(leaf, place in operation.aligned) if isinstance(leaf, ParameterExpression) else leaf for place, leaf in enumerate(leaves)]
    args, kwargs = tree_unflatten(leaves, operation.tree)
    grad = backprops[0] if rows is None else backprops[0].index_select(0, rows)
    dtype = torch.float64 if torch.float64 in {grad.dtype, *(parameter.dtype for parameter in operation.parameters.values())} else torch.float32
    name = getattr(operation.function, "__name__", "").strip("_")
    parts = _parts(name, args, kwargs, grad.to(dtype), rows)
    if parts is None:
        return None
    grads: dict[str, Tensor] = {}
    for place, part in parts:
        pulled = _pull_to_parameter(place, part)
        if pulled is None:
            return None
        parameter, own = pulled
        grads[parameter] = grads[parameter] + own if parameter in grads else own
    return grads if grads.keys() == operation.parameters.keys() else None


class _Samples:
    """A saved input in an operation's arguments."""

    def __init__(self, tensor: Tensor, batched: bool):
        self.tensor, self.batched = tensor, batched


class _Place:
    """What comes from parameters in an operation's arguments; `aligned`: it has a row for each sample."""

    def __init__(self, recipe: ParameterExpression, aligned: bool):
        self.recipe, self.aligned, self.shape = recipe, aligned, recipe.shape


def _parts(name: str, args: tuple, kwargs: dict[str, Any], grad: Tensor, rows: Tensor | None) -> list[tuple[_Place, Tensor]] | None:
    """The gradient [S, ...] of each place, of the samples' part of the output's shape."""
    if name in ("cat", "concat"):
        return _slices(args, kwargs, grad)
    if kwargs or len(args) != 2 or not all(isinstance(arg, (_Samples, _Place)) for arg in args):
        return None
    if name in SIGNS:
        return [(arg, grad if sign > 0 else -grad) for arg, sign in zip(args, SIGNS[name], strict=True) if isinstance(arg, _Place)]
    if name.removeprefix("r") == "mul" and sum(isinstance(arg, _Place) for arg in args) == 1:
        place, samples = args if isinstance(args[0], _Place) else args[::-1]
        if not samples.batched or samples.tensor.dim() != grad.dim():
            return None
        return [(place, grad * (samples.tensor if rows is None else samples.tensor.index_select(0, rows)))]
    return None


def _slices(args: tuple, kwargs: dict[str, Any], grad: Tensor) -> list[tuple[_Place, Tensor]] | None:
    """Of a concatenation."""
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if len(args) > 2 or not set(kwargs) <= {"dim"} or not isinstance(dim, int) or not isinstance(tensors, (list, tuple)):
        return None
    dim %= grad.dim()
    known = all((isinstance(each, _Samples) and each.batched) or (isinstance(each, _Place) and each.aligned) for each in tensors)
    if dim == 0 or not known:
        return None
    parts, start = [], 0
    for each in tensors:
        length = (each.tensor.shape if isinstance(each, _Samples) else each.shape)[dim]
        if isinstance(each, _Place):
            parts.append((each, grad.narrow(dim, start, length)))
        start += length
    return parts


def _pull_to_parameter(place: _Place, grad: Tensor) -> tuple[str, Tensor] | None:
    """(parameter, its gradients [S, *shape]) from those of what was made of it, or None where that is more than expansions and slices."""
    recipe, grad = place.recipe, grad.unsqueeze(1)  # [S, 1, ...]: each sample's own row
    shape = (1, *recipe.shape[1:]) if place.aligned else recipe.shape
    if place.aligned and not _repeats_rows(recipe):
        return None
    grad = _sum_to(grad, shape)
    while recipe.function is not None:
        parents = [leaf for leaf in recipe.leaves if isinstance(leaf, ParameterExpression)]
        name = getattr(recipe.function, "__name__", "")
        if len(parents) != 1 or not isinstance(recipe.leaves[0], ParameterExpression):
            return None
        if name in EXPANSIONS:
            grad = _sum_to(grad, parents[0].shape)
        elif name == "__getitem__":
            _, index = tree_unflatten(list(recipe.leaves), recipe.spec.tree)[0]
            index = index if isinstance(index, tuple) else (index,)
            if not all(each is None or each is Ellipsis or type(each) in (int, slice) for each in index):
                return None
            whole = grad.new_zeros(len(grad), *parents[0].shape)
            whole[(slice(None), *index)] = grad
            grad = whole
        else:
            return None
        recipe = parents[0]
    return recipe.name, grad


def _repeats_rows(recipe: ParameterExpression) -> bool:
    """Whether its rows are copies of one by an expansion as the last operation."""
    parent = recipe.leaves[0] if recipe.leaves else None
    if getattr(recipe.function, "__name__", "") not in EXPANSIONS or not isinstance(parent, ParameterExpression):
        return False
    return len(parent.shape) < len(recipe.shape) or parent.shape[0] == 1


def _sum_to(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradients [S, *shape] of what was broadcast to [S, ...]."""
    extra = grad.dim() - 1 - len(shape)
    grad = grad.sum(tuple(range(1, 1 + extra))) if extra else grad
    spread = tuple(dim for dim, size in enumerate(shape, start=1) if size == 1 and grad.shape[dim] != 1)
    return grad.sum(spread, keepdim=True) if spread else grad
