"""Which of the CPU's forms runs; their results are tested with the definitions'."""

import pytest
import torch

from adabatch.kernels import cpu_conv, operators
from tests.kernels import cases


@pytest.mark.parametrize("name", cases.CONV)
def test_the_cases_of_a_convolution_run_each_form(name):
    a, b, weight_shape, geometry, _ = cases.conv(cases.CONV[name], torch.float32)
    *_, padding, _, groups = geometry
    shapes = a.shape, b.shape, weight_shape, padding, groups
    form = cpu_conv.conv_form(*shapes, with_gradient=False)
    if name.endswith(("gram", "windows")):
        assert form == name.split("-")[-1]
    if groups > 1 or len(a) == 0:
        assert form == "groups"
    both = cpu_conv.conv_form(*shapes, with_gradient=True, second_moment=True)
    assert both != "gram"


@pytest.mark.parametrize("form", ["gram", "windows", "groups", "calls"])
@pytest.mark.parametrize("name", [name for name, shape in cases.CONV.items() if shape[-1] == 1])
def test_each_form_serves_every_case_of_one_group(name, form):
    torch.manual_seed(0)
    a, b, weight_shape, geometry, grads = cases.conv(cases.CONV[name], torch.float64)
    with operators.forced_form(form):
        total, norms, _ = operators.OPERATIONS["conv_weight_grad_moments"].call(
            a, b, weight_shape, *geometry)
        beside = operators.OPERATIONS["conv_sq_norms"].call(a, b, weight_shape, *geometry)
    torch.testing.assert_close(total, grads.sum(0))
    for found in (norms, beside):
        torch.testing.assert_close(found, grads.flatten(1).square().sum(1))


def test_images_of_few_channels_under_large_kernels_take_a_call_a_sample():
    """As of the first layer of a ResNet."""
    shapes = (16, 3, 96, 96), (16, 32, 48, 48), (32, 3, 7, 7)
    for with_gradient in (False, True):
        assert cpu_conv.conv_form(*shapes, (3, 3), 1, with_gradient=with_gradient) == "calls"


@pytest.mark.parametrize("positions", [2, 5, 9, 14, 60])
@pytest.mark.parametrize("widths", [(4, 4), (16, 8), (64, 256)], ids=str)
def test_the_form_of_an_outer_product_is_the_cheaper_one(positions, widths):
    width_in, width_out = widths
    gram = 2 * positions**2 * (width_in + width_out)  # in flops, as below
    gradients = 2 * positions * width_in * width_out
    expected = "gram" if gram < gradients else "gradients"
    assert operators.outer_form(positions, *widths) == expected
    halved = "gram" if gram * (positions + 1) / (2 * positions) < gradients else "gradients"
    assert operators.outer_form(positions, *widths, halved=True) == halved


def test_one_position_needs_neither():
    assert operators.outer_form(1, 4, 4) == operators.outer_form(1, 4, 4, halved=True) == "rows"


@pytest.mark.parametrize("grads", [cpu_conv.band_grads, cpu_conv.shift_grads])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", [
    ((1, 1), (2, 3), (1, 1)), ((2, 1), (0, 4), (1, 2)), ((3, 2), (9, 7), (2, 1)),
    ((1, 3), (4, 12), (1, 5))], ids=str)
def test_large_depthwise_kernels_in_any_memory_format(channels, channels_last, geometry, grads):
    torch.manual_seed(0)
    shape = (channels, 1, 5, 4)
    a, weight = torch.randn(3, channels, 9, 10), torch.randn(shape, requires_grad=True)
    b = torch.randn_like(torch.conv2d(a, weight, None, *geometry, channels))
    expected = [torch.autograd.grad(
        torch.conv2d(a[n : n + 1].double(), weight.double(), None, *geometry, channels), weight,
        b[n : n + 1].double())[0] for n in range(3)]
    if channels_last:
        a, b = (each.to(memory_format=torch.channels_last) for each in (a, b))
    found = torch.cat([*grads(a, b, shape, *geometry)])
    torch.testing.assert_close(found, torch.stack(expected).to(found.dtype), rtol=1e-5, atol=1e-5)
    norms = operators.OPERATIONS["conv_sq_norms"].call(a, b, shape, *geometry, channels)
    squares = torch.stack(expected).square().flatten(1).sum(1)
    torch.testing.assert_close(norms, squares.to(norms.dtype), rtol=1e-5, atol=1e-5)
