"""The definitions, and the CPU's forms, against per-sample gradients in float64; chunks, layers and
torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adabatch import kernels
from adabatch.estimators.gradients import grad_sq_norms
from adabatch.kernels import OPERATIONS, operators, reference_conv
from tests.kernels import cases
from tests.kernels.cases import CONV, OUTER, RTOL, SHAPES, check, close, make


def forms(name):
    """Definition, and the CPU's form where there is one."""
    operation = OPERATIONS[name]
    return [operation.definition, *([operation.forms["cpu"]] if "cpu" in operation.forms else [])]


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize(("name", "shape"), cases.ALL)
def test_operation(name, shape, dtype):
    case = make(name, SHAPES[name][shape], dtype)
    for form in forms(name):
        check(form, case, dtype)
        if case.kwargs:
            without = form(*case.args)
            assert without[2] is None
            for actual, expected in zip(without[:2], case.expected[:2], strict=True):
                close(actual, expected, RTOL[dtype])


def test_every_operation_has_cases():
    assert set(SHAPES) == set(OPERATIONS)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, n) for n in (6, 9, 9, 9)]), st.sampled_from(cases.OUTER_NAMES))
def test_outer_of_any_shape(shape, name):
    check(getattr(kernels, name), make(name, shape, torch.float64), torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, n) for n in (5, 12, 4, 20)]))
def test_embedding_of_any_shape(shape):
    for name in ("embedding_sq_norms", "embedding_second_moment", "embedding_dot"):
        check(getattr(kernels, name), make(name, shape, torch.float64), torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_of_any_length_give_the_same(name, monkeypatch):
    monkeypatch.setattr(operators, "CHUNK_BYTES", 200)
    monkeypatch.setattr(reference_conv, "LONGEST_CHUNK", 2)
    for shape in SHAPES[name].values():
        if shape != OUTER["cpu-one-product-a-sample"]:
            case = make(name, shape, torch.float32)
            for form in forms(name):
                check(form, case, torch.float32)


def test_norms_of_millions_of_elements_are_exact():
    """One float32 sum of that many squares would be 8e-5 too small."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 1536), torch.randn(2, 40, 1536)
    grads = torch.einsum("nto,nti->noi", b.double(), a.double())
    for form in forms("weight_grad_moments"):
        close(form(a, b, second_moment=True)[1], grads.flatten(1).square().sum(1), 1e-6)
    dense = torch.randn(2, 1536, 1536)
    expected = dense.double().flatten(1).square().sum(1)
    close(kernels.dense_sq_norms(dense), expected, 1e-6)
    parameter = torch.nn.Parameter(dense[0])
    parameter.grad = dense[1]
    close(grad_sq_norms([[parameter]]), expected[1:], 1e-6)


@pytest.mark.parametrize("shape", CONV.values(), ids=CONV)
def test_products_by_kernel_position_are_the_same_gradients(shape):
    """The form used under torch.compile, for every shape."""
    a, b, weight_shape, geometry, grads = cases.conv(shape, torch.float64)
    if len(grads):
        by_position = reference_conv._products_by_kernel_position
        close(by_position(a, b, weight_shape, *geometry), grads, 1e-10)


def by_autograd(normalize, inputs, backprops, width):
    """Squared norms of scale and shift, one backward pass per sample."""
    norms = []
    for row, b in zip(inputs, backprops, strict=True):
        scale = torch.ones(width, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(width, dtype=torch.float64, requires_grad=True)
        outputs = normalize(row[None], scale, shift)
        grads = torch.autograd.grad(outputs, (scale, shift), b[None])
        norms.append([grad.square().sum() for grad in grads])
    return [torch.stack(column) for column in zip(*norms, strict=True)]


def flat(tensor):
    return tensor.flatten(2).mT


@pytest.mark.parametrize("layer", ["layer norm", "RMS norm", "group norm", "batch norm"])
def test_affine_sq_norms_are_those_of_torchs_layers(layer):
    torch.manual_seed(0)
    x, b = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    if layer == "layer norm":
        expected = by_autograd(lambda x, *own: F.layer_norm(x, (5,), *own), x, b, 5)
        mean = x.mean(2, keepdim=True)
        inputs = x, b, mean, (x.var(2, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    elif layer == "RMS norm":
        expected = by_autograd(
            lambda x, scale, shift: F.rms_norm(x, (5,), scale, 1e-5) + shift, x, b, 5
        )
        inputs = x, b, None, (x.square().mean(2, keepdim=True) + 1e-5).rsqrt()
    elif layer == "group norm":
        expected = by_autograd(lambda x, *own: F.group_norm(x, 2, *own), x, b, 4)
        _, mean, rstd = torch.native_group_norm(x, None, None, 3, 4, 5, 2, 1e-5)
        statistics = (value.repeat_interleave(2, 1).unsqueeze(1) for value in (mean, rstd))
        inputs = flat(x), flat(b), *statistics
    else:
        mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
        expected = by_autograd(lambda x, *own: F.batch_norm(x, mean, variance, *own), x, b, 4)
        inputs = flat(x), flat(b), mean.view(1, 1, 4), (variance + 1e-5).rsqrt().view(1, 1, 4)
    for actual, norms in zip(kernels.affine_sq_norms(*inputs), expected, strict=True):
        close(actual, norms, 1e-10)


def test_statistics_of_another_shape_are_refused():
    match = (
        r"rstd has shape \(4,\); for activations \(2, 3, 4\) allowed are "
        r"\(2, 3, 1\), \(2, 1, 4\), \(1, 3, 1\), \(1, 1, 4\)"
    )
    with pytest.raises(ValueError, match=match):
        kernels.affine_sq_norms(torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, torch.ones(4))


def check_compiled_once(moments, make_inputs):
    """Compiled and eager agree at every batch size, with one graph for them all; sizes other than
    the batch's are fixed, as in a model."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    function = torch.compile(moments, fullgraph=True, backend="aot_eager")
    for samples in (6, 5, 9):
        inputs = make_inputs(samples)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(function(*inputs), moments(*inputs), rtol=1e-4, atol=1e-4)
    assert counters["unique_graphs"] - before == 1


@pytest.mark.parametrize("positions", [1, 2, 13])
def test_outer_compiles_once_for_all_batch_sizes(positions):
    def moments(a, b):
        return (
            kernels.outer_sq_norms(a, b),
            kernels.outer_second_moment(a, b),
            kernels.outer_dot(a, b, b[0].mT @ a[0]),
            *kernels.weight_grad_moments(a, b, second_moment=True),
            kernels.preconditioned_trace(a, b, torch.ones(4, 3)),
            *kernels.affine_sq_norms(a, a, None, a.square().mean(2, keepdim=True)),
        )

    def inputs(samples):
        a, b, _ = cases.outer((samples, positions, 3, 4), torch.float32)
        return a.contiguous(), b.contiguous()

    check_compiled_once(moments, inputs)


def test_embedding_and_dense_compile_once_for_all_batch_sizes():
    def moments(ids, b):
        return (
            kernels.embedding_sq_norms(ids, b),
            kernels.embedding_second_moment(ids, b, 4),
            kernels.embedding_dot(ids, b, b[0, :4]),
            kernels.dense_sq_norms(b),
            kernels.dense_second_moment(b),
            kernels.dense_dot(b, b[0]),
        )

    check_compiled_once(moments, lambda n: cases.embedding((n, 7, 2, 4), torch.float32)[:2])


@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_conv_compiles_once_for_all_batch_sizes(name):
    shape = CONV[name]
    _, _, weight_shape, geometry, _ = cases.conv(shape, torch.float32)

    def moments(a, b):
        return (
            kernels.conv_sq_norms(a, b, weight_shape, *geometry),
            kernels.conv_second_moment(a, b, weight_shape, *geometry),
            kernels.conv_dot(a, b, a.new_ones(weight_shape), *geometry),
            *kernels.conv_weight_grad_moments(a, b, weight_shape, *geometry, second_moment=True),
        )

    def inputs(samples):
        return cases.conv(((samples, *shape[0][1:]), *shape[1:]), torch.float32)[:2]

    check_compiled_once(moments, inputs)
