"""The taking tap of group normalization: its library backward pass gives each sample's scale and shift gradients, if every sample's channels are its own.

Legend: N samples, C channels, S positions, G groups.

The backward pass of an input [N, C, S] sums the gradients of scale and shift over N. The same pass over [1, N C, S] in N G groups, with the scale repeated,
does the same arithmetic for the input's gradient and has nothing to sum over: N C gradients come out, in place of C. The mean and 1/σ of each group are
those that the layer's own node has saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch.grad_sample.compat import autocast_disabled
from adabatch.grad_sample.factors.base import Dense
from adabatch.grad_sample.taps.base import DOUBLE_BACKWARD, TapSite, defer_factors, record_call, report_norms, saved_signal

NODE = "NativeGroupNormBackward0"
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def can_take_norm(layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether the layer's saved statistics may be read and its memory seen as [1, N C, S]: on a CPU in eager mode, outside activation checkpointing and other
    hooks on saved tensors, which would take the reading for the backward pass."""
    if torch.compiler.is_compiling() or inputs.device.type != "cpu" or _top_hooks is None or _top_hooks(False) is not None:
        return False
    one_type = inputs.dtype == output.dtype == layer.weight.dtype and inputs.dtype in (torch.float32, torch.float64)
    return one_type and output.grad_fn.name() == NODE and inputs.numel() > 0 and inputs.is_contiguous()


def take_norm(site: TapSite, inputs: Tensor, output: Tensor, report: Tensor, extras: list[Tensor]) -> Tensor:
    """The layer's output behind a taking tap."""
    node, layer = output.grad_fn, site.layer
    statistics = node._saved_result1.detach(), node._saved_result2.detach()
    return GroupNormTap.apply(output.detach(), inputs, layer.weight, layer.bias, inputs.detach(), *statistics, report, site, *extras)


class GroupNormTap(torch.autograd.Function):
    """Identity on the detached output; in backward, the gradients of input, scale and shift; the norms are reported.

    forward(output, inputs, weight, bias, saved, mean, rstd, report, site, *extras), all samples measured; the rest as in FusedBackwardTap.
    """

    @staticmethod
    def forward(ctx, output, inputs, weight, bias, saved, mean, rstd, report, site, *extras):
        ctx.mark_dirty(output)
        ctx.save_for_backward(saved, weight, mean, rstd)
        ctx.site, ctx.needs_inputs, ctx.dtype, ctx.n_extras = site, inputs.requires_grad, report.dtype, len(extras)
        ctx.signal = saved_signal(report)
        return output

    @staticmethod
    def backward(ctx, backprops):
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site, (saved, weight, mean, rstd) = ctx.site, ctx.saved_tensors
        samples, channels = saved.shape[:2]
        rows, groups = samples * channels, mean.numel()
        with autocast_disabled(backprops.device):
            grad_inputs, *per_sample = torch.ops.aten.native_group_norm_backward(
                backprops.to(saved.dtype).contiguous(), saved, mean, rstd, weight.repeat(samples), 1, rows, saved.numel() // rows, groups,
                [ctx.needs_inputs, True, True],
            )  # fmt: skip
            factors = {name: Dense(grad.view(samples, channels)) for name, grad in zip(("weight", "bias"), per_sample, strict=True)}
            if site.deferred or site.calls > 1:
                defer_factors(site, factors, None)
                extras = [None] * ctx.n_extras
            else:
                extras = report_norms(site, {name: factor.sq_norms() for name, factor in factors.items()}, samples, ctx.dtype)
                if site.stash.second_moments is not None:
                    moments = {name: kernels.dense_second_moment(factor.grad) for name, factor in factors.items()}
                    extras += [site.stash.second_moments.of_whole(full, moments[name]) for name, full in site.parameters.items()]
        grads = (factor.grad.sum(0) for factor in factors.values())
        grad_inputs = None if grad_inputs is None else grad_inputs.view_as(saved)
        return None, grad_inputs, *grads, None, None, None, record_call(site, samples, ctx.signal, backprops, ctx.dtype), None, *extras
