"""The Triton kernel of scales and shifts, against the definition in float64 and against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adabatch.kernels import reference
from tests.kernels.triton_cases import DTYPES, all_close, close, kernel_device

DEVICE = kernel_device()

from adabatch.kernels import triton  # noqa: E402 (only where there is a device)

# id: (N, T, P); the last is long enough to be split over programs
SHAPES = {
    "odd": (3, 5, 7),
    "one-position": (3, 1, 40),
    "one-wide": (2, 6, 1),
    "one-sample": (1, 3, 18),
    "all-ones": (1, 1, 1),
    "no-samples": (0, 3, 4),
    "no-positions": (2, 0, 3),
    "split": (1, 130, 3),
}
# (shape of mean, shape of rstd) from (N, T, P)
STATISTICS = {
    "layer norm": lambda n, t, p: ((n, t, 1), (n, t, 1)),
    "RMS norm": lambda n, t, p: (None, (n, t, 1)),
    "group norm": lambda n, t, p: ((n, 1, p), (n, 1, p)),
    "batch norm": lambda n, t, p: ((1, 1, p), (1, 1, p)),
    "normalized": lambda n, t, p: (None, None),
    "mixed": lambda n, t, p: ((1, t, 1), (n, 1, p)),
}


def check(shape, kind, dtype, channels_first=False):
    torch.manual_seed(0)
    samples, positions, width = shape
    activations, backprops = torch.randn(2, *shape, device=DEVICE).to(dtype)
    if channels_first:
        activations, backprops = torch.randn(2, samples, width, positions, device=DEVICE).to(dtype).mT
    mean, rstd = (None if sizes is None else torch.rand(sizes, device=DEVICE) for sizes in STATISTICS[kind](*shape))
    expected = reference.affine_sq_norms(activations.double(), backprops.double(), mean, rstd)
    all_close(triton.affine_sq_norms(activations, backprops, mean, rstd), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_affine_sq_norms(shape, dtype):
    check(shape, "layer norm", dtype)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("channels_first", [False, True])
def test_statistics(kind, channels_first):
    check((2, 9, 20), kind, torch.bfloat16, channels_first)


def test_a_group_norm_by_views_is_autograds():
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 5, 2, device=DEVICE)
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    bias = torch.zeros(4, device=DEVICE, requires_grad=True)
    backprops = torch.randn_like(inputs)
    grads = [torch.autograd.grad(F.group_norm(row[None], 2, weight, bias), (weight, bias), b[None]) for row, b in zip(inputs, backprops, strict=True)]
    scale, shift = (torch.stack([grad.double().square().sum() for grad in column]) for column in zip(*grads, strict=True))
    _, mean, rstd = torch.native_group_norm(inputs, None, None, 3, 4, 10, 2, 1e-5)
    statistics = (value.repeat_interleave(2, 1).unsqueeze(1) for value in (mean, rstd))
    actual_scale, actual_shift = triton.affine_sq_norms(inputs.flatten(2).mT, backprops.flatten(2).mT, *statistics)
    close(actual_scale, scale)
    close(actual_shift, shift)


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"mean has shape \(2, 3, 4\); for activations \(2, 3, 4\) allowed are \(2, 3, 1\), \(2, 1, 4\), \(1, 3, 1\)"):
        triton.affine_sq_norms(torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE), None)


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 40)), st.sampled_from(sorted(STATISTICS)), st.sampled_from(DTYPES), st.booleans())
def test_any_shape(shape, kind, dtype, channels_first):
    check(shape, kind, dtype, channels_first)
