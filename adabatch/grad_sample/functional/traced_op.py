"""The operations in which what comes from parameters alone meets samples: what must be kept to run them again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.functional.expression import ParameterExpression
from adabatch.grad_sample.functional.linear_expressions import direct_grads
from adabatch.grad_sample.layers.per_sample import per_sample_grads


@dataclass(eq=False)
class TracedOp:
    """An operation in which traced parameters meet samples; answers factors(tensors, backprops, rows) like a call of a layer.

    What comes from parameters alone may have a row for every sample (a class token expanded, token types looked up for the batch) or be the same for all (a
    weight). `aligned` are the places of those with a row each; `may_align` of those that have the shape for it, tried if the operation does not work without.
    """

    name: str
    function: Callable[..., Any]
    leaves: list[Any]
    tree: Any
    tensors: list[Tensor]
    batched: list[bool]
    positions: list[int]
    parameters: dict[str, Tensor]
    aligned: frozenset[int]
    may_align: frozenset[int]

    def factors(self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None) -> dict[str, Factor]:
        """Per-sample gradients of the traced parameters through this operation, by parameter name."""
        grads = direct_grads(self, tensors, backprops, rows)
        if grads is not None:
            return {name: Dense(grad) for name, grad in grads.items()}
        n_samples = backprops[0].shape[0]
        rows = torch.arange(n_samples, device=backprops[0].device) if rows is None else rows
        picked = [tensor.index_select(0, rows) if each else tensor for tensor, each in zip(tensors, self.batched, strict=True)]
        inputs, batched = [rows, *picked], [True, *self.batched]
        outer = [grad.index_select(0, rows) for grad in backprops]
        try:
            grads = per_sample_grads(self._run, self.parameters, inputs, batched, outer, self.name)
        except RuntimeError:
            if self.aligned >= self.may_align:
                raise
            self.aligned = self.may_align
            grads = per_sample_grads(self._run, self.parameters, inputs, batched, outer, self.name)
        return {name: Dense(grad) for name, grad in grads.items()}

    def _run(self, parameters: dict[str, Tensor], row: Tensor, *inputs: Tensor) -> list[Tensor]:
        done: dict[int, Any] = {}
        leaves = [leaf.run(parameters, done) if isinstance(leaf, ParameterExpression) else leaf for leaf in self.leaves]
        for position in self.aligned:
            leaves[position] = leaves[position].index_select(0, row)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value
        args, kwargs = tree_unflatten(leaves, self.tree)
        return tree_flatten(self.function(*args, **kwargs))[0]


def itself(tensor: Tensor) -> Tensor:
    """The operation of `ParameterTracer.tap_rows`."""
    return tensor
