"""The definitions of the fused kernels, against gradients written out sample by sample in float64, and against autograd."""

import doctest

import pytest
import torch
from torch.nn import functional as F

from adabatch import kernels
from adabatch.kernels import operators, reference_moments
from tests.kernels.test_reference import CONV_SHAPES, DTYPES, check_compiled_once, close, conv_shapes, dtypes, make_conv, make_outer, shapes


def check_moments(results, grads, dtype):
    weight_grad, sq_norms, second_moment = results
    close(weight_grad, grads.sum(0), DTYPES[dtype])
    close(sq_norms, grads.flatten(1).square().sum(1) if len(grads) else grads.new_zeros(0), DTYPES[dtype])
    close(second_moment, grads.square().sum(0), DTYPES[dtype])


@dtypes
@shapes
def test_weight_grad_moments(shape, dtype):
    activations, backprops, grads = make_outer(shape, dtype)
    check_moments(kernels.weight_grad_moments(activations, backprops, second_moment=True), grads, dtype)
    assert kernels.weight_grad_moments(activations, backprops)[2] is None


@dtypes
@conv_shapes
def test_conv_weight_grad_moments(shape, dtype):
    activations, backprops, weight_shape, geometry, grads = make_conv(shape, dtype)
    check_moments(kernels.conv_weight_grad_moments(activations, backprops, weight_shape, *geometry, second_moment=True), grads, dtype)


@dtypes
@shapes
def test_preconditioned_trace(shape, dtype):
    activations, backprops, grads = make_outer(shape, dtype)
    preconditioner = torch.rand(grads.shape[1:], dtype=dtype)
    close(kernels.preconditioned_trace(activations, backprops, preconditioner), (preconditioner.double() * grads.square()).sum(), DTYPES[dtype])


def by_autograd(normalize, inputs, backprops, width):
    """Squared norms of scale and shift, one backward pass per sample."""
    norms = []
    for row, b in zip(inputs, backprops, strict=True):
        scale = torch.ones(width, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(width, dtype=torch.float64, requires_grad=True)
        norms.append([grad.square().sum() for grad in torch.autograd.grad(normalize(row[None], scale, shift), (scale, shift), b[None])])
    return [torch.stack(column) for column in zip(*norms, strict=True)]


def test_affine_sq_norms_of_a_layer_norm():
    torch.manual_seed(0)
    inputs, backprops = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = by_autograd(lambda x, scale, shift: F.layer_norm(x, (5,), scale, shift), inputs, backprops, 5)
    mean, rstd = inputs.mean(2, keepdim=True), (inputs.var(2, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    for actual, norms in zip(kernels.affine_sq_norms(inputs, backprops, mean, rstd), expected, strict=True):
        close(actual, norms, 1e-10)


def test_affine_sq_norms_of_an_rms_norm():
    torch.manual_seed(0)
    inputs, backprops = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = by_autograd(lambda x, scale, shift: F.rms_norm(x, (5,), scale, 1e-5) + 0 * shift, inputs, backprops, 5)[0]
    close(kernels.affine_sq_norms(inputs, backprops, None, (inputs.square().mean(2, keepdim=True) + 1e-5).rsqrt())[0], expected, 1e-10)


def test_affine_sq_norms_of_a_batch_norm_by_running_statistics():
    torch.manual_seed(0)
    inputs, backprops = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    expected = by_autograd(lambda x, scale, shift: F.batch_norm(x, mean, variance, scale, shift), inputs, backprops, 4)
    statistics = mean.view(1, 1, 4), (variance + 1e-5).rsqrt().view(1, 1, 4)
    for actual, norms in zip(kernels.affine_sq_norms(inputs.flatten(2).mT, backprops.flatten(2).mT, *statistics), expected, strict=True):
        close(actual, norms, 1e-10)


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"rstd has shape \(4,\); for activations \(2, 3, 4\) allowed are \(2, 3, 1\), \(2, 1, 4\), \(1, 3, 1\), \(1, 1, 4\)"):
        kernels.affine_sq_norms(torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, torch.ones(4))


def test_moments_compile_once_for_all_batch_sizes():
    def moments(activations, backprops):
        return (
            *kernels.weight_grad_moments(activations, backprops, second_moment=True),
            kernels.preconditioned_trace(activations, backprops, torch.ones(4, 3)),
            *kernels.affine_sq_norms(activations, activations, None, activations.square().mean(2, keepdim=True)),
        )

    check_compiled_once(moments, lambda samples: make_outer((samples, 5, 3, 4), torch.float32)[:2])


def test_conv_moments_compile_once_for_all_batch_sizes():
    shape = CONV_SHAPES["2d"]
    _, _, weight_shape, geometry, _ = make_conv(shape, torch.float32)
    check_compiled_once(
        lambda a, b: kernels.conv_weight_grad_moments(a, b, weight_shape, *geometry, second_moment=True),
        lambda samples: make_conv(((samples, *shape[0][1:]), *shape[1:]), torch.float32)[:2],
    )


@pytest.mark.parametrize("module", [reference_moments, operators], ids=lambda module: module.__name__)
def test_examples_in_the_documentation(module):
    failed, _ = doctest.testmod(module)
    assert failed == 0
