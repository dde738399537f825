"""nn.MultiheadAttention: exact also with dropout, by replaying the attention between its
projections, identities in their place, under the same random state. The projections are linear:
their per-sample gradients are outer products of the gradients at the projected queries, keys and
values with the inputs, and of the output gradient with the attention's context.

Legend: N samples, T positions of the query, S of key and value, E embedding width.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward, pad

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.factors.base import Dense, Factor
from adabatch.grad_sample.factors.outer import Outer
from adabatch.grad_sample.layers.generic import (
    RecomputedCall, leaves_with_gradient, register_call,
)
from adabatch.grad_sample.layers.state import RandomState, random_state
from adabatch.grad_sample.layout import Layout

INPUTS = ("query", "key", "value", "key_padding_mask", "attn_mask")


@register_call(nn.MultiheadAttention)
class AttentionCall(RecomputedCall):
    """One call of nn.MultiheadAttention."""

    layer: nn.MultiheadAttention

    @classmethod
    def serves(cls, layer: nn.Module) -> bool:
        return type(layer).forward is nn.MultiheadAttention.forward

    @classmethod
    def problem(cls, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.MultiheadAttention)
        if layer.bias_k is not None and layer.bias_k.requires_grad:
            return (
                "trainable bias_k and bias_v are appended to every sample's sequence: build it "
                "with add_bias_kv=False, or freeze them")
        return None

    @classmethod
    def state_before(cls, layer: nn.Module) -> RandomState | None:
        """Of the random numbers, where its dropout draws some."""
        assert isinstance(layer, nn.MultiheadAttention)
        draws = layer.dropout and layer.training
        return random_state(layer.out_proj.weight.device) if draws else None

    @classmethod
    def samples_dim(cls, layer: nn.Module, index: int) -> int:
        return 0 if layer.batch_first else 1

    def __init__(
        self, name: str, layer: nn.MultiheadAttention, parameters: Collection[str], args: Args,
        kwargs: Kwargs, output: Sequence[Tensor | None], n_samples: int,
        layout: Layout = Layout.BATCH_FIRST, before: object = None,
    ):
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        options = ("need_weights", "average_attn_weights", "is_causal")
        self._options = {key: given[key] for key in options}
        self._present = [key for key in INPUTS if given[key] is not None]
        query = given["query"]
        if query.dim() != 3:
            raise RuntimeError(
                f"{name} got a query of shape {tuple(query.shape)} without a batch dimension: add "
                "one with unsqueeze")
        if layer.dropout and layer.training and before is None:
            raise RuntimeError(
                f"the dropout of {name} cannot be drawn again when it is compiled: set its dropout "
                "to 0, or do not compile it")
        self.tensors = [given[key].detach() for key in self._present]
        self._self_attention = query is given["key"] is given["value"]
        self.name, self.layer, self.parameters = name, layer, tuple(parameters)
        self._state: RandomState | None = before if isinstance(before, tuple) else None
        self.tapped = leaves_with_gradient(output)

    def factors(
        self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None
    ) -> dict[str, Factor]:
        given = dict(zip(self._present, tensors, strict=True))
        outer = dict(zip(self.tapped, backprops, strict=True))
        inputs = [self._time_first(given[key]) for key in ("query", "key", "value")]
        output_grad = self._time_first(outer[0])
        projected = [linear(x, *self._projection(index)).detach().requires_grad_()
                     for index, x in enumerate(inputs)]
        context, grads = self._replay(projected, given, output_grad, outer.get(1))

        def split(tensor: Tensor) -> Tensor:
            samples = tensor.detach().transpose(0, 1)
            return samples if rows is None else samples.index_select(0, rows)

        factors = self._input_factors([split(grad) for grad in grads], [split(x) for x in inputs])
        factors["out_proj.weight"] = Outer(split(output_grad), split(context))
        factors["out_proj.bias"] = Dense(split(output_grad).sum(1))
        return {name: factors[name] for name in self.parameters}

    def _time_first(self, tensor: Tensor) -> Tensor:
        tensor = tensor.transpose(0, 1) if self.layer.batch_first else tensor
        return tensor.to(self.layer.out_proj.weight.dtype)

    def _projection(self, index: int) -> tuple[Tensor, Tensor | None]:
        layer, bias = self.layer, self.layer.in_proj_bias
        if layer._qkv_same_embed_dim:
            weight = layer.in_proj_weight.detach().chunk(3)[index]
        else:
            weight = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)[index].detach()
        return weight, None if bias is None else bias.detach().chunk(3)[index]

    def _replay(
        self, projected: list[Tensor], given: dict[str, Tensor], output_grad: Tensor,
        weights_grad: Tensor | None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The context [T, N, E] before the output projection, and the projections' gradients."""
        layer, width, weight = self.layer, self.layer.embed_dim, self.layer.out_proj.weight.detach()
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
        devices = [eye.device] if eye.device.type == "cuda" else []
        query, key, value = projected
        on_host, on_device = (None, None) if self._state is None else self._state
        with torch.random.fork_rng(devices, enabled=on_host is not None), torch.enable_grad():
            if on_host is not None:
                torch.set_rng_state(on_host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, eye.device)
            context, weights = multi_head_attention_forward(
                query, key, value, width, layer.num_heads, None, None, layer.bias_k, layer.bias_v,
                layer.add_zero_attn, layer.dropout, eye, None, training=layer.training,
                key_padding_mask=given.get("key_padding_mask"), attn_mask=given.get("attn_mask"),
                use_separate_proj_weight=True, q_proj_weight=eye, k_proj_weight=eye,
                v_proj_weight=eye, **self._options)
        outputs, grads = [context], [output_grad @ weight]
        if weights_grad is not None and weights is not None:
            outputs, grads = [context, weights], [*grads, weights_grad]
        return context, torch.autograd.grad(outputs, projected, grads)

    def _input_factors(self, left: list[Tensor], right: list[Tensor]) -> dict[str, Factor]:
        biases = torch.cat([grad.sum(1) for grad in left], dim=1)
        factors: dict[str, Factor] = {"in_proj_bias": Dense(biases)}
        if not self.layer._qkv_same_embed_dim:
            for name, grad, x in zip("qkv", left, right, strict=True):
                factors[f"{name}_proj_weight"] = Outer(grad, x)
        elif self._self_attention:
            factors["in_proj_weight"] = Outer(torch.cat(left, dim=2), right[0])
        else:
            width = self.layer.embed_dim
            padded = [pad(grad, (index * width, (2 - index) * width))
                      for index, grad in enumerate(left)]
            factors["in_proj_weight"] = Outer(torch.cat(padded, dim=1), torch.cat(right, dim=1))
        return factors
