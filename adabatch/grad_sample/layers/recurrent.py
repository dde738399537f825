"""nn.RNN, nn.LSTM, nn.GRU: run again sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.layers.generic import RecomputedCall, register_call
from adabatch.grad_sample.layout import Layout


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
    def samples_dim(cls, layer: nn.Module, index: int) -> int:
        return 0 if index == 0 and layer.batch_first else 1

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        """In a loop over the samples: vmap has no rule for recurrent layers."""
        inputs, outer = self._of_samples(tensors, backprops, rows)
        own = dict(self.layer.named_parameters())
        measured = [own[name] for name in self.parameters]

        def alone(
            values: list[Tensor], layouts: Sequence[Layout | None], sample: int
        ) -> list[Tensor]:
            return [(layout or Layout.BATCH_FIRST).single(value[sample]).to(measured[0].dtype)
                    for value, layout in zip(values, layouts, strict=True)]

        grads = []
        for sample in range(outer[0].shape[0]):
            with torch.enable_grad():
                args, kwargs = self._arguments(alone(inputs, self._input_layouts, sample))
                # Not called: its hooks would measure it again.
                outputs = tree_flatten(self.layer.forward(*args, **kwargs))[0]
            tapped = [outputs[index] for index in self.tapped]
            cotangents = alone(outer, self._output_layouts, sample)
            grads.append(torch.autograd.grad(tapped, measured, cotangents))
        return {name: Dense(torch.stack(each))
                for name, each in zip(self.parameters, zip(*grads, strict=True), strict=True)}

    def _input_layout(self, index: int, tensor: Tensor) -> Layout:
        if index == 0 and tensor.dim() != 3:
            raise RuntimeError(
                f"{self.name} got a sequence of shape {tuple(tensor.shape)} without a batch "
                "dimension: add one with unsqueeze")
        return self._output_layout(index, tensor)

    def _output_layout(self, index: int, tensor: Tensor) -> Layout:
        dim = self.samples_dim(self.layer, index)
        return Layout.BATCH_SECOND if dim else Layout.BATCH_FIRST
