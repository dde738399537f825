"""Tracing of parameters that no layer of their own uses: class tokens, position tables, layer scales, weights used functionally.

While the model's forward pass runs, a torch function mode watches the operations. What is computed from traced parameters alone (a slice of a
position table, −exp(A), a look-up by positions) is remembered as a recipe. The operation in which it first meets samples gets a tap; in backward only that
operation and the recipe are run again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.grad_sample.factors import Dense, Factor
from adabatch.grad_sample.per_sample import per_sample_grads

# Operations that repeat a tensor for every sample: the result has a batch dimension, but all its rows are one.
EXPANDING = ("expand", "expand_as", "repeat", "broadcast_to", "repeat_interleave", "tile")
# The backward formula of these reads their result, so it must not be marked as changed in place; they get a copy.
READS_OUTPUT = (
    *("exp", "expm1", "sigmoid", "tanh", "softmax", "log_softmax", "logsumexp", "sqrt", "rsqrt", "reciprocal", "pow", "relu", "elu", "prod", "cumprod"),
    *("baddbmm", "scaled_dot_product_attention", "normalize"),
)
IN_PLACE_OPERATORS = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__")


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

    def run(self, parameters: dict[str, Tensor], done: dict[int, Any]) -> Tensor:
        """The tensor, from these parameters; `done` keeps what was worked out already."""
        if self.function is None:
            return parameters[self.name]
        key = id(self.spec)
        if key not in done:
            leaves = [leaf.run(parameters, done) if isinstance(leaf, Recipe) else leaf for leaf in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.spec.tree)
            done[key] = self.function(*args, **kwargs)
        result = done[key]
        return result if self.index is None else tree_flatten(result)[0][self.index]


@dataclass(frozen=True, eq=False)
class _Spec:
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


class ParameterTracer(TorchFunctionMode):
    """Watches the operations of a forward pass for traced parameters.

    Args:
        traced: {parameter name: parameter}.
        n_samples: N.
        inputs: of the model; its tensors with N rows are the samples, and what is computed from them carries them.
        tap: called as tap(consumption, outputs) with the operation's output tensors; returns them tapped.

    Attributes:
        suspended: while above 0 nothing is watched (a layer with a tap of its own runs).
    """

    def __init__(self, traced: dict[str, Tensor], n_samples: int, inputs: Sequence[Any], tap: Callable[[Consumption, list[Tensor]], list[Tensor]]):
        super().__init__()
        self._sampled: dict[int, weakref.ref[Tensor]] = {}
        self.add_samples([leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == n_samples])
        self._parameters, self._n_samples, self._tap = traced, n_samples, tap
        self.suspended = 0
        self._recipes: dict[int, tuple[Recipe, Tensor]] = {}
        for name, parameter in traced.items():
            self._recipes[id(parameter)] = (Recipe(None, (), None, None, frozenset((name,)), tuple(parameter.shape), name=name), parameter)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.suspended:
            return function(*args, **kwargs)
        values = list(_flat((*args, *kwargs.values())))
        if torch.is_grad_enabled() and any(id(value) in self._recipes for value in values):
            return self._traced(function, args, kwargs)
        output = function(*args, **kwargs)
        if any(self.comes_from_samples(value) for value in values):
            self.add_samples([output] if isinstance(output, Tensor) else _flat(output) if isinstance(output, (list, tuple)) else [])
        return output

    def comes_from_samples(self, value: Any) -> bool:
        """Whether a tensor was computed from the samples."""
        reference = self._sampled.get(id(value))
        return reference is not None and reference() is value

    def add_samples(self, values: Iterable[Any]) -> None:
        """Note that these tensors come from the samples."""
        for value in values:
            if isinstance(value, Tensor):
                self._sampled[id(value)] = weakref.ref(value)

    def _traced(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        function, in_place = _out_of_place(function, args)
        leaves, tree = tree_flatten((args, kwargs))
        found = [self._recipes[id(leaf)][0] if id(leaf) in self._recipes else leaf for leaf in leaves]
        samples = self._batched(function, found)
        output = function(*args, **kwargs)
        outputs, out_tree = tree_flatten(output)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in outputs):
            return output
        if any(samples):
            tapped = iter(self._tap(self._consumption(function, found, tree, samples), [leaf for leaf in outputs if isinstance(leaf, Tensor)]))
            outputs = [next(tapped) if isinstance(leaf, Tensor) else leaf for leaf in outputs]
            self.add_samples(outputs)
            result = tree_unflatten(outputs, out_tree)
        else:
            self._remember(function, found, tree, outputs)
            result = output
        return self._write_back(args[0], result) if in_place else result

    def _write_back(self, target: Tensor, result: Tensor) -> Tensor:
        """What an in-place operation on `target` leaves there; the target itself stays the result, as the caller expects."""
        recipe = self._recipes.get(id(result))
        with torch._C.DisableTorchFunction():
            target.copy_(result)
        if recipe is not None:
            self._recipes[id(target)] = (recipe[0], target)
        else:
            self.add_samples([target])
        return target

    def _batched(self, function: Callable, leaves: list[Any]) -> list[bool]:
        """Which of an operation's inputs carry samples along their first dimension.

        Raises:
            RuntimeError: an input carries samples elsewhere.
        """
        batched = [self.comes_from_samples(leaf) and leaf.dim() > 0 and leaf.shape[0] == self._n_samples for leaf in leaves]
        for leaf, each in zip(leaves, batched, strict=True):
            if isinstance(leaf, Tensor) and not each and self._hides_samples(leaf):
                names = sorted(frozenset().union(*(other.parameters for other in leaves if isinstance(other, Recipe))))
                raise RuntimeError(
                    f"{', '.join(names)} meets activations of shape {tuple(leaf.shape)} in {getattr(function, '__name__', 'an operation')}: in a batch of "
                    f"{self._n_samples} their samples do not lie along the first dimension, so they cannot be told apart. Give the module a rule with "
                    "register_grad_sampler, or pass ignore=[...]"
                )
        widest = max((leaf.dim() for leaf, each in zip(leaves, batched, strict=True) if each), default=0)
        # A tensor made for the batch, zeros for instance, has as many dimensions as the samples it meets; a table of N positions has fewer.
        made = [widest and isinstance(leaf, Tensor) and leaf.dim() >= widest and leaf.shape[0] == self._n_samples for leaf in leaves]
        return [bool(each or other) for each, other in zip(batched, made, strict=True)]

    def _hides_samples(self, leaf: Tensor) -> bool:
        if leaf.requires_grad:
            return True
        return self.comes_from_samples(leaf) and leaf.dim() > 0 and leaf.shape[0] > 0 and leaf.shape[0] % self._n_samples == 0

    def _remember(self, function: Callable, leaves: list[Any], tree: Any, outputs: list[Any]) -> None:
        parents = [leaf for leaf in leaves if isinstance(leaf, Recipe)]
        names = frozenset().union(*(parent.parameters for parent in parents))
        stretched = any(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self._n_samples and leaf.stride(0) == 0 for leaf in leaves)
        grown = stretched or any(parent.expanded for parent in parents) or getattr(function, "__name__", "") in EXPANDING
        spec = _Spec(tree)
        kept = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                expanded = grown and tensor.dim() > 0 and tensor.shape[0] == self._n_samples
                self._recipes[id(tensor)] = (Recipe(function, kept, spec, index, names, tuple(tensor.shape), expanded), tensor)

    def _consumption(self, function: Callable, leaves: list[Any], tree: Any, samples: list[bool]) -> Consumption:
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = frozenset().union(*(leaf.parameters for leaf in leaves if isinstance(leaf, Recipe)))
        widest = max(leaf.dim() for leaf, each in zip(leaves, samples, strict=True) if each)
        per_sample = {
            index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Recipe) and len(leaf.shape) >= widest and leaf.shape[0] == self._n_samples
        }
        return Consumption(
            name=f"{getattr(function, '__name__', 'operation')} of {', '.join(sorted(names))}",
            function=function,
            leaves=[None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            tree=tree_flatten(tree_unflatten(list(range(len(leaves))), tree))[1],
            tensors=[leaves[index].detach() for index in positions],
            batched=[samples[index] for index in positions],
            positions=positions,
            parameters={name: self._parameters[name] for name in sorted(names)},
            aligned=frozenset(index for index, leaf in per_sample.items() if leaf.expanded),
            may_align=frozenset(per_sample),
        )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, with those of lists and tuples among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _out_of_place(function: Callable, args: tuple) -> tuple[Callable, bool]:
    """The function that gives an in-place operation's result as a new tensor, and whether it was one."""
    name = getattr(function, "__name__", "")
    if name in IN_PLACE_OPERATORS:
        return getattr(Tensor, name.replace("__i", "__", 1)), True
    if name.endswith("_") and not name.startswith("_") and args and hasattr(Tensor, name[:-1]) and getattr(Tensor, name, None) is function:
        return getattr(Tensor, name[:-1]), True
    return function, False
