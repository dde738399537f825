"""nn.RNN, nn.LSTM, nn.GRU: run again sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.layers.generic import RecomputedCall, no_draws, register_call
from adabatch.grad_sample.layers.state import LayerState
from adabatch.grad_sample.layout import Layout

FORWARD = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


@register_call(nn.RNNBase)
class RecurrentCall(RecomputedCall):
    """The sequence has its samples where batch_first says, hidden states along dimension 1."""

    @classmethod
    def problem(cls, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.RNNBase)
        if layer.dropout and layer.num_layers > 1:
            return (
                "its dropout between layers cannot be drawn again for one sample: stack "
                "single-layer modules with nn.Dropout between them")
        return None

    @classmethod
    def state_before(cls, layer: nn.Module) -> object:
        """Of a subclass with a forward of its own; torch's keep no state."""
        return () if type(layer).forward in FORWARD else super().state_before(layer)

    @classmethod
    def samples_dim(cls, layer: nn.Module, index: int) -> int:
        return 0 if index == 0 and layer.batch_first else 1

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        """In a loop over the samples: vmap has no rule for recurrent layers."""
        inputs, outer = self._of_samples(tensors, backprops, rows)
        own = dict(self.layer.named_parameters())
        measured = [own[name] for name in self.parameters]
        if not len(outer[0]):  # an empty batch
            return {name: Dense(own[name].detach().new_zeros(0, *own[name].shape))
                    for name in self.parameters}

        def alone(
            values: list[Tensor], layouts: Sequence[Layout | None], sample: int
        ) -> list[Tensor]:
            return [(layout or Layout.BATCH_FIRST).single(value[sample]).to(measured[0].dtype)
                    for value, layout in zip(values, layouts, strict=True)]

        own_code, device = isinstance(self._before, LayerState), outer[0].device
        grads = []
        with no_draws(self.name, device) if own_code else nullcontext():
            for sample in range(outer[0].shape[0]):
                outputs = self._outputs(alone(inputs, self._input_layouts, sample))
                tapped = [outputs[index] for index in self.tapped]
                cotangents = alone(outer, self._output_layouts, sample)
                grads.append(torch.autograd.grad(tapped, measured, cotangents))
        return {name: Dense(torch.stack(each))
                for name, each in zip(self.parameters, zip(*grads, strict=True), strict=True)}

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of one sample, by forward: the hooks would measure it again."""
        args, kwargs = self._arguments(inputs)
        state = self._before.restored() if isinstance(self._before, LayerState) else nullcontext()
        with torch.enable_grad(), state:
            return tree_flatten(self.layer.forward(*args, **kwargs))[0]

    def _input_layout(self, index: int, tensor: Tensor) -> Layout:
        if index == 0 and tensor.dim() != 3:
            raise RuntimeError(
                f"{self.name} got a sequence of shape {tuple(tensor.shape)} without a batch "
                "dimension: add one with unsqueeze")
        return self._output_layout(index, tensor)

    def _output_layout(self, index: int, tensor: Tensor) -> Layout:
        dim = self.samples_dim(self.layer, index)
        return Layout.BATCH_SECOND if dim else Layout.BATCH_FIRST
