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
