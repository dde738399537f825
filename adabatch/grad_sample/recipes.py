"""How tensors come from parameters alone, and the operations in which they meet samples: what must be kept to run both again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.grad_sample.factors import Dense, Factor
from adabatch.grad_sample.per_sample import per_sample_grads


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor comes from parameters alone: run() works it out again from given parameters. `expanded`: it has a row for every sample."""

    function: Callable[..., Any] | None
    leaves: tuple[Any, ...]
    spec: Any
    index: int | None
    parameters: frozenset[str]
    shape: tuple[int, ...]
    expanded: bool = False
    name: str = ""
    versions: tuple[int, ...] = ()

    def run(self, parameters: dict[str, Tensor], done: dict[int, Any]) -> Tensor:
        """The tensor, from these parameters; `done` keeps what was worked out already."""
        if self.function is None:
            return parameters[self.name]
        key = id(self.spec)
        if key not in done:
            self._check_versions()
            leaves = [leaf.run(parameters, done) if isinstance(leaf, Recipe) else leaf for leaf in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.spec.tree)
            done[key] = self.function(*args, **kwargs)
        result = done[key]
        return result if self.index is None else tree_flatten(result)[0][self.index]

    def _check_versions(self) -> None:
        if self.versions != versions_of(self.leaves):
            raise RuntimeError(
                f"a tensor that {', '.join(sorted(self.parameters))} was combined with has changed in place since: its per-sample gradients cannot be "
                "worked out again. Change it after the backward pass, or combine the parameter with a clone of it"
            )


@dataclass(frozen=True, eq=False)
class Spec:
    """The structure of an operation's arguments; its identity names the operation."""

    tree: Any


@dataclass(eq=False)
class Consumption:
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
        leaves = [leaf.run(parameters, done) if isinstance(leaf, Recipe) else leaf for leaf in self.leaves]
        for position in self.aligned:
            leaves[position] = leaves[position].index_select(0, row)
        for position, value in zip(self.positions, inputs, strict=True):
            leaves[position] = value
        args, kwargs = tree_unflatten(leaves, self.tree)
        return tree_flatten(self.function(*args, **kwargs))[0]


def itself(tensor: Tensor) -> Tensor:
    """The operation of `ParameterTracer.tap_rows`."""
    return tensor


def versions_of(leaves: Iterable[Any]) -> tuple[int, ...]:
    """How often each tensor among them was changed in place."""
    return tuple(leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference())
