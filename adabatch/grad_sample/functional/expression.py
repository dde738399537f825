"""How tensors are computed from parameters alone: what must be kept to compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Operation = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Leaves = list[Any]


@dataclass(frozen=True, eq=False)
class Spec:
    """The structure of an operation's arguments; its identity names the operation."""

    tree: TreeSpec


@dataclass(frozen=True, eq=False)
class ParameterExpression:
    """How a tensor is computed from parameters alone; run() computes it from given parameters.

    Attributes:
        function, leaves, spec, index: the operation, its flattened arguments with their structure,
            and which of its outputs this is; no function for a parameter itself.
        parameters: names of all it depends on.
        shape: of the tensor.
        expanded: it has a row for every sample.
        name: of a parameter itself.
        versions: of the tensors among the leaves.
    """

    function: Operation | None
    leaves: Args
    spec: Spec
    index: int | None
    parameters: frozenset[str]
    shape: tuple[int, ...]
    expanded: bool = False
    name: str = ""
    versions: tuple[int, ...] = ()

    @classmethod
    def of_parameter(cls, name: str, parameter: Tensor) -> ParameterExpression:
        """A parameter itself."""
        shape = tuple(parameter.shape)
        return cls(None, (), Spec(tree_flatten(())[1]), None, frozenset((name,)), shape, name=name)

    def run(self, parameters: dict[str, Tensor], done: dict[int, Any]) -> Tensor:
        """The tensor, from these parameters; `done` keeps what was computed already."""
        if self.function is None:
            return parameters[self.name]
        key = id(self.spec)
        if key not in done:
            if self.versions != versions_of(self.leaves):
                raise RuntimeError(
                    f"a tensor that {', '.join(sorted(self.parameters))} was combined with has "
                    "changed in place since: its per-sample gradients cannot be computed again. "
                    "Change it after the backward pass, or combine the parameter with a clone of it"
                )
            leaves = [leaf.run(parameters, done) if isinstance(leaf, ParameterExpression) else leaf
                      for leaf in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.spec.tree)
            done[key] = self.function(*args, **kwargs)
        result = done[key]
        return result if self.index is None else tree_flatten(result)[0][self.index]


def names_of(leaves: Iterable[Any]) -> frozenset[str]:
    """The parameters that the expressions among them depend on."""
    expressions = [leaf for leaf in leaves if isinstance(leaf, ParameterExpression)]
    return frozenset().union(*(each.parameters for each in expressions))


def versions_of(leaves: Iterable[Any]) -> tuple[int, ...]:
    """How often each tensor among them was changed in place."""
    return tuple(leaf._version for leaf in leaves
                 if isinstance(leaf, Tensor) and not leaf.is_inference())
