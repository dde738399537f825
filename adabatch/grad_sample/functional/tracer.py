"""Tracing of parameters that no layer of their own uses: class tokens, position tables, layer scales, weights used functionally.

While the model's forward pass runs, a torch function mode watches the operations. What is computed from traced parameters alone (a slice of a
position table, −exp(A), a look-up by positions) is remembered as a recipe. The operation in which it first meets samples gets a tap; in backward only that
operation and the recipe are run again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.grad_sample.functional.expression import ParameterExpression, Spec, versions_of
from adabatch.grad_sample.functional.traced_op import TracedOp, itself

# Operations that repeat a tensor for every sample: the result has a batch dimension, but all its rows are one.
EXPANDING = ("expand", "expand_as", "repeat", "broadcast_to", "repeat_interleave", "tile")
# The backward formula of these reads their result, so it must not be marked as changed in place; they get a copy.
READS_OUTPUT = (
    *("exp", "expm1", "sigmoid", "tanh", "softmax", "log_softmax", "logsumexp", "sqrt", "rsqrt", "reciprocal", "pow", "relu", "elu", "prod", "cumprod"),
    *("baddbmm", "scaled_dot_product_attention", "normalize"),
)
# Their derivative with respect to the parameters does not depend on the samples' values, which may then change in place, as they may for autograd.
ADDING = ("add", "sub", "rsub", "cat", "concat", "stack", "with_item")
IN_PLACE_OPERATORS = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__")


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

    def __init__(self, traced: dict[str, Tensor], n_samples: int, inputs: Sequence[Any], tap: Callable[[TracedOp, list[Tensor]], list[Tensor]]):
        super().__init__()
        self._sampled: dict[int, weakref.ref[Tensor]] = {}
        self.add_samples([leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == n_samples])
        self._parameters, self._n_samples, self._tap = traced, n_samples, tap
        self.suspended = 0
        self._recipes: dict[int, tuple[ParameterExpression, Tensor]] = {}
        for name, parameter in traced.items():
            self._recipes[id(parameter)] = (ParameterExpression(None, (), None, None, frozenset((name,)), tuple(parameter.shape), name=name), parameter)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or self.suspended:  # asked in this order, so that a compiled part of the model depends on nothing of ours
            return function(*args, **kwargs)
        if torch.is_grad_enabled() and _draws(function, args, kwargs):
            args, kwargs = self._spread(args, kwargs)
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

    def recipe_of(self, value: Any) -> ParameterExpression | None:
        """How a tensor was computed from parameters alone, or None if it was not."""
        return self._recipes[id(value)][0] if id(value) in self._recipes else None

    def tap_rows(self, value: Tensor, dim: int) -> Tensor:
        """A tensor of parameters alone that has a row for every sample along a dimension, a learned initial state for instance, with these rows tapped."""
        recipe = self._recipes[id(value)][0]
        rows = ParameterExpression(torch.transpose, (recipe, 0, dim), Spec(tree_flatten(((recipe, 0, dim), {}))[1]), None, recipe.parameters, ())
        names = ", ".join(sorted(recipe.parameters))
        parameters = {name: self._parameters[name] for name in sorted(recipe.parameters)}
        everywhere = frozenset((0,))
        consumption = TracedOp(f"rows of {names}", itself, [rows], tree_flatten(((rows,), {}))[1], [], [], [], parameters, everywhere, everywhere)
        return self._tap(consumption, [value.transpose(0, dim)])[0].transpose(0, dim)

    def _spread(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of attention with dropout, which cannot be run again: what is the same for all samples gets a tapped row for each before."""
        leaves, tree = tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            recipe = self.recipe_of(leaf)
            if recipe is None:
                continue
            if not recipe.expanded and leaf.dim() == 4 and leaf.shape[0] == 1:
                sizes = (self._n_samples, -1, -1, -1)
                leaf = leaf.expand(sizes)
                self._remember(Tensor.expand, [recipe, *sizes], tree_flatten(((recipe, *sizes), {}))[1], [leaf])
            if self.recipe_of(leaf).expanded:
                leaves[index] = self.tap_rows(leaf, 0)
                self.add_samples(leaves[index : index + 1])
        return tree_unflatten(leaves, tree)

    def _traced(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        function, in_place = _out_of_place(function, args)
        original = args[0] if in_place else None
        if in_place and not (_adds(function) and self.comes_from_samples(original)):  # what is overwritten is read again: by autograd, or by a recipe
            with torch._C.DisableTorchFunction():
                args = (args[0].clone() if id(args[0]) not in self._recipes else args[0], *args[1:])
            if self.comes_from_samples(original):
                self.add_samples([args[0]])
        leaves, tree = tree_flatten((args, kwargs))
        found = [self._recipes[id(leaf)][0] if id(leaf) in self._recipes else leaf for leaf in leaves]
        samples = self._batched(function, found)
        if any(samples) and function is _with_item and not _is_written_to_all_samples(*args[:2]):
            raise RuntimeError("a tensor computed from parameters is written to chosen samples only: write to all, by tensor[:, index] = value or torch.where")
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
        return self._write_back(original, result) if in_place else result

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
        # What has a gradient and no recipe may come out of a compiled function or a torch.autograd.Function, which are not seen.
        known = [self.comes_from_samples(leaf) or (isinstance(leaf, Tensor) and leaf.requires_grad) for leaf in leaves]
        batched = [each and leaf.dim() > 0 and leaf.shape[0] == self._n_samples for leaf, each in zip(leaves, known, strict=True)]
        for leaf, each in zip(leaves, batched, strict=True):
            if isinstance(leaf, Tensor) and not each and self._hides_samples(leaf):
                names = sorted(frozenset().union(*(other.parameters for other in leaves if isinstance(other, ParameterExpression))))
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
        parents = [leaf for leaf in leaves if isinstance(leaf, ParameterExpression)]
        names = frozenset().union(*(parent.parameters for parent in parents))
        stretched = any(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self._n_samples and leaf.stride(0) == 0 for leaf in leaves)
        repeated = len(parents) == self._n_samples and len(set(map(id, parents))) == 1  # torch.stack([token] * N)
        grown = stretched or repeated or any(parent.expanded for parent in parents) or getattr(function, "__name__", "") in EXPANDING
        spec = Spec(tree)
        kept = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                expanded = grown and tensor.dim() > 0 and tensor.shape[0] == self._n_samples
                self._recipes[id(tensor)] = (ParameterExpression(function, kept, spec, index, names, tuple(tensor.shape), expanded, versions=versions_of(kept)), tensor)

    def _consumption(self, function: Callable, leaves: list[Any], tree: Any, samples: list[bool]) -> TracedOp:
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = frozenset().union(*(leaf.parameters for leaf in leaves if isinstance(leaf, ParameterExpression)))
        widest = max(leaf.dim() for leaf, each in zip(leaves, samples, strict=True) if each)
        per_sample = {
            index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, ParameterExpression) and len(leaf.shape) >= widest and leaf.shape[0] == self._n_samples
        }
        return TracedOp(
            name=f"{getattr(function, '__name__', 'operation')} of {', '.join(sorted(names))}",
            function=function,
            leaves=[None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            tree=tree_flatten(tree_unflatten(list(range(len(leaves))), tree))[1],
            tensors=[_kept(leaves[index].detach(), function) for index in positions],
            batched=[samples[index] for index in positions],
            positions=positions,
            parameters={name: self._parameters[name] for name in sorted(names)},
            aligned=frozenset(index for index, leaf in per_sample.items() if leaf.expanded),
            may_align=frozenset(per_sample),
        )


def _draws(function: Callable, args: tuple, kwargs: dict) -> bool:
    if getattr(function, "__name__", "") != "scaled_dot_product_attention":
        return False
    return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))


def _adds(function: Callable) -> bool:
    name = getattr(function, "__name__", "").strip("_")
    return name in ADDING or name.removeprefix("r") in ADDING


def _kept(tensor: Tensor, function: Callable) -> Tensor:
    """What is kept of an operation's input: a stand-in where its values do not matter."""
    return tensor.new_zeros(()).expand(tensor.shape) if tensor.is_floating_point() and _adds(function) else tensor


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, with those of lists and tuples among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """What tensor[index] = value leaves, as a new tensor."""
    result = tensor.clone()
    result[index] = value
    return result


def _is_written_to_all_samples(tensor: Tensor, index: Any) -> bool:
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, Tensor):
        return first.dtype is torch.bool and first.shape[:1] == tensor.shape[:1]
    return first is Ellipsis or first == slice(None)


def _out_of_place(function: Callable, args: tuple) -> tuple[Callable, bool]:
    """The function that gives an in-place operation's result as a new tensor, and whether it was one."""
    name = getattr(function, "__name__", "")
    if name == "__setitem__":
        return _with_item, True
    if name in IN_PLACE_OPERATORS:
        return getattr(Tensor, name.replace("__i", "__", 1)), True
    if name.endswith("_") and not name.startswith("_") and args and hasattr(Tensor, name[:-1]) and getattr(Tensor, name, None) is function:
        return getattr(Tensor, name[:-1]), True
    return function, False
