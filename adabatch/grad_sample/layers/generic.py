"""Layers without a rule: per-sample gradients by running the layer again, sample by sample.

Legend: N samples, S measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch._types import Args, Inputs, Kwargs
from adabatch.grad_sample.factors.base import Dense, Factor
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

RandomState = tuple[Tensor, Tensor | None]


class RecomputedCall:
    """One call of a module, to be run again sample by sample in the backward pass.

    Args:
        name: of the module, for errors.
        parameters: its own names of the measured parameters, dotted in submodules.
        args, kwargs, output: of the call.
        n_samples: N.
        layout: of the samples in its output.
        random: the random state from before the call, where `keeps_random_state`.

    Attributes:
        defines_samples: its output has as many rows as there are samples, even where no dimension
            of the model's inputs is as long.
        tensors: the inputs to be saved.
        tapped: which of the output's leaves carry gradients.

    Raises:
        RuntimeError: an input or output whose samples cannot be told apart.
    """

    keeps_random_state: ClassVar[bool] = False
    defines_samples: ClassVar[bool] = False

    def __init__(
        self, name: str, layer: nn.Module, parameters: Collection[str], args: Args, kwargs: Kwargs,
        output: object, n_samples: int, layout: Layout = Layout.BATCH_FIRST,
        random: RandomState | None = None,
    ):
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
        self.tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        self.tapped = leaves_with_gradient(outputs)
        self._output_layouts = [self._output_layout(index, outputs[index])
                                for index in self.tapped]
        self._input_layouts = [self._input_layout(index, tensor)
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
        own = dict(self.layer.named_parameters())
        batched = [layout is not None for layout in self._input_layouts]
        measured = {name: own[name] for name in self.parameters}
        grads = per_sample_grads(self._run, measured, inputs, batched, outer, self.name)
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
        rest = {name: _widened(value.detach(), wide)
                for name, value in self.layer.named_parameters() if name not in parameters}
        buffers = {name: _widened(value.detach(), wide).clone()
                   for name, value in self.layer.named_buffers()}
        alone = [value if layout is None else layout.single(value[0])
                 for value, layout in zip(inputs, self._input_layouts, strict=True)]
        args, kwargs = self._arguments(alone)
        output = functional_call(self.layer, {**rest, **buffers, **parameters}, args, kwargs)
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
) -> dict[str, Tensor]:
    """Gradients {parameter: [S, *shape]} of Σ_k ⟨cotangent_k, output_k⟩ of each sample alone: vmap
    of the vjp over the samples, a loop where vmap cannot.

    Args:
        function: (parameters, *inputs) -> outputs; batched inputs and all outputs have a first
            dimension of one sample.
        batched: whether each input carries samples, and is [S, ...].
        cotangents: gradient with respect to each output, [S, ...].
        name: of the layer, for errors.

    Raises:
        RuntimeError: the function draws random numbers, changes its inputs or mixes samples.

    Example:
        >>> ones, scaled = torch.ones(3, 2), lambda parameters, inputs: [parameters["a"] * inputs]
        >>> per_sample_grads(scaled, {"a": ones[0]}, [ones], [True], [ones], "Scale")["a"].shape
        torch.Size([3, 2])
    """
    double = any(tensor.dtype == torch.float64 for tensor in (*parameters.values(), *cotangents))
    wide = torch.float64 if double else torch.float32
    parameters = {key: _widened(value.detach(), wide) for key, value in parameters.items()}
    rows = tuple(_widened(value.detach(), wide) for value in inputs)
    outer = tuple(_widened(value, wide) for value in cotangents)

    def one(rows: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> dict[str, Tensor]:
        args = [row.unsqueeze(0) if each else row for row, each in zip(rows, batched, strict=True)]
        outputs, pull, *_ = vjp(lambda own: tuple(function(own, *args)), parameters)
        pairs = list(zip(outer, outputs, strict=True))
        for grad, output in pairs:
            if output.shape[1:] != grad.shape or output.shape[0] != 1:
                raise RuntimeError(MIXES.format(
                    name=name, got=tuple(output.shape), expected=(1, *grad.shape)))
        return pull(tuple(grad.unsqueeze(0).to(output.dtype) for grad, output in pairs))[0]

    numel = sum(math.prod(value.shape) for value in parameters.values())
    chunk = None if torch.compiler.is_compiling() else max(8, CHUNK_BYTES // max(1, 4 * numel))
    in_dims = (tuple(0 if each else None for each in batched), (0,) * len(outer))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(one, in_dims, randomness="error", chunk_size=chunk)(rows, outer)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if "randomness" in str(error):
            raise RuntimeError(f"{name} {RANDOM}") from error
        if "mutate a captured Tensor" in str(error):
            raise RuntimeError(f"{name} {IN_PLACE}") from error
    try:
        grads = [one(tuple(row[sample] if each else row
                           for row, each in zip(rows, batched, strict=True)),
                     tuple(grad[sample] for grad in outer))
                 for sample in range(len(outer[0]))]
    except Exception as error:
        if "when it is run for one sample" in str(error):
            raise
        first = f"{error}".partition("\n")[0]
        raise RuntimeError(FAILS_ALONE.format(name=name, error=first)) from error
    return {key: torch.stack([grad[key] for grad in grads]) for key in grads[0]}


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_packed(leaf: object) -> bool:
    return isinstance(leaf, PackedSequence)
