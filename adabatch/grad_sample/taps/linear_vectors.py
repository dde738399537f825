"""The tap of a Linear with one vector per sample, the commonest layer: ‖a_n b_nᵀ‖² = ‖a_n‖² ‖b_n‖²,
and the latter serves the bias as well.

It reports and checks what PassthroughTap does, in a few calls: in a small step, Python's part is
what measuring costs (examples/benchmarks/overhead.py, model a).

Legend: N samples in the batch, S rows measured, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch.grad_sample.backward.recorder import signal_gradient
from adabatch.grad_sample.backward.verify import squares
from adabatch.grad_sample.layers.linear import linear_grad_sample
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.taps.base import DOUBLE_BACKWARD, Tap, TapSite, autocast_disabled
from adabatch.kernels import accumulation_dtype


def has_vectors(site: TapSite, layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether the layer gets this tap: in eager mode, its own parameters all trained and measured,
    no other statistic, no kernel for both norms. What its parameters decide is checked once."""
    own, recorder = layer._parameters, site.recorder
    weight, bias = own.get("weight"), own.get("bias")
    known = site.vectors
    if known is None or known[0] is not weight or known[1] is not bias:
        known = site.vectors = weight, bias, _is_plain(site, weight, bias, output)
    if not known[2] or site.deferred or recorder.statistics:
        return False
    if recorder.norm_weights is not None or inputs.dim() != 2 or type(output) is not Tensor:
        return False
    return weight.requires_grad and (bias is None or bias.requires_grad)  # type: ignore[union-attr]


def _is_plain(site: TapSite, weight: Tensor | None, bias: Tensor | None, output: Tensor) -> bool:
    if site.sampler is None or site.sampler.rule is not linear_grad_sample:
        return False
    own = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    measured = len(site.parameters) == (1 if bias is None else 2)
    first = site.layout is Layout.BATCH_FIRST
    return own and measured and first and not kernels.has_kernel("outer_sq_norms", output)


class LinearVectorTap(Tap):
    """forward(output [N, O], (activations [S, I],), rows [S] or None for all, report, site); the
    activations in a tuple, so that autograd takes them for no input of the tap, with all rows
    behind them where they are kept besides."""

    @staticmethod
    def forward(ctx, output, activations, rows, report, site):
        ctx.mark_dirty(output)
        ctx.save_for_backward(*activations)
        ctx.rows, ctx.site = rows, site
        ctx.signal, ctx.dtype = signal_gradient(report), report.dtype
        return output

    @staticmethod
    def backward(ctx, backprops):
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        site, (activations, *whole) = ctx.site, ctx.saved_tensors
        measured = backprops if ctx.rows is None else backprops.index_select(0, ctx.rows)
        norms: list[tuple[int, Tensor]] = []
        if site.must_defer:
            with autocast_disabled(backprops.device):
                site.defer(site.sampler.rule(site.layer, activations.detach(), measured))
        else:
            norms = _norms(site, activations, measured, ctx.dtype)
        if site.recorder.sum_check.observes(ctx):
            with autocast_disabled(backprops.device):
                rule, inputs = site.sampler.rule, activations.detach()
                sq_norms = squares(rule(site.layer, inputs, measured), len(backprops))
                factors = rule(site.layer, *whole or (inputs,), backprops)
                site.recorder.sum_check.observe(
                    site.parameters, factors, sq_norms, backprops.dtype)
        first = site.recorder.record_call(site.index, backprops.shape[0], norms)
        return backprops, None, None, ctx.signal if first else None, None


_norm = torch.linalg.vector_norm
# What LinearVectorTap.apply comes to where no torch.func transform is active, as the caller knows.
_apply = super(torch.autograd.Function, LinearVectorTap).apply


def pass_vectors(
    site: TapSite, inputs: Tensor, output: Tensor, rows: Tensor | None, report: Tensor
) -> Tensor:
    """The layer's output behind its tap."""
    if rows is None:
        return _apply(output, (inputs,), rows, report, site)
    inputs = inputs.detach()
    kept = (inputs,) if site.recorder.sum_check.keeps(site.layer, inputs, output) else ()
    return _apply(output, (inputs.index_select(0, rows), *kept), rows, report, site)


def _norms(
    site: TapSite, activations: Tensor, backprops: Tensor, dtype: torch.dtype
) -> list[tuple[int, Tensor]]:
    """(probe row, norms [S]): ‖a_n‖ ‖b_n‖ for the weight, ‖b_n‖ for the bias."""
    if activations.dtype is backprops.dtype is dtype:
        left, right = _norm(activations, dim=1), _norm(backprops, dim=1)
        return [(row, right if name == "bias" else left * right)
                for name, row in site.rows.items()]
    inner = accumulation_dtype(activations, backprops)
    left, right = _norm(activations, dim=1, dtype=inner), _norm(backprops, dim=1, dtype=inner)
    return [(row, (right if name == "bias" else left * right).to(dtype))
            for name, row in site.rows.items()]
