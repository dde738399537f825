"""The reference kernels against sums written out sample by sample in float64, and against autograd; dispatch, chunks and torch.compile."""

import doctest
import inspect
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adabatch import kernels
from adabatch.kernels import chunks, reference, reference_conv

OPERATIONS = reference.__all__
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
OUTER_SHAPES = {
    "one-position": (5, 1, 7, 3),
    "gram": (5, 2, 9, 11),
    "materialised": (5, 13, 3, 2),
    "round": (4, 8, 16, 16),
    "one-wide": (3, 4, 1, 1),
    "one-sample": (1, 3, 4, 5),
    "no-samples": (0, 3, 4, 5),
    "no-samples-one-position": (0, 1, 4, 5),
}
# id: (activations, backprops' channels, kernel, stride, padding, dilation, groups)
CONV_SHAPES = {
    "1d": ((5, 3, 11), 4, (4,), (2,), (1,), (2,), 1),
    "2d": ((5, 4, 7, 6), 6, (3, 2), (1, 2), (1, 0), (1, 1), 2),
    "2d-depthwise": ((5, 3, 6, 6), 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "2d-left-over": ((3, 2, 9, 8), 3, (3, 3), (2, 3), (0, 1), (1, 2), 1),
    "3d": ((2, 2, 4, 3, 5), 3, (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1), 1),
    "one-wide": ((4, 1, 1), 1, (1,), (1,), (0,), (1,), 1),
    "no-samples": ((0, 2, 5, 5), 3, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
shapes = pytest.mark.parametrize("shape", OUTER_SHAPES.values(), ids=OUTER_SHAPES)
conv_shapes = pytest.mark.parametrize("shape", CONV_SHAPES.values(), ids=CONV_SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(actual, expected, rtol):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()) if expected.numel() else 0)


def accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_operations(grads, sq_norms, second_moment, dot, dtype):
    """Each operation's result against the gradients [N, *shape] written out in float64."""
    direction = torch.randn(grads.shape[1:], dtype=dtype)
    rtol = DTYPES[dtype]
    results = sq_norms(), second_moment(), dot(direction)
    assert {result.dtype for result in results} == {accumulated(dtype)}
    flat = grads.reshape(len(grads), direction.numel())
    close(results[0], flat.square().sum(1), rtol)
    close(results[1], grads.square().sum(0), rtol)
    close(results[2], flat @ direction.double().flatten(), rtol)


def make_outer(shape, dtype):
    samples, positions, width_in, width_out = shape
    torch.manual_seed(0)
    activations = torch.randn(samples, positions, width_in).to(dtype)
    # Strided, as a transposed layer would hand it over.
    backprops = torch.randn(samples, width_out, positions).to(dtype).mT
    grads = torch.zeros(samples, width_out, width_in, dtype=torch.float64)
    for sample in range(samples):
        for position in range(positions):
            grads[sample] += torch.outer(backprops[sample, position].double(), activations[sample, position].double())
    return activations, backprops, grads


def check_outer(shape, dtype):
    activations, backprops, grads = make_outer(shape, dtype)
    check_operations(
        grads,
        lambda: kernels.outer_sq_norms(activations, backprops),
        lambda: kernels.outer_second_moment(activations, backprops),
        lambda direction: kernels.outer_dot(activations, backprops, direction),
        dtype,
    )


@dtypes
@shapes
def test_outer(shape, dtype):
    check_outer(shape, dtype)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)))
def test_outer_of_any_shape(shape):
    check_outer(shape, torch.float64)


def make_embedding(samples, positions, width, rows, dtype):
    torch.manual_seed(0)
    ids, backprops = torch.randint(rows, (samples, positions)), torch.randn(samples, positions, width).to(dtype)
    grads = torch.zeros(samples, rows, width, dtype=torch.float64)
    for sample in range(samples):
        for position in range(positions):
            grads[sample, ids[sample, position]] += backprops[sample, position].double()
    return ids, backprops, grads


def check_embedding(samples, positions, width, rows, dtype):
    ids, backprops, grads = make_embedding(samples, positions, width, rows, dtype)
    check_operations(
        grads,
        lambda: kernels.embedding_sq_norms(ids, backprops),
        lambda: kernels.embedding_second_moment(ids, backprops, rows),
        lambda direction: kernels.embedding_dot(ids, backprops, direction),
        dtype,
    )


@dtypes
@pytest.mark.parametrize("shape", [(5, 11, 3, 4), (5, 11, 3, 100), (3, 1, 2, 4), (1, 6, 1, 1), (2, 0, 3, 4), (0, 3, 2, 4)], ids=str)
def test_embedding(shape, dtype):
    check_embedding(*shape, dtype)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 4), st.integers(1, 20)))
def test_embedding_of_any_shape(shape):
    check_embedding(*shape, torch.float64)


@dtypes
@pytest.mark.parametrize("shape", [(5, 3), (5,), (1, 2, 3), (4, 1), (0, 3)], ids=str)
def test_dense(shape, dtype):
    torch.manual_seed(0)
    grad = torch.randn(shape).to(dtype)
    check_operations(
        grad.double(),
        lambda: kernels.dense_sq_norms(grad),
        lambda: kernels.dense_second_moment(grad),
        lambda direction: kernels.dense_dot(grad, direction),
        dtype,
    )


def make_conv(shape, dtype):
    """Gradients by autograd, a sample at a time."""
    inputs_shape, width_out, kernel, stride, padding, dilation, groups = shape
    geometry = (stride, padding, dilation, groups)
    torch.manual_seed(0)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    weight = torch.randn(width_out, inputs_shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
    activations = torch.randn(inputs_shape).to(dtype)
    spatial = convolution(torch.zeros(1, *inputs_shape[1:], dtype=torch.float64), weight, None, *geometry).shape[1:]
    backprops = torch.randn(inputs_shape[0], *spatial).to(dtype)
    grads = torch.zeros(inputs_shape[0], *weight.shape, dtype=torch.float64)
    for sample in range(inputs_shape[0]):
        outputs = convolution(activations[sample : sample + 1].double(), weight, None, *geometry)
        (grads[sample],) = torch.autograd.grad(outputs, weight, backprops[sample : sample + 1].double())
    return activations, backprops, tuple(weight.shape), geometry, grads


@dtypes
@conv_shapes
def test_conv(shape, dtype):
    activations, backprops, weight_shape, geometry, grads = make_conv(shape, dtype)
    check_operations(
        grads,
        lambda: kernels.conv_sq_norms(activations, backprops, weight_shape, *geometry),
        lambda: kernels.conv_second_moment(activations, backprops, weight_shape, *geometry),
        lambda direction: kernels.conv_dot(activations, backprops, direction, *geometry),
        dtype,
    )
    close(kernels.conv_grad_sample(activations, backprops, weight_shape, *geometry), grads, DTYPES[dtype])


def test_chunks_of_any_length_give_the_same(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    monkeypatch.setattr(reference_conv, "LONGEST_CHUNK", 2)
    for shape in OUTER_SHAPES.values():
        check_outer(shape, torch.float32)
    for shape in CONV_SHAPES.values():
        test_conv(shape, torch.float32)
    check_embedding(7, 5, 3, 4, torch.float32)
    test_dense((7, 100), torch.float32)


def check_compiled_once(moments, make_inputs):
    """Compiled and eager agree at every batch size, with one graph for them all; sizes other than the batch's are fixed, as in a model."""
    torch._dynamo.reset()
    function, before = torch.compile(moments, fullgraph=True, backend="aot_eager"), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for samples in (6, 5, 9):
        inputs = make_inputs(samples)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(function(*inputs), moments(*inputs), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("positions", [1, 2, 13])
def test_outer_compiles_once_for_all_batch_sizes(positions):
    def moments(activations, backprops):
        return (
            kernels.outer_sq_norms(activations, backprops),
            kernels.outer_second_moment(activations, backprops),
            kernels.outer_dot(activations, backprops, backprops[0].mT @ activations[0]),
        )

    check_compiled_once(moments, lambda samples: make_outer((samples, positions, 3, 4), torch.float32)[:2])


def test_embedding_and_dense_compile_once_for_all_batch_sizes():
    def moments(ids, backprops):
        return (
            kernels.embedding_sq_norms(ids, backprops),
            kernels.embedding_second_moment(ids, backprops, 4),
            kernels.embedding_dot(ids, backprops, backprops[0, :4]),
            kernels.dense_sq_norms(backprops),
            kernels.dense_second_moment(backprops),
            kernels.dense_dot(backprops, backprops[0]),
        )

    check_compiled_once(moments, lambda samples: make_embedding(samples, 7, 2, 4, torch.float32)[:2])


@pytest.mark.parametrize("shape", [CONV_SHAPES[name] for name in ("1d", "2d", "3d")], ids=["1d", "2d", "3d"])
def test_conv_compiles_once_for_all_batch_sizes(shape):
    _, _, weight_shape, geometry, _ = make_conv(shape, torch.float32)

    def moments(activations, backprops):
        return (
            kernels.conv_sq_norms(activations, backprops, weight_shape, *geometry),
            kernels.conv_second_moment(activations, backprops, weight_shape, *geometry),
            kernels.conv_dot(activations, backprops, activations.new_ones(weight_shape), *geometry),
        )

    check_compiled_once(moments, lambda samples: make_conv(((samples, *shape[0][1:]), *shape[1:]), torch.float32)[:2])


@conv_shapes
def test_products_by_kernel_position_are_the_same_gradients(shape):
    """The form used under torch.compile, for every shape."""
    activations, backprops, weight_shape, geometry, grads = make_conv(shape, torch.float64)
    if len(grads):
        close(reference_conv._products_by_kernel_position(activations, backprops, weight_shape, *geometry), grads, 1e-10)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_dispatcher_keeps_name_signature_and_documentation(name):
    dispatched, definition = getattr(kernels, name), getattr(reference, name)
    assert inspect.signature(dispatched) == inspect.signature(definition)
    assert (dispatched.__name__, dispatched.__doc__) == (name, definition.__doc__)
    assert set(OPERATIONS) == set(reference.__all__)


def test_the_dispatcher_asks_backends_first_unless_the_reference_is_forced(monkeypatch):
    class Backend:
        @staticmethod
        def dense_sq_norms(grad):
            return "backend"

    grad = torch.ones(2, 3)
    monkeypatch.setitem(kernels.BACKENDS, "cpu", (Backend,))
    assert kernels.dense_sq_norms(grad) == kernels.dense_sq_norms(grad=grad) == "backend"
    assert torch.equal(kernels.dense_second_moment(grad), torch.full((3,), 2.0))
    monkeypatch.setattr(kernels, "FORCED", "reference")
    assert kernels.dense_sq_norms(grad).shape == (2,)


def test_an_unknown_choice_of_kernels_is_refused_at_import():
    result = subprocess.run([sys.executable, "-c", "import adabatch.kernels"], env={"ADABATCH_KERNELS": "cuda"}, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ADABATCH_KERNELS is 'cuda'; allowed are 'reference' and nothing" in result.stderr


@pytest.mark.parametrize("module", [kernels, reference, reference_conv, chunks], ids=lambda module: module.__name__)
def test_examples_in_the_documentation(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
