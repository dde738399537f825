"""The Triton kernel of convolutions, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch.kernels import reference
from tests.kernels.triton_cases import DTYPES, all_close, close, kernel_device

DEVICE = kernel_device()

from adabatch.kernels import triton  # noqa: E402 (only where there is a device)

# id: (N, C, *S), O, kernel, stride, padding, dilation, groups
SHAPES = {
    "1d": ((3, 3, 11), 4, (4,), (2,), (1,), (2,), 1),
    "2d": ((3, 4, 7, 6), 6, (3, 2), (1, 2), (1, 0), (1, 1), 2),
    "several-tiles": ((2, 6, 5, 5), 18, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "depthwise": ((2, 3, 6, 6), 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "left-over": ((2, 2, 9, 8), 3, (3, 3), (2, 3), (0, 1), (1, 2), 1),
    "matrix": ((3, 5, 4, 3), 7, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1-strided": ((3, 5, 4, 3), 7, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    "3d": ((2, 2, 4, 3, 5), 3, (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1), 1),
    "one-wide": ((2, 1, 1), 1, (1,), (1,), (0,), (1,), 1),
    "one-sample": ((1, 2, 4, 4), 3, (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "no-samples": ((0, 2, 5, 5), 3, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}


def check(shape, dtype, channels_last=False, deterministic=True):
    inputs_shape, width_out, kernel, stride, padding, dilation, groups = shape
    torch.manual_seed(0)
    spatial = [
        (size + 2 * pad - gap * (length - 1) - 1) // step + 1
        for size, length, step, pad, gap in zip(inputs_shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    activations = torch.randn(inputs_shape, device=DEVICE).to(dtype)
    backprops = torch.randn(inputs_shape[0], width_out, *spatial, device=DEVICE).to(dtype)
    if channels_last:
        activations, backprops = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (activations, backprops))
    geometry = ((width_out, inputs_shape[1] // groups, *kernel), stride, padding, dilation, groups)
    doubles = activations.double(), backprops.double()
    expected = reference.conv_weight_grad_moments(*doubles, *geometry, second_moment=True)
    results = triton.conv_weight_grad_moments(activations, backprops, *geometry, second_moment=True, deterministic=deterministic)
    all_close(results, expected)
    close(triton.conv_sq_norms(activations, backprops, *geometry), expected[1])
    close(triton.conv_second_moment(activations, backprops, *geometry), expected[2])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_conv(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("name", ["2d", "left-over", "matrix", "1x1-strided"])
def test_conv_with_channels_last(name):
    check(SHAPES[name], torch.float16, channels_last=True, deterministic=False)


def test_a_matrix_that_would_have_to_be_copied_is_a_convolution():
    activations, backprops = torch.randn(2, 3, 4, 8, device=DEVICE)[:, :, :, ::2], torch.randn(2, 5, 4, 5, device=DEVICE)[:, :, :, :4]
    geometry = ((5, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    expected = reference.conv_weight_grad_moments(activations.double(), backprops.double(), *geometry)
    all_close(triton.conv_weight_grad_moments(activations, backprops, *geometry), expected)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
)  # fmt: skip
def test_any_geometry(samples, channels, outs, groups, kernel, stride, padding, dilation):
    check(((samples, channels * groups, 6, 7), outs * groups, kernel, stride, padding, dilation, groups), torch.float32)
