"""nn.MultiheadAttention: exact also with dropout, by replaying the attention between its projections under the same random state.

The projections are linear, so their per-sample gradients are outer products: of the gradients at the projected queries, keys and values with the inputs,
and of the output gradient with the attention's context. Both come from one replay, with identities in place of the projections.

Legend: N samples, T positions of the query, S of key and value, E embedding width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward

from adabatch.grad_sample.factors.base import Dense, Factor, Outer

RandomState = tuple[Tensor, Tensor | None]
INPUTS = ("query", "key", "value", "key_padding_mask", "attn_mask")


def random_state(device: torch.device) -> RandomState:
    """The state of the host's generator, and of the device's if it has one of its own."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def unsupported_attention(layer: nn.MultiheadAttention) -> str | None:
    """What of the layer cannot be measured, with the cure."""
    if layer.bias_k is not None and layer.bias_k.requires_grad:
        return "trainable bias_k and bias_v are appended to every sample's sequence: build it with add_bias_kv=False, or freeze them"
    return None


class AttentionCall:
    """One call of nn.MultiheadAttention; answers like `RecomputedCall`."""

    def __init__(self, name: str, layer: nn.MultiheadAttention, parameters: Sequence[str], args: tuple, kwargs: dict, output: Any, state: RandomState | None):
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        self._options = {key: value for key, value in bound.arguments.items() if key not in INPUTS}
        self._present = [key for key in INPUTS if bound.arguments[key] is not None]
        if bound.arguments["query"].dim() != 3:
            raise RuntimeError(f"{name} got a query of shape {tuple(bound.arguments['query'].shape)} without a batch dimension: add one with unsqueeze")
        if layer.dropout and layer.training and state is None:
            raise RuntimeError(f"the dropout of {name} cannot be drawn again when it is compiled: set its dropout to 0, or do not compile it")
        self.tensors = [bound.arguments[key].detach() for key in self._present]
        self._self_attention = bound.arguments["query"] is bound.arguments["key"] is bound.arguments["value"]
        self.name, self.layer, self.parameters, self._state = name, layer, tuple(parameters), state
        self.tapped = [index for index, leaf in enumerate(output) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def factors(self, tensors: Sequence[Tensor], backprops: Sequence[Tensor], rows: Tensor | None) -> dict[str, Factor]:
        """Factors of the projections' weights and biases."""
        given = dict(zip(self._present, tensors, strict=True))
        outer = dict(zip(self.tapped, backprops, strict=True))
        inputs = [self._time_first(given[key]).to(self._weight.dtype) for key in ("query", "key", "value")]
        output_grad = self._time_first(outer[0]).to(self._weight.dtype)
        projected = [linear(x, *self._projection(index)).detach().requires_grad_() for index, x in enumerate(inputs)]
        context, grads = self._replay(projected, given, output_grad, outer.get(1))

        def split(tensor: Tensor) -> Tensor:
            samples = tensor.detach().transpose(0, 1)
            return samples if rows is None else samples.index_select(0, rows)

        left, right = [split(grad) for grad in grads], [split(x) for x in inputs]
        factors = {**self._input_factors(left, right), "out_proj.weight": Outer(split(output_grad), split(context))}
        factors["out_proj.bias"] = Dense(split(output_grad).sum(1))
        return {name: factors[name] for name in self.parameters}

    @property
    def _weight(self) -> Tensor:
        return self.layer.out_proj.weight

    def _time_first(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if self.layer.batch_first else tensor

    def _projection(self, index: int) -> tuple[Tensor, Tensor | None]:
        layer, bias = self.layer, self.layer.in_proj_bias
        if layer._qkv_same_embed_dim:
            weight = layer.in_proj_weight.detach().chunk(3)[index]
        else:
            weight = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)[index].detach()
        return weight, None if bias is None else bias.detach().chunk(3)[index]

    def _replay(self, projected: list[Tensor], given: dict[str, Tensor], output_grad: Tensor, weights_grad: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """The context [T, N, E] before the output projection, and the gradients at the projected queries, keys and values."""
        layer, width = self.layer, self.layer.embed_dim
        eye = torch.eye(width, dtype=self._weight.dtype, device=self._weight.device)
        devices = [eye.device] if eye.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self._state is not None), torch.enable_grad():
            if self._state is not None:
                torch.set_rng_state(self._state[0])
                if devices:
                    torch.cuda.set_rng_state(self._state[1], eye.device)
            context, weights = multi_head_attention_forward(
                *projected, width, layer.num_heads, None, None, layer.bias_k, layer.bias_v, layer.add_zero_attn, layer.dropout, eye, None,
                training=layer.training, key_padding_mask=given.get("key_padding_mask"), attn_mask=given.get("attn_mask"), use_separate_proj_weight=True,
                q_proj_weight=eye, k_proj_weight=eye, v_proj_weight=eye, need_weights=self._options["need_weights"],
                average_attn_weights=self._options["average_attn_weights"], is_causal=self._options["is_causal"],
            )  # fmt: skip
        context_grad = output_grad @ self._weight.detach()
        outputs, grads = ([context, weights], [context_grad, weights_grad]) if weights_grad is not None and weights is not None else ([context], [context_grad])
        return context, torch.autograd.grad(outputs, projected, grads)

    def _input_factors(self, left: list[Tensor], right: list[Tensor]) -> dict[str, Factor]:
        factors: dict[str, Factor] = {"in_proj_bias": Dense(torch.cat([grad.sum(1) for grad in left], dim=1))}
        if not self.layer._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return factors | {name: Outer(grad, x) for name, grad, x in zip(names, left, right, strict=True)}
        if self._self_attention:
            return factors | {"in_proj_weight": Outer(torch.cat(left, dim=2), right[0])}
        width = self.layer.embed_dim
        padded = [torch.nn.functional.pad(grad, (index * width, (2 - index) * width)) for index, grad in enumerate(left)]
        return factors | {"in_proj_weight": Outer(torch.cat(padded, dim=1), torch.cat(right, dim=1))}
