"""Triton kernels of a matrix that multiplies its input, against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch.kernels import reference
from tests.kernels.triton_cases import DTYPES, all_close, close, kernel_device

DEVICE = kernel_device()

from adabatch.kernels import triton, triton_gram, triton_outer  # noqa: E402 (only where there is a device)

# id: (N, T, I, O); blocks under the interpreter are 32 wide
SHAPES = {
    "odd": (3, 5, 7, 9),
    "several-tiles": (3, 33, 40, 35),
    "gram": (2, 3, 40, 37),
    "gram-several-blocks": (2, 18, 40, 36),
    "one-wide": (2, 4, 1, 1),
    "one-sample": (1, 3, 4, 5),
    "one-position": (3, 1, 5, 40),
    "all-ones": (1, 1, 1, 1),
    "no-samples": (0, 3, 4, 5),
    "no-positions": (2, 0, 3, 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shape, dtype, other_dtype=None):
    """Activations strided as a transposed view, backprops as every second element of a row."""
    samples, positions, width_in, width_out = shape
    torch.manual_seed(0)
    activations = torch.randn(samples, width_in, positions, device=DEVICE).to(dtype).mT
    backprops = torch.randn(samples, positions, 2 * width_out, device=DEVICE).to(other_dtype or dtype)[:, :, ::2]
    return activations, backprops


@dtypes
@shapes
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
def test_weight_grad_moments(shape, dtype, deterministic):
    activations, backprops = make(shape, dtype)
    expected = reference.weight_grad_moments(activations.double(), backprops.double(), second_moment=True)
    all_close(triton.weight_grad_moments(activations, backprops, second_moment=True, deterministic=deterministic), expected)
    all_close(triton.weight_grad_moments(activations, backprops, deterministic=deterministic), (*expected[:2], None))


@dtypes
@shapes
def test_norms_second_moment_and_trace(shape, dtype):
    activations, backprops = make(shape, dtype)
    preconditioner = torch.rand(shape[2], shape[3], device=DEVICE).T
    doubles = activations.double(), backprops.double()
    close(triton.outer_sq_norms(activations, backprops), reference.outer_sq_norms(*doubles))
    close(triton.outer_second_moment(activations, backprops), reference.outer_second_moment(*doubles))
    close(triton.preconditioned_trace(activations, backprops, preconditioner), reference.preconditioned_trace(*doubles, preconditioner.double()))


@shapes
def test_both_forms_of_the_norms_agree_whatever_they_cost(shape):
    activations, backprops = make(shape, torch.float32)
    expected = reference.outer_sq_norms(activations.double(), backprops.double())
    close(triton_gram.gram_norms(activations, backprops), expected)
    close(triton_outer._materialised(activations, backprops, norms=True)[1].sum(0), expected)


def test_types_may_differ_and_float64_is_left_to_the_definition():
    activations, backprops = make((3, 5, 7, 9), torch.bfloat16, torch.float32)
    expected = reference.weight_grad_moments(activations.double(), backprops.double())
    all_close(triton.weight_grad_moments(activations, backprops), expected)
    close(triton.outer_sq_norms(activations, backprops), expected[1])
    grad, norms, _ = triton.weight_grad_moments(activations.double(), backprops.double())
    assert grad.dtype == norms.dtype == torch.float64


def test_a_deterministic_call_gives_the_same_bits():
    activations, backprops = make((7, 33, 40, 35), torch.float32)
    first, second = (triton.weight_grad_moments(activations, backprops, second_moment=True, deterministic=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_weight_gradient_is_autograds():
    layer = torch.nn.Linear(40, 33, bias=False, device=DEVICE)
    inputs = torch.randn(3, 5, 40, device=DEVICE)
    outputs = layer(inputs)
    backprops = torch.randn_like(outputs)
    outputs.backward(backprops)
    close(triton.weight_grad_moments(inputs, backprops)[0], layer.weight.grad.double())


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 36), st.integers(1, 36)), st.booleans(), st.sampled_from(DTYPES))
def test_any_shape(shape, deterministic, dtype):
    activations, backprops = make(shape, dtype)
    doubles = activations.double(), backprops.double()
    expected = reference.weight_grad_moments(*doubles, second_moment=True)
    all_close(triton.weight_grad_moments(activations, backprops, second_moment=True, deterministic=deterministic), expected)
    close(triton.outer_sq_norms(activations, backprops), expected[1])
