"""Taking taps: the layer's own backward node is dropped, and its weight gradient comes out of the per-sample gradients that the norms need anyhow.

Legend: N samples in the batch, S rows measured, T positions, I in, O out, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch._engine import running_backward
from adabatch.grad_sample.compat import autocast_disabled
from adabatch.grad_sample.cost import layer_cost
from adabatch.grad_sample.layers.conv import symmetric_padding
from adabatch.grad_sample.layers.group_norm_tap import can_take_norm, take_norm
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.taps.base import DOUBLE_BACKWARD, TapSite, defer_factors, record_call, report_norms, saved_signal
from adabatch.kernels.operators import accumulation_dtype

TAKEN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)
# Decisions remembered for each layer; what activation checkpointing runs again must get the tap that it had, whatever came between.
MOST_SHAPES = 256


def takes_over(site: TapSite, layer: nn.Module, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int, second_moment: bool) -> bool:
    """Whether the layer's backward pass is to be taken over: for layers whose gradients are known here in full, and where the cost model says that it pays.

    A layer listens if a parameter of it is frozen, not measured, or used elsewhere, or if its weight is not a parameter of its own. What activation
    checkpointing runs again gets the tap that it had.
    """
    if torch.compiler.is_compiling():
        return rows is None and _is_known(site, layer, inputs, output, True)
    key = (inputs.shape, output.shape, n_samples if rows is None else len(rows))
    if running_backward() == -1:
        site.shapes = tuple(_samples_first(site, tensor, n_samples) for tensor in (inputs, output))
        if key not in site.pays:
            if len(site.pays) >= MOST_SHAPES:
                site.pays.clear()
                site.taken.clear()
            site.pays[key] = isinstance(layer, nn.GroupNorm) or layer_cost(layer, *site.shapes).fused_is_cheaper(n_samples, key[2])
        known = site.pays[key] and not (second_moment and rows is not None)
        site.takes = site.taken[key] = known and _is_known(site, layer, inputs, output, rows is None)
    elif isinstance(layer, nn.GroupNorm):
        return False
    return site.taken.get(key, site.takes)


def _samples_first(site: TapSite, tensor: Tensor, n_samples: int) -> tuple[int, ...]:
    """The tensor's shape, [N, ...]."""
    return tuple(tensor.shape) if site.layout is Layout.BATCH_FIRST else (n_samples, tensor.numel() // max(1, n_samples))


def _is_known(site: TapSite, layer: nn.Module, inputs: Tensor, output: Tensor, all_rows: bool) -> bool:
    if not isinstance(layer, TAKEN) or site.deferred or site.layout is Layout.SHARED or not output.requires_grad:
        return False
    own = {name: parameter for name, parameter in layer._parameters.items() if parameter is not None}
    if own.keys() != site.parameters.keys() or not all(parameter.requires_grad for parameter in own.values()):
        return False
    if isinstance(layer, nn.GroupNorm):
        return all_rows and site.layout is Layout.BATCH_FIRST and can_take_norm(layer, inputs, output)
    if isinstance(layer, nn.Linear):
        return inputs.dim() > 2 or (inputs.dim() == 2 and site.layout is not Layout.BATCH_FIRST)
    return site.layout is Layout.BATCH_FIRST and inputs.dim() == len(layer.kernel_size) + 2 and symmetric_padding(layer) is not None


def take(site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, n_samples: int, report: Tensor, extras: list[Tensor]) -> Tensor:
    """The layer's output behind a taking tap."""
    if isinstance(site.layer, nn.GroupNorm):
        return take_norm(site, inputs, output, report, extras)
    saved = inputs.detach()
    if saved.dtype != output.dtype:
        saved = saved.to(output.dtype)  # what autocast ran the layer with, and would have saved
    weight, bias = (site.layer._parameters[name] for name in ("weight", "bias"))
    told = None if site.layout.stores_batch_size else n_samples
    return FusedBackwardTap.apply(output.detach(), inputs, weight, bias, saved, rows, report, site, told, *extras)


class FusedBackwardTap(torch.autograd.Function):
    """Identity on the detached output; in backward, the gradients of the layer's input, weight and bias; the norms are reported.

    forward(output, inputs, weight, bias, saved, rows, report, site, n_samples, *extras): `saved` is the input as the layer computed with it; the others
    are as PassthroughTap's.
    """

    @staticmethod
    def forward(ctx, output, inputs, weight, bias, saved, rows, report, site, n_samples, *extras):
        if torch.compiler.is_compiling():
            output = output.clone()  # no copy once compiled; an input returned as it is would forbid in-place operations behind the compiled part
        else:
            ctx.mark_dirty(output)
        ctx.save_for_backward(saved, weight, rows)
        ctx.site, ctx.n_samples, ctx.needs_inputs, ctx.input_dtype = site, n_samples, inputs.requires_grad, inputs.dtype
        ctx.signal, ctx.dtype, ctx.n_extras = saved_signal(report), report.dtype, len(extras)
        return output

    @staticmethod
    def backward(ctx, backprops):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site, (saved, weight, rows) = ctx.site, ctx.saved_tensors
        layer = site.layer
        with autocast_disabled(backprops.device):
            n_samples = site.layout.size(backprops) if ctx.n_samples is None else ctx.n_samples
            grad_inputs = _input_grad(layer, saved, weight, backprops).to(ctx.input_dtype) if ctx.needs_inputs else None
            a, b = site.layout.split(saved, n_samples), site.layout.split(backprops, n_samples)
            second_moments = site.stash.second_moments
            if site.deferred or site.calls > 1:
                grads = _plain_grads(layer, saved, weight, backprops)
                pick = (a, b) if rows is None else (a.index_select(0, rows), b.index_select(0, rows))
                defer_factors(site, site.sampler.rule(layer, *pick), rows)
                extras = [None] * ctx.n_extras
            else:
                grads, norms, moments = _grads_and_norms(layer, a, b, second_moment=second_moments is not None)
                if rows is not None:
                    norms = {name: value.index_select(0, rows) for name, value in norms.items()}
                extras = report_norms(site, norms, n_samples if rows is None else rows.shape[0], ctx.dtype)
                extras += [second_moments.of_whole(full, moments[name]) for name, full in site.parameters.items() if second_moments is not None]
        grad_bias = grads["bias"].to(weight.dtype) if "bias" in grads else None
        report = record_call(site, n_samples, ctx.signal, backprops, ctx.dtype)
        return None, grad_inputs, grads["weight"].to(weight.dtype), grad_bias, None, None, report, None, None, *extras


Grads = dict[str, Tensor]


def _input_grad(layer: nn.Module, inputs: Tensor, weight: Tensor, backprops: Tensor) -> Tensor:
    """The gradient of the layer's input, as the library computes it."""
    weight = weight.to(backprops.dtype)
    if isinstance(layer, nn.Linear):
        return backprops.matmul(weight)
    return _convolution_backward(layer, inputs, weight, backprops, (True, False))[0]


def _plain_grads(layer: nn.Module, inputs: Tensor, weight: Tensor, backprops: Tensor) -> Grads:
    """The parameters' gradients without per-sample ones."""
    if isinstance(layer, nn.Linear):
        flat = backprops.flatten(0, -2)
        grads, bias_grad = {"weight": flat.T @ inputs.flatten(0, -2).to(flat.dtype)}, flat.sum(0)
    else:
        grads = {"weight": _convolution_backward(layer, inputs, weight.to(backprops.dtype), backprops, (False, True))[1]}
        bias_grad = backprops.sum([0, *range(2, backprops.dim())])
    return grads if layer.bias is None else {**grads, "bias": bias_grad}


def _convolution_backward(layer: Any, inputs: Tensor, weight: Tensor, backprops: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    padding = list(symmetric_padding(layer))
    geometry = (list(layer.stride), padding, list(layer.dilation), False, [0] * len(padding), layer.groups)
    return torch.ops.aten.convolution_backward(backprops, inputs.to(backprops.dtype), weight, None, *geometry, [*wanted, False])


def _grads_and_norms(layer: nn.Module, a: Tensor, b: Tensor, second_moment: bool) -> tuple[Grads, Grads, Grads]:
    """{parameter: gradient}, {parameter: squared norms [N]} and {parameter: Σ_n G_n²}, from activations and backprops with the samples first."""
    if isinstance(layer, nn.Linear):
        a, b = (tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2) for tensor in (a, b))
        weight = kernels.weight_grad_moments(a, b, second_moment=second_moment)
        positions = 1
    else:
        geometry = (tuple(layer.weight.shape), tuple(layer.stride), symmetric_padding(layer), tuple(layer.dilation), layer.groups)
        weight = kernels.conv_weight_grad_moments(a, b, *geometry, second_moment=second_moment)
        b, positions = b.flatten(2), 2
    found = {"weight": weight}
    if layer.bias is not None:
        per_sample = b.sum(positions, dtype=accumulation_dtype(b))
        second = kernels.dense_second_moment(per_sample) if second_moment else None
        found["bias"] = (per_sample.sum(0), kernels.dense_sq_norms(per_sample), second)
    return tuple({name: values[index] for name, values in found.items()} for index in range(3))
