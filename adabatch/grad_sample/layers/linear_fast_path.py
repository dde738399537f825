"""The tap of a Linear with one vector per sample, the commonest layer: ‖a_n b_nᵀ‖² = ‖a_n‖² ‖b_n‖², and the latter serves the bias as well.

In eager mode, for a layer whose own parameters are all trained and measured, where no kernel does both norms in one pass. It says and checks what
PassthroughTap does, in a few calls: of a small step, Python's share is what measuring costs.

Legend: N samples in the batch, S rows measured, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch.grad_sample.backward.recorder import signal_gradient
from adabatch.grad_sample.compat import autocast_disabled
from adabatch.grad_sample.layers.linear import linear_grad_sample
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.taps.base import DOUBLE_BACKWARD, TapSite, defer_factors
from adabatch.kernels.operators import accumulation_dtype


def has_vectors(site: TapSite, layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether the layer, outside compiled graphs, is to get the tap for vectors. What cannot change while the layer keeps its parameters is looked at
    once."""
    own, stash = layer._parameters, site.stash
    weight, bias = own.get("weight"), own.get("bias")
    if site.vectors is None or site.vectors[0] is not weight or site.vectors[1] is not bias:
        site.vectors = weight, bias, _is_plain(site, weight, bias, output)
    if not site.vectors[2] or site.deferred or stash.second_moments is not None or stash.shares is not None:
        return False
    return inputs.dim() == 2 and type(output) is Tensor and weight.requires_grad and (bias is None or bias.requires_grad)


def _is_plain(site: TapSite, weight: Tensor | None, bias: Tensor | None, output: Tensor) -> bool:
    """Whether it is a Linear of samples first, with parameters of its own that are all measured, on a device without a kernel for both norms."""
    if site.sampler is None or site.sampler.rule is not linear_grad_sample or site.layout is not Layout.BATCH_FIRST:
        return False
    own = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    return own and len(site.parameters) == (1 if bias is None else 2) and not kernels.has_kernel("outer_sq_norms", output)


def listen_to_vectors(site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, report: Tensor) -> Tensor:
    """The layer's output behind its tap."""
    return _apply(output, (inputs if rows is None else inputs.detach().index_select(0, rows),), rows, report, site)


class LinearVectorTap(torch.autograd.Function):
    """Identity on the output [N, O]; in backward, the layer's norms are reported.

    forward(output, (activations [S, I],), rows [S] or None for all, report, site); the output is marked dirty, as by PassthroughTap. The activations come in a
    tuple, so that autograd takes them for no input of the tap.
    """

    @staticmethod
    def forward(ctx, output, activations, rows, report, site):
        ctx.mark_dirty(output)
        ctx.save_for_backward(*activations)
        ctx.rows, ctx.site, ctx.signal, ctx.dtype = rows, site, signal_gradient(report), report.dtype
        return output

    @staticmethod
    def backward(ctx, backprops):
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site, (activations,) = ctx.site, ctx.saved_tensors
        measured = backprops if ctx.rows is None else backprops.index_select(0, ctx.rows)
        roots = ()
        if site.deferred or site.calls > 1:
            with autocast_disabled(backprops.device):
                defer_factors(site, site.sampler.rule(site.layer, activations.detach(), measured), ctx.rows)
        else:
            roots = _norms(site, activations, measured, ctx.dtype)
        return backprops, None, None, ctx.signal if site.stash.report(site.index, backprops.shape[0], roots) else None, None


_norm = torch.linalg.vector_norm
# What LinearVectorTap.apply comes to where no torch.func transform is at work, as can_measure() has seen.
_apply = super(torch.autograd.Function, LinearVectorTap).apply


def _norms(site: TapSite, activations: Tensor, backprops: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """(probe row, norms [S]): ‖a_n‖ ‖b_n‖ for the weight, ‖b_n‖ for the bias."""
    if activations.dtype is backprops.dtype is dtype:
        left, right = _norm(activations, dim=1), _norm(backprops, dim=1)
        return [(row, right if name == "bias" else left * right) for name, row in site.rows.items()]
    inner = accumulation_dtype(activations, backprops)
    left, right = _norm(activations, dim=1, dtype=inner), _norm(backprops, dim=1, dtype=inner)
    return [(row, (right if name == "bias" else left * right).to(dtype)) for name, row in site.rows.items()]
