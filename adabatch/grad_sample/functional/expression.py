"""How tensors are computed from parameters alone: what must be kept to compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adabatch._types import Args

Operation = Callable[..., Any]
Leaf: TypeAlias = Any  # of an operation's arguments or result: a tensor, expression, constant
Leaves = list[Leaf]
Results = dict[int, object]  # of operations, by the id of their leaves
NOTHING = tree_flatten(())[1]


@dataclass(frozen=True, eq=False)
class ParameterExpression:
    """How a tensor is computed from parameters alone.

    Attributes:
        function, leaves, tree, index: the operation, its flattened arguments with their structure,
            and which of its outputs this is; no function for a parameter itself.
        parameters: names of all it depends on.
        expanded: it has a row for every sample.
        name: of a parameter itself.
        versions: of the tensors among the leaves.
    """

    function: Operation | None
    leaves: Args
    tree: TreeSpec
    index: int
    parameters: frozenset[str]
    shape: tuple[int, ...]
    expanded: bool = False
    name: str = ""
    versions: tuple[int, ...] = ()

    @classmethod
    def of_parameter(cls, name: str, parameter: Tensor) -> ParameterExpression:
        shape = tuple(parameter.shape)
        return cls(None, (), NOTHING, 0, frozenset((name,)), shape, name=name)

    def run(self, parameters: dict[str, Tensor], done: Results) -> Tensor:
        """The tensor, from these parameters; `done` caches the operations' results."""
        if self.function is None:
            return parameters[self.name]
        key = id(self.leaves)  # which the outputs of one operation share
        if key not in done:
            if self.versions != versions_of(self.leaves):
                raise RuntimeError(
                    f"a tensor that {', '.join(sorted(self.parameters))} was combined with has "
                    "changed in place since: its per-sample gradients cannot be computed again. "
                    "Change it after the backward pass, or combine the parameter with a clone of it"
                )
            leaves = run_leaves(self.leaves, parameters, done)
            args, kwargs = tree_unflatten(leaves, self.tree)
            done[key] = self.function(*args, **kwargs)
        return tree_flatten(done[key])[0][self.index]


def run_leaves(leaves: Iterable[Leaf], parameters: dict[str, Tensor], done: Results) -> Leaves:
    """The leaves with the expressions among them computed."""
    return [leaf.run(parameters, done) if isinstance(leaf, ParameterExpression) else leaf
            for leaf in leaves]


def names_of(leaves: Iterable[object]) -> frozenset[str]:
    """The parameters that the expressions among them depend on."""
    expressions = [leaf for leaf in leaves if isinstance(leaf, ParameterExpression)]
    return frozenset().union(*(each.parameters for each in expressions))


def versions_of(leaves: Iterable[object]) -> tuple[int, ...]:
    """How often each tensor among them was changed in place."""
    return tuple(leaf._version for leaf in leaves
                 if isinstance(leaf, Tensor) and not leaf.is_inference())


def function_name(function: Operation | None) -> str:
    """The name of an operation, "" where it has none: torch.Tensor.add_ is "add_"."""
    return getattr(function, "__name__", "")
