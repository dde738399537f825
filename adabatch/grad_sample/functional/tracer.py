"""Tracing of parameters that no layer with a tap uses: class tokens, position tables, layer scales.

A torch function mode watches the operations of the forward pass. What is computed from traced
parameters alone (a slice of a position table, −exp(A)) is remembered as an expression. The
operation in which it first meets samples gets a tap; in backward only that operation and the
expression are run again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode,
)
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adabatch._types import Args, Inputs, Kwargs
from adabatch.estimators.gradients import is_transformed
from adabatch.grad_sample.functional.expression import (
    Leaf, Leaves, Operation, ParameterExpression, function_name, names_of, versions_of,
)
from adabatch.grad_sample.functional.flow import (
    FLAT, ROW_BY_ROW, UNKNOWN, Key, SampleFlow, has_equal_rows, operation_name,
)
from adabatch.grad_sample.functional.rules import FLAT_RULES
from adabatch.grad_sample.functional.traced_op import TracedOp, identity
from adabatch.grad_sample.layers.generic import RecomputedCall, call_type, with_rows
from adabatch.grad_sample.layout import Layout

# They repeat a tensor: the result may have a row for every sample, but all rows are the same.
EXPANDING = ("expand", "expand_as", "repeat", "broadcast_to", "repeat_interleave", "tile")
# Autograd nodes whose backward formula reads inputs only. That of any other may read its result,
# which must not change in place then: the tap copies it.
READS_INPUTS_ONLY = frozenset((
    "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Sum", "Mean", "Mm", "Bmm", "Addmm", "Addbmm", "Mv",
    "Dot", "Addmv", "Linear", "UnsafeView", "Convolution", "MkldnnConvolution", "Embedding", "Cat",
    "Stack", "Where", "Index", "IndexSelect", "Gather", "NativeLayerNorm", "Copy", "Clone",
))
# Their derivative does not depend on the samples' values, which may then change in place.
ADDING = ("add", "sub", "rsub", "cat", "concat", "stack", "with_item")
IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"))
RULE_OR_IGNORE = "Give the module a rule with register_grad_sampler, or pass ignore=[...]."

# They give no tensor.
ATTRIBUTES: frozenset[object] = frozenset((
    *(vars(torch._C.TensorBase)[name].__get__
      for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim")),
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_floating_point,
    Tensor.is_contiguous, Tensor.is_complex, Tensor.__len__))
is_compiling = torch.compiler.is_compiling

Tap = Callable[[TracedOp, list[Tensor], list[bool]], Sequence[Tensor]]


class CannotTrace(RuntimeError):
    """Samples cannot be told apart in an operation with parameters."""


class ParameterTracer(TorchFunctionMode):
    """Watches the operations of a forward pass for traced parameters.

    Args:
        traced: {parameter name: parameter}.
        flow: of the samples, as far as the model's inputs show it.
        tap: tap(operation, outputs, copied) returns the output tensors tapped, as a copy where
            `copied` says so.
        settled: names of the layers whose layout is known from adabatch.check.

    Attributes:
        carries: {number of a tensor that the last layer was called with: whether it carries
            samples}, where it has no rule and several of them, as far as that is known.
        unsettled: {role: size} of the others, which are taken for samples if the layer then gives
            what it gave for the batch.
        unclear: a layer has its batch along another dimension than N was read from.
    """

    def __init__(
        self, traced: dict[str, Tensor], flow: SampleFlow, tap: Tap,
        settled: Collection[str] = (),
    ):
        super().__init__()
        self._flow, self._settled = flow, settled
        self._parameters, self._n_samples, self._tap = traced, flow.n_samples, tap
        self._layer_roles: list[tuple[nn.Module, Layout, frozenset[Key], bool]] = []
        self.carries: dict[int, bool] = {}
        self.unsettled: dict[Key, int] = {}
        self.unclear = False
        self._suspended = 0  # above 0 nothing is watched: a layer with a tap runs
        self._suspending: list[bool] = []
        self._expressions: dict[int, tuple[ParameterExpression, Tensor]] = {
            id(parameter): (ParameterExpression.of_parameter(name, parameter), parameter)
            for name, parameter in traced.items()
        }

    def leave(self) -> None:
        """Take the mode off, from under others that were entered after it."""
        if all(mode is not self for mode in _get_current_function_mode_stack()):
            return
        above: list[TorchFunctionMode] = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    @property
    def inside_layer(self) -> bool:
        """Whether a measured layer runs."""
        return bool(self._suspending)

    @property
    def leaves_layer_to_tap(self) -> bool:
        """Whether the innermost measured layer that runs is not watched."""
        return self._suspending[-1:] == [True]

    def enter_layer(
        self, name: str, layer: nn.Module, layout: Layout, has_rule: bool, args: Args,
        kwargs: Kwargs,
    ) -> Inputs | None:
        """Before a measured layer: stop watching if it is called with samples, which its tap
        measures; else tracing continues through the layer.

        Returns:
            (args, kwargs) with tapped rows in place of tensors computed from parameters alone that
            have a row for every sample; None where nothing changes.

        Raises:
            RuntimeError: such a tensor has no row for every sample, and the layer is not watched.
        """
        if is_transformed():
            self._suspending.append(False)
            return None
        single = not kwargs and len(args) == 1 and type(args[0]) is Tensor
        leaves = [*args] if single else tree_flatten((args, kwargs))[0]
        self.carries, self.unsettled = {}, {}
        traced = [] if self._suspended else [
            index for index, leaf in enumerate(leaves) if id(leaf) in self._expressions]
        dims = {index: self._row_dim(name, layer, layout, leaves[index], index)
                for index in traced}
        roles: frozenset[Key] | None = frozenset()
        if not traced and not self._suspended:
            with torch._C.DisableTorchFunction():
                roles = self._layer_inputs(name, layer, layout, has_rule, leaves)
        suspends = None not in dims.values() and roles is not None
        if suspends and not self._suspended and not has_rule and (
                layout is Layout.BATCH_FIRST and name not in self._settled):
            with torch._C.DisableTorchFunction():
                self._settle_inputs(name, layer, leaves)
        self._suspending.append(suspends)
        self._suspended += suspends
        if suspends:
            flat = any(flow is not None and flow.dim == FLAT for flow in map(self._flow.of, leaves))
            self._layer_roles.append((layer, layout, roles or frozenset(), flat))
        if not suspends or not traced:
            return None
        for index, dim in dims.items():
            leaves[index] = self._tap_rows(leaves[index], dim or 0)
        return tree_unflatten(leaves, tree_flatten((args, kwargs))[1])

    def leave_layer(self) -> bool:
        """After the layer: whether it was called with samples; then call resume()."""
        return self._suspending.pop() if self._suspending else True

    def resume(self, output: object) -> None:
        """Watch again, after a layer with this output."""
        if self._suspended:
            self._suspended -= 1
            layer, layout, roles, flat = self._layer_roles.pop()
            call = call_type(layer)
            outputs = [output] if type(output) is Tensor else tree_flatten(output)[0]
            with torch._C.DisableTorchFunction():
                for index, leaf in enumerate(outputs):
                    if isinstance(leaf, Tensor):
                        dim = int(layout is Layout.BATCH_SECOND)
                        dim = dim if call is RecomputedCall else call.samples_dim(layer, index)
                        flat_here = flat and not self._flow.has_rows(leaf)
                        self._flow.add(leaf, FLAT if flat_here else dim, roles)

    def _layer_inputs(
        self, name: str, layer: nn.Module, layout: Layout, has_rule: bool, leaves: Sequence[Leaf]
    ) -> frozenset[Key] | None:
        """None for a layer that is called without samples, as a position table is; else the roles
        that must carry samples for it to be called with them."""
        key = self._flow.roles.next_call(name)
        if layout is not Layout.BATCH_FIRST or name in self._settled:
            return None if layout is Layout.SHARED else frozenset()
        call = call_type(layer)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)][: 1 if has_rule else None]
        found = [(leaf, self._flow.of(leaf)) for leaf in inputs]
        for index, (leaf, flow) in enumerate(found[: call is not RecomputedCall]):
            dim = call.samples_dim(layer, index)
            if flow is not None and flow.dim >= 0 and flow.dim != dim < leaf.dim():
                self.unclear = True  # which are the samples, where there are as many time steps?
                if leaf.shape[dim] == self._n_samples:
                    self._flow.roles.leave_open(key)
        sure = [flow.roles for _, flow in found if flow is not None and (
            flow.dim == 0 or call is not RecomputedCall)]
        if sure:
            roles = min(sure, key=len)
            self._flow.roles.use(roles)
            return roles
        if call is not RecomputedCall:
            return frozenset()
        # Along which dimension, if any, the samples lie is not known.
        for leaf, flow in found:
            if not self._flow.has_rows(leaf):
                continue
            unclear = flow is not None or (
                leaf.is_floating_point() and not self._flow.is_constant(leaf))
            if unclear or has_equal_rows(leaf):  # or positions that were repeated for each sample
                carries = self._flow.roles.carries(key, self._n_samples)
                if carries is not False:
                    return frozenset() if carries else frozenset((key,))
        for leaf, flow in found:
            if flow is not None and flow.dim > 0 and not self._flow.has_rows(leaf):
                raise RuntimeError(
                    f"{name} ({type(layer).__name__}) is called with a tensor of shape "
                    f"{tuple(leaf.shape)} that has the {self._n_samples} samples along dimension "
                    f"{flow.dim}: without a layout they must lie along dimension 0. Find the "
                    f"layouts with adabatch.check(...).{self._flow.counted}")
        if any(flow is not None and not self._flow.has_rows(leaf) for leaf, flow in found):
            return frozenset()
        for leaf in inputs[:1]:
            if leaf.dim() and leaf.is_floating_point() and not self._flow.has_rows(leaf):
                self._flow.roles.carries(key, leaf.shape[0])
        return None

    def _settle_inputs(self, name: str, layer: nn.Module, leaves: Sequence[Leaf]) -> None:
        """Find which of several inputs carry samples: a table may be as long as the batch."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) < 2 or call_type(layer) is not RecomputedCall:
            return
        flow, (_, number) = self._flow, self._flow.roles.next_call(f"inputs of {name}")
        for index, leaf in enumerate(tensors):
            found, key = flow.of(leaf), (f"input {index + 1} of {name}", number)
            carries: bool | None = True
            if not flow.has_rows(leaf):
                carries = flow.roles.carries(key, leaf.shape[0]) if leaf.dim() else False
            elif has_equal_rows(leaf):  # positions that were repeated for each sample
                continue
            elif flow.is_constant(leaf):
                carries = False
            elif (found is None or found.roles or found.dim != 0) and (
                    id(leaf) not in self._expressions):
                carries = flow.roles.carries(key, self._n_samples, opens=False)
            if carries is None:
                self.unsettled[key] = self._n_samples
            else:
                self.carries[index] = carries

    def _row_dim(
        self, name: str, layer: nn.Module, layout: Layout, tensor: Tensor, index: int
    ) -> int | None:
        """The dimension along which the layer's input number `index`, computed from parameters
        alone, has a row for every sample; None if there is none."""
        call, dim = call_type(layer), int(layout is Layout.BATCH_SECOND)
        whole = call is not RecomputedCall
        if whole:
            dim = call.samples_dim(layer, index)
        fits = tuple(tensor.shape[dim : dim + 1]) == (self._n_samples,)
        if not whole and not dim and self._expressions[id(tensor)][0].expanded:
            key, size = self._flow.roles.next_call(name), tensor.shape[0]
            return dim if self._flow.roles.carries(key, size, opens=False) is not False else None
        if fits and (whole or dim):
            return dim
        if whole:
            raise RuntimeError(
                f"{name} is given a tensor of shape {tuple(tensor.shape)} that was computed from "
                f"parameters alone and has no row for each of the {self._n_samples} samples: "
                "expand it to the batch, or pass ignore=[...]")
        return None

    def __torch_function__(
        self, function: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Leaf:
        kwargs = kwargs or {}
        # In this order, so that compiled submodules depend on nothing of ours.
        if is_compiling() or self._suspended or function in ATTRIBUTES or is_transformed():
            return function(*args, **kwargs)
        if torch.is_grad_enabled() and _draws(function, args, kwargs):
            args, kwargs = self._spread(args, kwargs)
        values = list(flat_values((*args, *kwargs.values())))
        if torch.is_grad_enabled() and any(id(value) in self._expressions for value in values):
            return self._traced(function, args, kwargs)
        output = function(*args, **kwargs)
        kind = type(output)
        if kind is Tensor or kind is nn.Parameter:
            self._flow.follow(operation_name(function), args, kwargs, values, (output,))
        elif function is Tensor.__setitem__ or (
            isinstance(output, (Tensor, tuple, list)) and kind is not torch.Size
        ):
            outputs = list(flat_values((output,)))
            self._flow.follow(operation_name(function), args, kwargs, values, outputs)
        return output

    def _has_rows(self, leaf: object) -> bool:
        return self._flow.has_rows(leaf)

    def _comes_from_samples(self, value: object) -> bool:
        return self._flow.of(value) is not None

    def _add_samples(
        self, values: Iterable[object], roles: frozenset[Key] = frozenset(), dim: int = 0
    ) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._flow.add(value, dim, roles)

    def _tap_rows(self, value: Tensor, dim: int) -> Tensor:
        """A tensor computed from parameters alone (a learned initial state) with its rows, one for
        each sample along `dim`, tapped."""
        own = self._expressions[id(value)][0]
        tree = tree_flatten(((own, 0, dim), {}))[1]
        rows = ParameterExpression(torch.transpose, (own, 0, dim), tree, 0, own.parameters, ())
        names, every = sorted(own.parameters), frozenset((0,))
        operation = TracedOp(
            f"rows of {', '.join(names)}", identity, [rows], tree_flatten(((rows,), {}))[1],
            [], [], [], {name: self._parameters[name] for name in names}, every, every,
            self._n_samples)
        return self._tap_outputs(operation, [value.transpose(0, dim)])[0].transpose(0, dim)

    def _tap_outputs(self, operation: TracedOp, outputs: list[Tensor]) -> Sequence[Tensor]:
        positions = outputs[0].shape[0] // max(1, self._n_samples) if operation.flat else 1
        rows = self._n_samples * positions
        wrong = [tuple(output.shape) for output in outputs if output.shape[:1] != (rows,)]
        if wrong and self._flow.roles.open:
            return outputs  # this pass is not measured
        if wrong:
            raise CannotTrace(
                f"{operation.name} gives an output of shape {wrong[0]} in a batch of "
                f"{self._n_samples}: its samples do not lie along the first dimension. "
                f"{RULE_OR_IGNORE}{self._flow.counted}")
        # What is one of several results may have been saved where another was computed from it.
        copied = [len(outputs) > 1 or output._is_view() or _may_read_result(output)
                  for output in outputs]
        found = self._tap(operation, outputs, copied)
        operation.source = None
        return found

    def _spread(self, args: Args, kwargs: Kwargs) -> Inputs:
        """The arguments of attention with dropout, which cannot be run again, with a tapped row
        per sample of what is the same for all."""
        leaves, tree = tree_flatten((args, kwargs))
        for index, leaf in enumerate(leaves):
            if id(leaf) not in self._expressions:
                continue
            own = self._expressions[id(leaf)][0]
            if not own.expanded and leaf.dim() == 4 and leaf.shape[0] == 1:
                leaf = self._traced(Tensor.expand, (leaf, self._n_samples, -1, -1, -1), {})
            if self._expressions[id(leaf)][0].expanded:
                leaves[index] = self._tap_rows(leaf, 0)
                self._add_samples(leaves[index : index + 1])
        return tree_unflatten(leaves, tree)

    def _traced(self, function: Operation, args: Args, kwargs: Kwargs) -> Leaf:
        function, in_place = _out_of_place(function, args)
        original: Leaf = args[0] if in_place else None
        from_samples = self._comes_from_samples(original)
        # What is overwritten is read again: by autograd, or by an expression.
        if in_place and not (_adds(function) and from_samples):
            with torch._C.DisableTorchFunction():
                known = id(original) in self._expressions
                args = (original if known else original.clone(), *args[1:])
            if from_samples:
                self._flow.copy(args[0], original)
        leaves, tree = tree_flatten((args, kwargs))
        found = [self._expressions[id(leaf)][0] if id(leaf) in self._expressions else leaf
                 for leaf in leaves]
        samples, roles = self._batched(function, found)
        if any(samples) and function is _with_item and not _writes_to_all_samples(*args[:2]):
            raise CannotTrace(
                "a tensor computed from parameters is written to chosen samples only: write to "
                "all, by tensor[:, index] = value or torch.where")
        output = function(*args, **kwargs)
        outputs, out_tree = tree_flatten(output)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in outputs):
            return output
        if any(samples):
            operation = self._operation(function, found, tree, samples)
            tensors = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
            tapped = iter(self._tap_outputs(operation, tensors))
            outputs = [next(tapped) if isinstance(leaf, Tensor) else leaf for leaf in outputs]
            self._add_samples(outputs, roles, FLAT if operation.flat else 0)
            output = tree_unflatten(outputs, out_tree)
        else:
            self._remember(function, found, tree, outputs)
        return self._write_back(original, output) if in_place else output

    def _write_back(self, target: Tensor, result: Tensor) -> Tensor:
        """Write an in-place operation's result to its target, which is returned."""
        own = self._expressions.get(id(result))
        with torch._C.DisableTorchFunction():
            target.copy_(result)
        if own is not None:
            self._expressions[id(target)] = (own[0], target)
        else:
            self._expressions.pop(id(target), None)
            self._flow.copy(target, result)
        return target

    def _batched(
        self, function: Operation, leaves: Leaves
    ) -> tuple[list[bool], frozenset[Key]]:
        """Which of an operation's inputs carry samples along their first dimension, and the roles
        that must for it to be so; a RuntimeError where one carries them elsewhere."""
        key: Key | None = None

        def carries(leaf: Leaf) -> bool:
            """Of a tensor with N rows whose samples the data flow does not show."""
            nonlocal key
            name = f"{function_name(function)} of {', '.join(sorted(names_of(leaves)))}"
            key = key or self._flow.roles.next_call(name)
            return self._flow.roles.carries(key, leaf.shape[0]) is not False

        was_open = bool(self._flow.roles.open)
        flows = [self._flow.of(leaf) for leaf in leaves]
        dim = FLAT if self._is_flat(function, leaves) else 0
        sure = [flow.roles for flow in flows if flow is not None and flow.dim == dim]
        batched = []
        for leaf, flow in zip(leaves, flows, strict=True):
            each = flow is not None and flow.dim == dim
            if not each and self._has_rows(leaf) and (flow is None or flow.dim == UNKNOWN):
                # What has a gradient and no expression may come out of an operation that is not
                # seen: a compiled function or a torch.autograd.Function.
                each = (leaf.requires_grad or flow is not None) and carries(leaf)
            batched.append(each)
        for leaf, each in zip(leaves, batched, strict=True):
            hidden = isinstance(leaf, Tensor) and not each and self._hides_samples(leaf)
            if hidden and not was_open:
                raise CannotTrace(
                    f"{', '.join(sorted(names_of(leaves)))} meets activations of shape "
                    f"{tuple(leaf.shape)} in {function_name(function) or 'an operation'}: in a "
                    f"batch of {self._n_samples} their samples do not lie along the first "
                    f"dimension, so they cannot be told apart. {RULE_OR_IGNORE}"
                    f"{self._flow.counted}")
        widest = max(
            (leaf.dim() for leaf, each in zip(leaves, batched, strict=True) if each), default=0)
        # Zeros made for the batch have as many dimensions as the samples; a table of N positions
        # has fewer. In other than row-by-row operations they may be a table all the same.
        by_row = operation_name(function) in (*ROW_BY_ROW, "with_item")
        for index, leaf in enumerate(leaves):
            if widest and not batched[index] and self._has_rows(leaf) and leaf.dim() >= widest:
                plain = by_row or not leaf.is_floating_point()
                batched[index] = plain or (not self._flow.is_constant(leaf) and carries(leaf))
        if sure:
            roles = min(sure, key=len)
            self._flow.roles.use(roles)
            return batched, roles
        return batched, frozenset() if key is None else frozenset((key,))

    def _is_flat(self, function: Operation, leaves: Leaves) -> bool:
        """Whether samples and positions share the first dimension of all that comes from samples,
        and the operation has a rule for that."""
        dims = {flow.dim for leaf in leaves if (flow := self._flow.of(leaf)) is not None}
        return dims == {FLAT} and function_name(function).strip("_") in FLAT_RULES

    def _hides_samples(self, leaf: Tensor) -> bool:
        rows = leaf.shape[0] if leaf.dim() else 0
        return leaf.requires_grad or (
            self._comes_from_samples(leaf) and rows > 0 and rows % self._n_samples == 0)

    def _remember(
        self, function: Operation, leaves: Leaves, tree: TreeSpec, outputs: Leaves
    ) -> None:
        parents = [leaf for leaf in leaves if isinstance(leaf, ParameterExpression)]
        stretched = any(self._has_rows(leaf) and leaf.stride(0) == 0 for leaf in leaves)
        different = len(set(map(id, parents)))  # one of torch.stack([token] * N)
        repeated = len(parents) == self._n_samples and different == 1
        grown = stretched or repeated or any(parent.expanded for parent in parents)
        grown = grown or function_name(function) in EXPANDING
        kept = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        names, versions = names_of(parents), versions_of(kept)
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                shape, expanded = tuple(tensor.shape), grown and self._has_rows(tensor)
                own = ParameterExpression(
                    function, kept, tree, index, names, shape, expanded, versions=versions)
                self._expressions[id(tensor)] = (own, tensor)

    def _operation(
        self, function: Operation, leaves: Leaves, tree: TreeSpec, samples: list[bool]
    ) -> TracedOp:
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = sorted(names_of(leaves))
        by_row = operation_name(function) in (*ROW_BY_ROW, "with_item")
        widest = max(leaf.dim() for leaf, each in zip(leaves, samples, strict=True) if each)
        per_sample = {
            index: leaf for index, leaf in enumerate(leaves)
            if isinstance(leaf, ParameterExpression)
            and len(leaf.shape) >= widest and leaf.shape[0] == self._n_samples}
        flat = self._is_flat(function, [
            tensor for tensor, each in zip(leaves, samples, strict=True) if each])
        return TracedOp(
            name=f"{function_name(function) or 'operation'} of {', '.join(names)}",
            function=function,
            leaves=[None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            tree=tree_flatten(tree_unflatten(list(range(len(leaves))), tree))[1],
            tensors=[_kept(with_rows(leaves[index].detach()), function) for index in positions],
            batched=[samples[index] for index in positions],
            positions=positions,
            parameters={name: self._parameters[name] for name in names},
            aligned=frozenset(index for index, leaf in per_sample.items()
                              if leaf.expanded and by_row and not flat),
            may_align=frozenset() if flat else frozenset(per_sample),
            n_samples=self._n_samples, flat=flat,
            source=leaves[positions[0]] if len(positions) == 1 else None)


def _draws(function: Operation, args: Args, kwargs: Kwargs) -> bool:
    return function_name(function) == "scaled_dot_product_attention" and bool(
        kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))


def _may_read_result(output: Tensor) -> bool:
    """Whether the backward formula of what computed the output may read it."""
    return type(output.grad_fn).__name__.partition("Backward")[0] not in READS_INPUTS_ONLY


def _adds(function: Operation) -> bool:
    name = function_name(function).strip("_")
    return name in ADDING or name.removeprefix("r") in ADDING


def _kept(tensor: Tensor, function: Operation) -> Tensor:
    """An operation's input, or a stand-in where its values do not matter."""
    stand_in = tensor.is_floating_point() and _adds(function)
    return tensor.new_zeros(()).expand(tensor.shape) if stand_in else tensor


def flat_values(values: Iterable[object]) -> Iterator[object]:
    """The values, with those of lists and tuples among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat_values(value)
        else:
            yield value


def _with_item(tensor: Tensor, index: Leaf, value: Leaf) -> Tensor:
    """The result of tensor[index] = value as a new tensor."""
    result = tensor.clone()
    result[index] = value
    return result


def _writes_to_all_samples(tensor: Tensor, index: Leaf) -> bool:
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, Tensor):
        return first.dtype is torch.bool and first.shape[:1] == tensor.shape[:1]
    return first is Ellipsis or first == slice(None)


def _out_of_place(function: Operation, args: Args) -> tuple[Operation, bool]:
    """The function that gives an in-place operation's result as a new tensor, and whether it was
    in place."""
    name = function_name(function)
    if name == "__setitem__":
        return _with_item, True
    is_method = name.endswith("_") and not name.startswith("_") and bool(args)
    if name in IN_PLACE_OPERATORS:
        name = name.replace("__i", "__", 1)
    elif is_method and getattr(Tensor, name, None) is function:
        name = name[:-1]
    else:
        return function, False
    plain = getattr(Tensor, name, None)
    return (function, False) if plain is None else (plain, True)
