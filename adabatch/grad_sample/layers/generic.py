"""Calls of layers without a rule: what must be kept of the forward pass to work out each sample's gradient in backward.

A call keeps the input tensors with the layout of their samples, and answers factors(tensors, backprops, rows) -> {own parameter name: factor}.

Legend: N samples, S measured, T positions.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.layers.per_sample import MIXES, per_sample_grads
from adabatch.grad_sample.layout import Layout

_UNCOMPILED = "a layer without a grad_sample rule is run again sample by sample, outside compiled graphs: compile without fullgraph=True, or pass ignore=[...]"


def uncompiled(function: Callable) -> Callable:
    """`torch.compiler.disable(function)`, which imports the compiler, put off until something else has: that alone would double the time to import adabatch."""
    disabled: list[Callable] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # torch 2.6 takes none
            disabled.append(torch.compiler.disable(function, reason=_UNCOMPILED) if has_reason else torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # What the compiler looks for where it would trace into a function, as torch.compiler.disable leaves it.
    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, _UNCOMPILED
    return call


class RecomputedCall:
    """One call of a module, to be run again sample by sample.

    Args:
        name: of the module, for errors.
        layer: the module.
        parameters: its own names of the measured parameters (dotted where they belong to a part of it).
        args, kwargs, output: of the call.
        n_samples: N.
        layout: of the samples in its output.

    Attributes:
        tensors: the inputs to be saved.
        tapped: which of the output's leaves carry gradients.

    Raises:
        RuntimeError: an input or output whose samples cannot be told apart.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        parameters: Collection[str],
        args: tuple,
        kwargs: dict,
        output: Any,
        n_samples: int,
        layout: Layout = Layout.BATCH_FIRST,
    ):
        self.name, self.layer, self.parameters = name, layer, tuple(parameters)
        self._n_samples, self._layout = n_samples, layout
        leaves, self._inputs = tree_flatten((args, kwargs))
        outputs = tree_flatten(output)[0]
        if any(isinstance(leaf, PackedSequence) for leaf in tree_flatten((args, kwargs, output), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))[0]):
            raise RuntimeError(f"{name} was called with a PackedSequence, whose rows belong to no fixed sample: pad the sequences, or pass ignore=[{name!r}]")
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        self.tapped = [index for index, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._output_layouts = [self._output_layout(index, outputs[index]) for index in self.tapped]
        self._input_layouts = [self._input_layout(index, tensor) for index, tensor in enumerate(self.tensors)]

    def _input_layout(self, index: int, tensor: Tensor) -> Layout | None:
        """The layout of an input's samples; None for one that carries none, a mask for instance."""
        return next((layout for layout in (self._layout, Layout.BATCH_FIRST) if self._fits(layout, tensor)), None)

    def _output_layout(self, index: int, tensor: Tensor) -> Layout:
        if self._fits(self._layout, tensor):
            return self._layout
        raise RuntimeError(
            f"{self.name} gave an output of shape {tuple(tensor.shape)} for a batch of {self._n_samples}: its samples do not lie along the first dimension. "
            "Settle the layouts with adabatch.check(...), or pass ignore=[...]"
        )

    def _fits(self, layout: Layout, tensor: Tensor) -> bool:
        if layout is Layout.BATCH_FIRST:
            return tensor.dim() > 0 and tensor.shape[0] == self._n_samples
        if layout is Layout.BATCH_SECOND:
            return tensor.dim() > 1 and tensor.shape[1] == self._n_samples
        return tensor.dim() > 0 and tensor.shape[0] >= self._n_samples and tensor.shape[0] % self._n_samples == 0

    def factors(self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None) -> dict[str, Factor]:
        """Per-sample gradients of the measured parameters, by running the module again for each sample."""
        inputs = [self._samples_first(tensor, layout, rows) for tensor, layout in zip(tensors, self._input_layouts, strict=True)]
        outer = [self._samples_first(grad, layout, rows) for grad, layout in zip(backprops, self._output_layouts, strict=True)]
        own = dict(self.layer.named_parameters())
        batched = [layout is not None for layout in self._input_layouts]
        grads = per_sample_grads(self._run, {name: own[name] for name in self.parameters}, inputs, batched, outer, self.name)
        return {name: Dense(grad) for name, grad in grads.items()}

    def _samples_first(self, tensor: Tensor, layout: Layout | None, rows: Tensor | None) -> Tensor:
        if layout is None:
            return tensor
        split = layout.split(tensor, self._n_samples)
        return split if rows is None else split.index_select(0, rows)

    def _run(self, parameters: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
        """The tapped outputs [1, ...] for inputs [1, ...] of one sample."""
        wide = next(iter(parameters.values())).dtype
        rest = {name: _detached(value, wide) for name, value in self.layer.named_parameters() if name not in parameters}
        buffers = {name: _detached(value, wide).clone() for name, value in self.layer.named_buffers()}
        supply = iter([value if layout is None else layout.single(value[0]) for value, layout in zip(inputs, self._input_layouts, strict=True)])
        leaves = [next(supply) if tensor else constant for tensor, constant in zip(self._is_tensor, self._constants, strict=True)]
        args, kwargs = tree_unflatten(leaves, self._inputs)
        outputs = tree_flatten(functional_call(self.layer, {**rest, **buffers, **parameters}, args, kwargs))[0]
        return [self._alone(outputs[index], layout) for index, layout in zip(self.tapped, self._output_layouts, strict=True)]

    def _alone(self, output: Tensor, layout: Layout) -> Tensor:
        try:
            return layout.split(output, 1)
        except ValueError as error:
            raise RuntimeError(MIXES.format(name=self.name, got=tuple(output.shape), expected=f"a single sample ({layout})")) from error


class RecurrentCall(RecomputedCall):
    """nn.RNN, nn.LSTM, nn.GRU: the sequence has its samples where batch_first says, hidden states have them along dimension 1."""

    def factors(self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None) -> dict[str, Factor]:
        """Per-sample gradients of the weights, sample by sample: vmap has no rule for recurrent layers."""
        inputs = [self._samples_first(tensor, layout, rows) for tensor, layout in zip(tensors, self._input_layouts, strict=True)]
        outer = [self._samples_first(grad, layout, rows) for grad, layout in zip(backprops, self._output_layouts, strict=True)]
        own = dict(self.layer.named_parameters())
        measured = [own[name] for name in self.parameters]
        wide = measured[0].dtype
        grads = []
        for sample in range(outer[0].shape[0]):
            with torch.enable_grad():
                alone = iter([layout.single(value[sample]).to(wide) for value, layout in zip(inputs, self._input_layouts, strict=True)])
                leaves = [next(alone) if tensor else constant for tensor, constant in zip(self._is_tensor, self._constants, strict=True)]
                args, kwargs = tree_unflatten(leaves, self._inputs)
                outputs = tree_flatten(self.layer.forward(*args, **kwargs))[0]  # not called: its hooks would measure it again
            tapped = [outputs[index] for index in self.tapped]
            cotangents = [layout.single(grad[sample]).to(wide) for grad, layout in zip(outer, self._output_layouts, strict=True)]
            grads.append(torch.autograd.grad(tapped, measured, cotangents))
        return {name: Dense(torch.stack(parts)) for name, parts in zip(self.parameters, zip(*grads, strict=True), strict=True)}

    def _layout_of(self, index: int) -> Layout:
        return Layout.BATCH_FIRST if index == 0 and self.layer.batch_first else Layout.BATCH_SECOND

    def _input_layout(self, index: int, tensor: Tensor) -> Layout:
        if index == 0 and tensor.dim() != 3:
            raise RuntimeError(f"{self.name} got a sequence of shape {tuple(tensor.shape)} without a batch dimension: add one with unsqueeze")
        return self._layout_of(index)

    def _output_layout(self, index: int, tensor: Tensor) -> Layout:
        return self._layout_of(index)


def _detached(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
