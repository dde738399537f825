"""From the per-sample gradients of what is computed from parameters to those of the parameters.

Views, casts and look-ups keep the factor; any other expression is differentiated, alone, without
the samples' operation.

Legend: S samples measured, V rows of a table, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_unflatten

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.outer import OneHotOuter, Outer
from adabatch.grad_sample.factors.viewed import Viewed
from adabatch.grad_sample.functional.expression import Leaf, ParameterExpression, function_name
from adabatch.grad_sample.layers.generic import RANDOM, no_draws
from adabatch.kernels import CHUNK_BYTES, accumulation_dtype

EXPANSIONS: tuple[str, ...] = ("expand", "expand_as", "broadcast_to")
SAME = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "clone",
                  "contiguous"})
EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
             "sparse")
Found = dict[str, Factor]  # of parameters, by name


def bound(args: Args, kwargs: Kwargs, names: Sequence[str]) -> dict[str, Leaf] | None:
    """The arguments by name, those that were given; None where there are others."""
    values = dict(zip(names, args, strict=False))
    known = len(args) <= len(names) and kwargs.keys() <= set(names[len(args):])
    return {**values, **kwargs} if known else None


def pull_back(
    expression: ParameterExpression, factor: Factor, parameters: Mapping[str, Tensor], name: str
) -> Found | None:
    """The factors of the parameters that the expression is computed from, from its own; None where
    they are not found.

    Raises:
        RuntimeError: the expression, of the operation of that name, draws random numbers.
    """
    while expression.function is not None:
        step = _step(expression, factor)
        if step is None:
            return _differentiated(expression, factor, parameters, name)
        expression, factor = step
    return {expression.name: factor}


def of_rows(
    expression: ParameterExpression, factor: Factor
) -> tuple[ParameterExpression, Factor] | None:
    """What was expanded to a row for each sample, and its factor, from that of a sample's own row;
    None where the rows are not known to be one and the same."""
    while expression.function is not None and function_name(expression.function) in SAME:
        parent = _only_parent(expression)
        if parent is None or parent.shape != expression.shape:
            return None
        expression = parent
    parent = _only_parent(expression)
    if parent is None or function_name(expression.function) not in EXPANSIONS:
        return None
    rank = len(expression.shape)
    if len(parent.shape) == rank and parent.shape[0] != 1:
        return None
    if isinstance(factor, Outer) and parent.shape == expression.shape[1:]:
        return parent, factor
    return parent, Dense(sum_to(factor.dense().unsqueeze(1), parent.shape))


def sum_to(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradients [S, *shape] of what was broadcast to [S, ...]."""
    extra = grad.dim() - 1 - len(shape)
    grad = grad.sum(tuple(range(1, 1 + extra))) if extra else grad
    spread = tuple(dim for dim, size in enumerate(shape, start=1)
                   if size == 1 and grad.shape[dim] != 1)
    return grad.sum(spread, keepdim=True) if spread else grad


def _only_parent(expression: ParameterExpression) -> ParameterExpression | None:
    parents = [leaf for leaf in expression.leaves if isinstance(leaf, ParameterExpression)]
    return parents[0] if len(parents) == 1 else None


def _step(
    expression: ParameterExpression, factor: Factor
) -> tuple[ParameterExpression, Factor] | None:
    """The expression's own operation undone; None where it has to be differentiated."""
    parent, name = _only_parent(expression), function_name(expression.function)
    if parent is None:
        return None
    if name in SAME and parent.shape == expression.shape:
        return parent, factor
    if name in EXPANSIONS:
        return parent, Dense(sum_to(factor.dense(), parent.shape))
    args, kwargs = tree_unflatten(list(expression.leaves), expression.tree)
    ids = _ids(name, args, kwargs, parent)
    if ids is not None:
        grad = factor.dense()
        width = math.prod(parent.shape[1:])
        rows = ids.flatten().expand(len(grad), -1)
        picked = OneHotOuter(rows, grad.reshape(len(grad), -1, width), parent.shape[0])
        return parent, shaped(picked, parent.shape)
    return _of_view(expression, parent, factor)


def _ids(name: str, args: Args, kwargs: Kwargs, table: ParameterExpression) -> Tensor | None:
    """The constant ids with which rows of a table are looked up."""
    index: Leaf = None
    if name == "embedding" and len(args) > 1 and args[1] is table:
        values = bound(args, kwargs, EMBEDDING)
        plain = values is not None and all(values.get(each) in (None, False) for each in (
            "padding_idx", "max_norm", "scale_grad_by_freq"))
        index = args[0] if plain else None
    elif name == "index_select" and len(args) == 3 and args[0] is table and args[1] == 0:
        index = args[2]
    elif name == "__getitem__" and args[0] is table:
        index = args[1]
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    return index % table.shape[0] if integers else None


def _of_view(
    expression: ParameterExpression, parent: ParameterExpression, factor: Factor
) -> tuple[ParameterExpression, Factor] | None:
    """Of an operation that gives a view without repeated elements."""
    base = torch.empty(parent.shape, device="meta")
    leaves = [base if leaf is parent else leaf for leaf in expression.leaves]
    if any(isinstance(leaf, Tensor) and leaf is not base for leaf in leaves):
        return None
    args, kwargs = tree_unflatten(leaves, expression.tree)
    try:
        found: Leaf = expression.function(*args, **kwargs)  # type: ignore[misc]
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    found = found[expression.index] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor) or found._base is not base or found.shape != expression.shape:
        return None
    size, stride = tuple(found.shape), found.stride()
    if any(step == 0 and length > 1 for step, length in zip(stride, size, strict=True)):
        return None
    if size == parent.shape and stride == base.stride():
        return parent, factor
    transposed = len(size) == 2 and size == parent.shape[::-1] and stride == base.stride()[::-1]
    if transposed and isinstance(factor, Outer):
        return parent, Outer(factor.right, factor.left)
    return parent, Viewed(factor, parent.shape, size, stride, int(found.storage_offset()))


def shaped(factor: Factor, shape: tuple[int, ...]) -> Factor:
    """The factor of the same elements in another shape."""
    if factor.shape == shape:
        return factor
    flat = torch.empty(factor.shape, device="meta")
    return Viewed(factor, shape, tuple(flat.shape), flat.stride(), 0)


def value_of(
    expression: ParameterExpression, parameters: dict[str, Tensor], name: str
) -> Tensor:
    """The expression computed again; name: of the operation, for errors."""
    if expression.function is None:
        return parameters[expression.name]
    with no_draws(name, next(iter(parameters.values())).device):
        return expression.run(parameters, {})


def _differentiated(
    expression: ParameterExpression, factor: Factor, parameters: Mapping[str, Tensor], name: str
) -> Found | None:
    """By vmap of the vjp of the expression alone; None where that cannot run it."""
    grads = factor.dense()
    own = {each: parameters[each].detach().to(grads.dtype) for each in expression.parameters}
    numel = sum(each.numel() for each in own.values())
    chunk = max(8, CHUNK_BYTES // max(1, 4 * numel))
    try:
        with no_draws(name, grads.device), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            output, pull, *_ = vjp(lambda values: expression.run(values, {}), own)
            found = vmap(lambda grad: pull(grad)[0], chunk_size=chunk)(grads.to(output.dtype))
    except RuntimeError as error:
        if RANDOM in str(error):
            raise
        return None
    dtype = accumulation_dtype(grads)
    return {each: Dense(grad.to(dtype)) for each, grad in found.items()}
