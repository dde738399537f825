"""The CPU's forms of the kernels against their definitions."""

import itertools

import pytest
import torch

from adabatch.distributed.grad_norms import grad_sq_norms
from adabatch.kernels import cpu, reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}
CONVOLUTIONS = [
    # samples, channels, inputs, width_out, kernel, stride, padding, dilation, groups
    (5, 3, (9, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (5, 3, (9, 8), 4, (3, 2), (2, 3), (2, 1), (2, 1), 1),
    (3, 6, (20, 21), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (3, 6, (7, 7), 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (3, 4, (7, 7), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (4, 2, (11,), 3, (4,), (3,), (1,), (2,), 1),
    (2, 2, (4, 5, 3), 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1),
    (0, 3, (6, 6), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (18, 6, (20, 21), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
]
# Few positions and many channels: norms come from Gram matrices.
GRAM = [
    (5, 60, (4, 5), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 70, (5, 4), 80, (3, 2), (2, 1), (2, 1), (1, 2), 1),
    (3, 40, (2, 3), 50, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (4, 50, (9,), 60, (4,), (3,), (1,), (2,), 1),
    (2, 40, (2, 3, 2), 60, (2, 2, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1),
]


def close(actual, expected, rtol):
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 7, 3), (4, 2, 64, 32), (4, 13, 6, 5), (3, 9, 400, 400), (1, 5, 3, 2), (0, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("second_moment", [False, True])
def test_linear(shape, dtype, second_moment):
    samples, positions, width_in, width_out = shape
    torch.manual_seed(0)
    a, b = torch.randn(samples, positions, width_in).to(dtype), torch.randn(samples, positions, width_out).to(dtype)
    actual = cpu.weight_grad_moments(a, b, second_moment=second_moment)
    per_sample = torch.einsum("nto,nti->noi", b.double(), a.double())
    expected = per_sample.sum(0), per_sample.flatten(1).square().sum(1), per_sample.square().sum(0)
    for got, wanted in itertools.islice(zip(actual, expected, strict=True), 2 + second_moment):
        close(got.double(), wanted.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*CONVOLUTIONS, *GRAM], ids=str)
def test_convolution(case, dtype):
    samples, channels, sizes, width_out, kernel, stride, padding, dilation, groups = case
    torch.manual_seed(0)
    a = torch.randn(samples, channels, *sizes).to(dtype)
    weight_shape = (width_out, channels // groups, *kernel)
    reaches = [gap * (length - 1) for gap, length in zip(dilation, kernel, strict=True)]
    outputs = [(size + 2 * pad - reach - 1) // step + 1 for size, pad, reach, step in zip(sizes, padding, reaches, stride, strict=True)]
    b = torch.randn(samples, width_out, *outputs).to(dtype)
    geometry = (weight_shape, stride, padding, dilation, groups)
    grad, sq_norms, second = cpu.conv_weight_grad_moments(a, b, *geometry, second_moment=True)
    per_sample = reference.conv_grad_sample(a.double(), b.double(), *geometry)
    close(grad.double(), per_sample.sum(0), TOLERANCE[dtype])
    close(sq_norms.double(), per_sample.flatten(1).square().sum(1), TOLERANCE[dtype])
    close(second.double(), per_sample.square().sum(0), TOLERANCE[dtype])
    assert cpu.conv_gram_is_cheaper(a.shape, b.shape, kernel, stride, padding, groups) == (case in GRAM)
    grad, norms, second = cpu.conv_weight_grad_moments(a, b, *geometry)
    assert second is None
    close(grad.double(), per_sample.sum(0), TOLERANCE[dtype])
    close(norms.double(), sq_norms.double(), TOLERANCE[dtype])
    if samples:
        close(cpu.conv_sq_norms(a, b, *geometry).double(), sq_norms.double(), TOLERANCE[dtype])
    if samples and groups == 1:
        close(cpu.conv_gram_sq_norms(a, b, kernel, stride, padding, dilation).double(), sq_norms.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 7), (3, 1, 6), (2, 9, 1), (40, 300, 64), (0, 3, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("channels_first", [False, True])
def test_scale_and_shift(shape, dtype, channels_first):
    torch.manual_seed(0)
    samples, positions, width = shape
    a, b = torch.randn(2, samples, width, positions).to(dtype).mT if channels_first else torch.randn(2, *shape).to(dtype)
    expected = (a.double() * b.double()).sum(1), b.double().sum(1)
    for actual, wanted in zip(cpu.affine_grad_sample(a, b, None, None), expected, strict=True):
        close(actual.double(), wanted, TOLERANCE[dtype])
    for actual, wanted in zip(cpu.affine_sq_norms(a, b, None, None), expected, strict=True):
        close(actual.double(), wanted.square().sum(1), TOLERANCE[dtype])


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_norms_of_millions_of_elements_are_exact(module):
    """One float32 sum of so many squares would be 8e-5 too small."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 1536), torch.randn(2, 40, 1536)
    expected = torch.einsum("nto,nti->noi", b.double(), a.double()).flatten(1).square().sum(1)
    close(module.weight_grad_moments(a, b, second_moment=True)[1].double(), expected, 1e-6)
    grads = torch.randn(2, 1536, 1536)
    close(reference.dense_sq_norms(grads).double(), grads.double().flatten(1).square().sum(1), 1e-6)
    parameter = torch.nn.Parameter(grads[0])
    parameter.grad = grads[1]
    close(grad_sq_norms([[parameter]]).double(), grads[1].double().square().sum().view(1), 1e-6)
