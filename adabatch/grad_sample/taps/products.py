"""Products of samples with a weight (linear, addmm, mm, matmul) that no layer with a rule makes:
their whole backward pass, in which the weight gradient comes out of what the norms need.

Legend: N samples, T positions, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adabatch import kernels
from adabatch.grad_sample.backward.recorder import BackwardRecorder
from adabatch.grad_sample.functional import TracedOp
from adabatch.grad_sample.functional.expression import versions_of
from adabatch.grad_sample.registry import FusedResult
from adabatch.grad_sample.taps.base import CHANGED, Tap, TapSite, autocast_disabled


def may_fuse(
    operation: TracedOp, inputs: Tensor | None, output: Tensor, recorder: BackwardRecorder
) -> bool:
    """Whether all samples of such a product over several positions are measured, with nothing but
    their norms, of parameters that it uses as they are."""
    if operation.product is None or inputs is None or recorder.defers or recorder.statistics:
        return False
    if not (inputs.dim() > 2 or operation.flat) or inputs.layout is not torch.strided:
        return False
    own = operation.parameters.values()
    return output.requires_grad and all(
        type(each) is nn.Parameter and each.requires_grad
        and each.dtype == inputs.dtype == output.dtype for each in own)


class ProductTap(Tap):
    """Replaces the backward node of a product; what it needs is kept as by RecomputeTap.

    forward(output, inputs, weight, bias, report, site, operation): the detached output.
    """

    @staticmethod
    def forward(ctx, output, inputs, weight, bias, report, site, operation):
        Tap.place(ctx, site, report, operation.n_samples, ())
        ctx.operation, ctx.needs_inputs = operation, inputs.requires_grad
        ctx.kept = operation.tensors[0], weight.detach()
        ctx.versions = versions_of(ctx.kept)
        return Tap.pass_on(ctx, output)

    @staticmethod
    def backward(ctx, backprops):
        site, operation = ctx.site, ctx.operation
        if operation.active:
            Tap.check()
        if ctx.versions != versions_of(ctx.kept):
            raise RuntimeError(CHANGED.format(name=operation.name))
        (inputs, weight), product, recorder = ctx.kept, operation.product, site.recorder
        measures = operation.active and not recorder.discards
        single = measures and all(map(site.uses.is_single, operation.parameters))
        with autocast_disabled(backprops.device):
            grad_inputs = None
            if ctx.needs_inputs:
                grad_inputs = backprops @ (weight if product.output_first else weight.mT)
            a_NTI, b_NTO = (operation.split(each).flatten(1, -2) for each in (inputs, backprops))
            sides = (a_NTI, b_NTO) if product.output_first else (b_NTO, a_NTI)
            norms: dict[str, Tensor] = {}
            if single:
                grad, norms[product.weight], _ = kernels.weight_grad_moments(*sides)
            else:
                grad = sides[1].flatten(0, 1).mT @ sides[0].flatten(0, 1)
            grads = {product.weight: grad.to(weight.dtype)}
            if product.bias:
                rows = b_NTO.sum(1)
                grads[product.bias] = rows.sum(0)
                if single:
                    norms[product.bias] = kernels.row_sq_norms(rows, rows.dtype)
            if measures:
                _report(ctx, site, operation, backprops, grads, norms)
        report = None
        if operation.active:
            report = Tap.call_report(ctx, site, operation.n_samples, backprops)
        bias = grads[product.bias] if product.bias else None
        return None, grad_inputs, grads[product.weight], bias, report, None, None


def _report(
    ctx: object, site: TapSite, operation: TracedOp, backprops: Tensor, grads: dict[str, Tensor],
    norms: dict[str, Tensor],
) -> None:
    uses, n_samples = site.uses, operation.n_samples
    assert uses is not None
    if norms:
        uses.report_fused(FusedResult(None, grads, norms), n_samples, backprops.dtype)
        squares = {name: value.sum() for name, value in norms.items()}
    else:
        factors = operation.factors(operation.tensors, [backprops], None)
        uses.report(factors, n_samples, backprops.dtype)
        squares = {name: factor.sq_norms().sum() for name, factor in factors.items()}
    if site.recorder.sum_check.observes(ctx):  # type: ignore[arg-type]
        names = {name: name for name in grads}
        site.recorder.sum_check.observe(names, grads, squares, backprops.dtype)


def fuse_product(
    operation: TracedOp, inputs: Tensor, output: Tensor, report: Tensor, site: TapSite
) -> Tensor:
    """The output behind a ProductTap."""
    product = operation.product
    assert product is not None
    bias = operation.parameters[product.bias] if product.bias else None
    weight = operation.parameters[product.weight]
    return ProductTap.apply(output.detach(), inputs, weight, bias, report, site, operation)
