"""Uses of parameters that lie between the taps and the loss: a tied weight applied in the loss function, an L2 penalty inside the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

COMPILED = "CompiledFunctionBackward"  # one node that holds layers and taps alike


def unseen_uses(loss: Tensor, parameters: Mapping[str, Tensor], reports: Iterable[Tensor] = ()) -> list[str]:
    """Names of the parameters that the loss reaches without passing a tap: the taps see nothing of these uses, so the norms would lack them.

    Walks the graph from the loss down to the taps, also after backward. Uses below a tap are found while the model runs, not here.

    Args:
        loss: the scalar that was differentiated.
        parameters: the measured ones by name.
        reports: the leaves that taps report to. A tap is told by its edge to one of them, not by its name, which is that of an in-place
            operation where a layer's output is a view.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> unseen_uses(weight.square().sum(), {"weight": weight})
        ['weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    leaves = {id(leaf) for leaf in reports}
    found: dict[str, None] = {}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        below = [function for function, _ in node.next_functions]
        if node.name().split("::")[-1] == COMPILED or any(_reaches(function, leaves) for function in below):
            continue
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            found[name] = None
        stack.extend(below)
    return [name for name in parameters if name in found]


def _reaches(function: Any, leaves: Collection[int]) -> bool:
    """Whether an edge leads to one of the leaves, at once or through the selection of a line of it."""
    return function is not None and any(id(getattr(node, "variable", None)) in leaves for node in (function, *(below for below, _ in function.next_functions)))


def check_uses_seen(loss: Tensor, parameters: Mapping[str, Tensor], reports: Iterable[Tensor] = ()) -> None:
    """Refuse a loss that reaches parameters without passing a tap.

    Raises:
        RuntimeError: listing them, with the cure.
    """
    unseen = unseen_uses(loss, parameters, reports)
    if unseen:
        raise RuntimeError(
            f"the loss uses these parameters outside the model's layers, which no tap sees: {', '.join(unseen)}. A tied weight: apply it inside the "
            "model's forward. A penalty on the weights: use the optimizer's weight_decay, or add its gradient after backward()"
        )
