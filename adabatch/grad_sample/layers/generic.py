"""Layers without a rule: per-sample gradients by running the layer again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch._types import Args, Inputs, Kwargs
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.layers.state import LayerState, draws_taken_back
from adabatch.grad_sample.layout import Layout
from adabatch.kernels import CHUNK_BYTES

RANDOM = (
    "draws random numbers inside its forward pass, so that its per-sample gradients cannot be "
    "computed again with the same draws. Put the dropout into a layer after it (nn.Dropout), set "
    "its probability to 0, or pass ignore=[...]."
)
MIXES = (
    "{name} gives {got} when it is run for one sample, where {expected} was expected: it mixes "
    "samples, or depends on the size of the batch. Give it a rule with register_grad_sampler, or "
    "pass ignore=[...]."
)
FAILS_ALONE = (
    "{name} cannot be run for one sample alone, as measuring it needs: {error}. Give it a rule "
    "with register_grad_sampler, or pass ignore=[...]."
)
IN_PLACE = (
    "changes its input in place, so that it cannot be run again: write `x = x + y` for `x += y`, "
    "or clone the input first, or pass ignore=[...]."
)

UNLIKE = (
    "{name} gives other values when it is run again for one sample than it gave for the batch (the "
    "difference is {difference:.2g} of their norm): it mixes samples, as a mean over the batch "
    "does, or depends on something outside of it that has changed since, such as a global counter. "
    "Give it a rule with register_grad_sampler, or pass ignore=[...]."
)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3}  # relative; of other types 0.1
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class RecomputedCall:
    """One call of a module, to be run again sample by sample in the backward pass.

    Args:
        name: of the module, for errors.
        parameters: its own names of the measured parameters, dotted in submodules.
        args, kwargs, output: of the call.
        n_samples: N.
        layout: of the samples in its output.
        before: what `state_before` gave before the call.
        tables: numbers of the tensors it was called with that carry no samples, though they may be
            as long as the batch.

    Attributes:
        defines_samples: its output has as many rows as there are samples, even where no dimension
            of the model's inputs is as long.
        tensors: the inputs to be saved.
        tapped: which of the output's leaves carry gradients.
        expected: those leaves, where what comes out again is to be compared with them.
        unlike: done where that differs, instead of an error: what its inputs are is not settled.

    Raises:
        RuntimeError: an input or output whose samples cannot be told apart.
    """

    defines_samples: ClassVar[bool] = False
    expected: list[Tensor] | None = None
    unlike: Callable[[], None] | None = None

    def __init__(
        self, name: str, layer: nn.Module, parameters: Collection[str], args: Args, kwargs: Kwargs,
        output: object, n_samples: int, layout: Layout = Layout.BATCH_FIRST,
        before: object = None, tables: Collection[int] = (),
    ):
        self._before = self.state_before(layer) if before is None else before
        self.name, self.layer, self.parameters = name, layer, tuple(parameters)
        self._n_samples, self._layout = n_samples, layout
        everything = tree_flatten((args, kwargs, output), is_leaf=_is_packed)[0]
        if any(_is_packed(leaf) for leaf in everything):
            raise RuntimeError(
                f"{name} was called with a PackedSequence, whose rows belong to no fixed sample: "
                f"pad the sequences, or pass ignore=[{name!r}]")
        leaves, self._inputs = tree_flatten((args, kwargs))
        outputs = tree_flatten(output)[0]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors = [with_rows(leaf.detach()) for leaf in leaves if isinstance(leaf, Tensor)]
        self.tapped = leaves_with_gradient(outputs)
        self._output_layouts = [self._output_layout(index, outputs[index])
                                for index in self.tapped]
        self._input_layouts = [None if index in tables else self._input_layout(index, tensor)
                               for index, tensor in enumerate(self.tensors)]

    @classmethod
    def serves(cls, layer: nn.Module) -> bool:
        """Whether this kind of call can run the layer again."""
        return True

    @classmethod
    def problem(cls, layer: nn.Module) -> str | None:
        """Why the layer cannot be measured, with the fix, or None."""
        return None

    @classmethod
    def state_before(cls, layer: nn.Module) -> object:
        """What has to be kept before a call of the layer, to run it again as it was."""
        return LayerState(layer)

    @classmethod
    def samples_dim(cls, layer: nn.Module, index: int) -> int:
        """The dimension of the samples in input or output number `index` of the layer."""
        return 0

    def _input_layout(self, index: int, tensor: Tensor) -> Layout | None:
        """None for an input without samples, such as a mask."""
        layouts = (self._layout, Layout.BATCH_FIRST)
        return next((layout for layout in layouts if self._fits(layout, tensor)), None)

    def _output_layout(self, index: int, tensor: Tensor) -> Layout:
        if self._fits(self._layout, tensor):
            return self._layout
        raise RuntimeError(
            f"{self.name} gave an output of shape {tuple(tensor.shape)} for a batch of "
            f"{self._n_samples}: its samples do not lie along the first dimension. Settle the "
            "layouts with adabatch.check(...), or pass ignore=[...]")

    def _fits(self, layout: Layout, tensor: Tensor) -> bool:
        size = tensor.shape[1:2] if layout is Layout.BATCH_SECOND else tensor.shape[:1]
        if layout in (Layout.BATCH_FIRST, Layout.BATCH_SECOND):
            return tuple(size) == (self._n_samples,)
        return bool(size) and size[0] >= self._n_samples and size[0] % self._n_samples == 0

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        """{own parameter name: per-sample gradients} of the measured rows."""
        inputs, outer = self._of_samples(tensors, backprops, rows)
        expected = self.expected and self._of_samples(tensors, self.expected, rows)[1]
        own = dict(self.layer.named_parameters())
        batched = [layout is not None for layout in self._input_layouts]
        measured = {name: own[name] for name in self.parameters}
        try:
            grads = per_sample_grads(
                self._run, measured, inputs, batched, outer, self.name, expected)
        except RuntimeError as error:
            if self.unlike is None or RANDOM in str(error) or IN_PLACE in str(error):
                raise
            self.unlike()
            return {}
        return {name: Dense(grad) for name, grad in grads.items()}

    def _of_samples(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        def first(tensor: Tensor, layout: Layout | None) -> Tensor:
            if layout is None:
                return tensor
            split = layout.split(tensor, self._n_samples)
            return split if rows is None else split.index_select(0, rows)

        return ([first(*each) for each in zip(tensors, self._input_layouts, strict=True)],
                [first(*each) for each in zip(backprops, self._output_layouts, strict=True)])

    def _arguments(self, inputs: Sequence[Tensor]) -> Inputs:
        """(args, kwargs) of the call with these tensors."""
        supply = iter(inputs)
        leaves = [next(supply) if tensor else constant
                  for tensor, constant in zip(self._is_tensor, self._constants, strict=True)]
        return tree_unflatten(leaves, self._inputs)

    def _run(self, parameters: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
        """The tapped outputs [1, ...] for inputs [1, ...] of one sample."""
        wide = next(iter(parameters.values())).dtype
        own = {value: parameters.get(name, _widened(value.detach(), wide))
               for name, value in self.layer.named_parameters()}
        alone = [value if layout is None else layout.single(value[0])
                 for value, layout in zip(inputs, self._input_layouts, strict=True)]
        args, kwargs = self._arguments(alone)
        assert isinstance(self._before, LayerState)
        with self._before.restored(own, lambda tensor: _widened(tensor, wide)):
            output = self.layer.forward(*args, **kwargs)
        outputs = tree_flatten(output)[0]
        return [self._alone(outputs[index], layout)
                for index, layout in zip(self.tapped, self._output_layouts, strict=True)]

    def _alone(self, output: Tensor, layout: Layout) -> Tensor:
        try:
            return layout.split(output, 1)
        except ValueError as error:
            expected = f"a single sample ({layout})"
            raise RuntimeError(MIXES.format(
                name=self.name, got=tuple(output.shape), expected=expected)) from error


PerSample = tuple[dict[str, Tensor], Sequence[Tensor]]
CallT = TypeVar("CallT", bound=type[RecomputedCall])
_CALLS: dict[type[nn.Module], type[RecomputedCall]] = {}


def register_call(layer_type: type[nn.Module]) -> Callable[[CallT], CallT]:
    """Decorator: layers of this type own their submodules' parameters and are run again as a
    whole, by this kind of call."""
    def register(call: CallT) -> CallT:
        _CALLS[layer_type] = call
        return call

    return register


def call_type(layer: nn.Module) -> type[RecomputedCall]:
    """The kind of call that runs a layer without a rule again."""
    return next((call for layer_type, call in _CALLS.items()
                 if isinstance(layer, layer_type) and call.serves(layer)), RecomputedCall)


def leaves_with_gradient(leaves: Sequence[object]) -> list[int]:
    return [index for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad]


def per_sample_grads(
    function: Callable[..., Sequence[Tensor]], parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor], batched: Sequence[bool], cotangents: Sequence[Tensor], name: str,
    expected: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients {parameter: [S, *shape]} of Σ_k ⟨cotangent_k, output_k⟩ of each sample alone: vmap
    of the vjp over the samples, a loop where vmap cannot.

    Args:
        function: (parameters, *inputs) -> outputs; batched inputs and all outputs have a first
            dimension of one sample.
        batched: whether each input carries samples, and is [S, ...].
        cotangents: gradient with respect to each output, [S, ...].
        name: of the layer, for errors.
        expected: the outputs [S, ...] that the function gave for these samples together, to be
            compared; random numbers of Python's and NumPy's are noticed then. None: not now.

    Raises:
        RuntimeError: the function draws random numbers, changes its inputs or mixes samples.

    Example:
        >>> ones, scaled = torch.ones(3, 2), lambda parameters, inputs: [parameters["a"] * inputs]
        >>> per_sample_grads(scaled, {"a": ones[0]}, [ones], [True], [ones], "Scale")["a"].shape
        torch.Size([3, 2])
    """
    if not len(cotangents[0]):  # an empty batch
        return {key: value.new_zeros(0, *value.shape) for key, value in parameters.items()}
    double = any(tensor.dtype == torch.float64 for tensor in (*parameters.values(), *cotangents))
    wide = torch.float64 if double else torch.float32
    parameters = {key: _widened(value.detach(), wide) for key, value in parameters.items()}
    rows = tuple(_widened(value.detach(), wide) for value in inputs)
    outer = tuple(_widened(value, wide) for value in cotangents)
    with nullcontext() if expected is None else no_draws(name, outer[0].device):
        found = _vectorized(function, parameters, rows, batched, outer, name, expected is not None)
    if found is None:
        with no_draws(name, outer[0].device):
            found = _one_by_one(function, parameters, rows, batched, outer, name)
    grads, outputs = found
    if expected is not None:
        _check_outputs(outputs, expected, name)
    return grads


def _vectorized(
    function: Callable[..., Sequence[Tensor]], parameters: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...], batched: Sequence[bool], cotangents: tuple[Tensor, ...], name: str,
    returns_outputs: bool,
) -> PerSample | None:
    """(gradients, outputs [S, ...]) by vmap; None where vmap cannot."""
    def one(rows: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> PerSample:
        args = [row.unsqueeze(0) if each else row for row, each in zip(rows, batched, strict=True)]
        outputs, pull, *_ = vjp(lambda own: tuple(function(own, *args)), parameters)
        grads = [grad.unsqueeze(0) for grad in outer]
        _check_shapes(outputs, grads, name)
        found = pull(tuple(grad.to(output.dtype)
                           for grad, output in zip(grads, outputs, strict=True)))[0]
        return found, [output.squeeze(0) for output in outputs] if returns_outputs else []

    numel = sum(math.prod(value.shape) for value in parameters.values())
    chunk = None if torch.compiler.is_compiling() else max(8, CHUNK_BYTES // max(1, 4 * numel))
    in_dims = (tuple(0 if each else None for each in batched), (0,) * len(cotangents))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(one, in_dims, randomness="error", chunk_size=chunk)(inputs, cotangents)
    except Exception as error:
        if "randomness" in str(error):
            raise RuntimeError(f"{name} {RANDOM}") from error
        if "mutate a captured Tensor" in str(error):
            raise RuntimeError(f"{name} {IN_PLACE}") from error
        return None


def _one_by_one(
    function: Callable[..., Sequence[Tensor]], parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor], batched: Sequence[bool], cotangents: Sequence[Tensor], name: str,
) -> PerSample:
    """The same in a loop, by autograd alone, which runs what functorch does not."""
    own = {key: value.detach().requires_grad_() for key, value in parameters.items()}
    found: dict[str, list[Tensor]] = {key: [] for key in own}
    rows: list[Sequence[Tensor]] = []
    for sample in range(len(cotangents[0])):
        with torch.enable_grad():
            args = [_row(each, sample) if split else each
                    for each, split in zip(inputs, batched, strict=True)]
        versions = [each._version for each in args]
        try:
            with torch.enable_grad():
                outputs = function(own, *args)
        except Exception as error:
            if "when it is run for one sample" in str(error):
                raise
            first = f"{error}".partition("\n")[0]
            raise RuntimeError(FAILS_ALONE.format(name=name, error=first)) from error
        if versions != [each._version for each in args]:
            raise RuntimeError(f"{name} {IN_PLACE}")
        outer = [each[sample : sample + 1] for each in cotangents]
        _check_shapes(outputs, outer, name)
        pairs = [(output, grad.to(output.dtype))
                 for output, grad in zip(outputs, outer, strict=True) if output.requires_grad]
        grads = torch.autograd.grad(
            [output for output, _ in pairs], list(own.values()), [grad for _, grad in pairs],
            allow_unused=True) if pairs else [None] * len(own)
        for (key, value), grad in zip(own.items(), grads, strict=True):
            found[key].append(torch.zeros_like(value) if grad is None else grad)
        rows.append([output.detach() for output in outputs])
    return ({key: torch.stack(each) if each else own[key].new_zeros(0, *own[key].shape)
             for key, each in found.items()},
            [torch.cat(each) for each in zip(*rows, strict=True)])


def _row(tensor: Tensor, sample: int) -> Tensor:
    """A copy of one row [1, ...] of a tensor, which may be sparse; where it is not, the layer may
    take gradients with respect to it, and change it in place."""
    if tensor.layout is torch.strided:
        row = tensor[sample : sample + 1].detach()
        return row.requires_grad_(row.is_floating_point() or row.is_complex()).clone()
    return tensor.index_select(0, torch.tensor([sample], device=tensor.device))


def _check_shapes(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], name: str) -> None:
    """Raise a RuntimeError unless each output has the shape [1, ...] of its gradient."""
    for output, grad in zip(outputs, cotangents, strict=True):
        if output.shape != grad.shape:
            raise RuntimeError(MIXES.format(
                name=name, got=tuple(output.shape), expected=tuple(grad.shape)))


def _check_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor], name: str) -> None:
    """Raise a RuntimeError where single samples give other outputs than the batch gave."""
    for output, given in zip(outputs, expected, strict=bool(outputs)):
        tolerance = TOLERANCE.get(given.dtype, 0.1)
        given = given.to(output.dtype)
        difference = float((output - given).norm() / given.norm())
        if difference > tolerance:
            raise RuntimeError(UNLIKE.format(name=name, difference=difference))


@contextmanager
def no_draws(name: str, device: torch.device) -> Iterator[None]:
    """Raise a RuntimeError where random numbers were drawn, and take them back."""
    with draws_taken_back(device) as drawn:
        yield
    if drawn:
        raise RuntimeError(f"{name} {RANDOM}")


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor in a form that rows can be taken of: compressed sparse ones by coordinates."""
    return tensor.to_sparse_coo() if tensor.layout in COMPRESSED else tensor


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_packed(leaf: object) -> bool:
    return isinstance(leaf, PackedSequence)
