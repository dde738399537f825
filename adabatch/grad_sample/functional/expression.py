"""How tensors come from parameters alone: what must be kept of the operations that made them to run them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True, eq=False)
class ParameterExpression:
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
            leaves = [leaf.run(parameters, done) if isinstance(leaf, ParameterExpression) else leaf for leaf in self.leaves]
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


def versions_of(leaves: Iterable[Any]) -> tuple[int, ...]:
    """How often each tensor among them was changed in place."""
    return tuple(leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference())
