"""The Triton kernels against per-sample gradients in float64, and a model whose taps use them.

On a GPU, or under Triton's interpreter in a process that test_operators.py starts.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRET:
    reason = "needs a GPU, or TRITON_INTERPRET=1 before Triton is imported"
    pytest.skip(reason, allow_module_level=True)

from adabatch import GradSampleHooks  # noqa: E402
from adabatch.grad_sample.cost import LayerCost  # noqa: E402
from adabatch.grad_sample.layers import normalization  # noqa: E402
from adabatch.grad_sample.statistics import PreconditionedTrace  # noqa: E402
from adabatch.kernels import OPERATIONS, operators  # noqa: E402
from adabatch.kernels.triton import embedding, gram, outer, tuning  # noqa: E402
from tests import oracle  # noqa: E402
from tests.kernels import cases  # noqa: E402
from tests.kernels.cases import AFFINE, CONV, OUTER, SHAPES, check, close, make  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Inputs are rounded to their type before both sides see them, so only the kernels' float32 sums
# differ from float64: one tolerance for all types.
RTOL = 1e-4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
assert operators.load_triton()
KERNELS = {name: OPERATIONS[name].forms["triton"] for name in OPERATIONS
           if "triton" in OPERATIONS[name].forms}
SWEPT = [(name, shape) for name, shape in cases.ALL if name in KERNELS and shape[:4] != "cpu-"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_kernel(name, shape, dtype, deterministic=True, **options):
    case = make(name, shape, dtype, DEVICE, **options)
    if not case.kwargs:
        return check(KERNELS[name], case, dtype, RTOL)
    case.kwargs["deterministic"] = deterministic
    results = check(KERNELS[name], case, dtype, RTOL)
    without = KERNELS[name](*case.args, deterministic=deterministic)
    assert without[2] is None
    for actual, expected in zip(without[:2], case.expected[:2], strict=True):
        close(actual, expected, RTOL)
    return results


@dtypes
@pytest.mark.parametrize(("name", "shape"), SWEPT)
def test_kernel(name, shape, dtype):
    check_kernel(name, SHAPES[name][shape], dtype)


@pytest.mark.parametrize("name", ["weight_grad_moments", "conv_weight_grad_moments"])
def test_sums_may_be_added_in_any_order(name):
    for shape in ("several-tiles", "one-sample", "no-samples"):
        check_kernel(name, SHAPES[name][shape], torch.float32, deterministic=False)


def test_a_deterministic_call_gives_the_same_bits():
    runs = [check_kernel("weight_grad_moments", (7, 33, 40, 35), torch.float32) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [shape for shape in OUTER if shape[:4] != "cpu-"])
def test_both_forms_of_the_norms_agree(shape):
    case = make("outer_sq_norms", OUTER[shape], torch.float32, DEVICE)
    close(gram.gram_norms(*case.args), case.expected[0], RTOL)
    close(outer.materialised(*case.args, norms=True)[1].sum(0), case.expected[0], RTOL)


def test_types_may_differ_and_float64_is_left_to_the_definition():
    case = make("weight_grad_moments", OUTER["odd"], torch.bfloat16, DEVICE)
    a, b = case.args
    check(KERNELS["weight_grad_moments"], cases.Case((a, b.float()), case.expected, case.kwargs),
          torch.float32, RTOL)
    close(KERNELS["outer_sq_norms"](a, b.float()), case.expected[1], RTOL)
    check(KERNELS["weight_grad_moments"], make("weight_grad_moments", (3, 5, 7, 9), torch.float64),
          torch.float64)


def test_the_weight_gradient_is_autograds():
    layer = nn.Linear(40, 33, bias=False, device=DEVICE)
    inputs = torch.randn(3, 5, 40, device=DEVICE)
    outputs = layer(inputs)
    backprops = torch.randn_like(outputs)
    outputs.backward(backprops)
    close(KERNELS["weight_grad_moments"](inputs, backprops)[0], layer.weight.grad, RTOL)


@pytest.mark.parametrize("shape", ["2d", "left-over", "1x1", "1x1-strided"])
def test_conv_with_channels_last(shape):
    check_kernel("conv_weight_grad_moments", CONV[shape], torch.float16, deterministic=False,
                 memory_format=torch.channels_last)


def test_a_matrix_that_would_have_to_be_copied_is_a_convolution():
    a = torch.randn(2, 3, 4, 8, device=DEVICE)[:, :, :, ::2]
    b = torch.randn(2, 5, 4, 5, device=DEVICE)[:, :, :, :4]
    geometry = ((5, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    grads = torch.einsum("nohw,nchw->noc", b.double(), a.double()).reshape(2, 5, 3, 1, 1)
    grad, norms, _ = KERNELS["conv_weight_grad_moments"](a, b, *geometry)
    close(grad, grads.sum(0), RTOL)
    close(norms, grads.flatten(1).square().sum(1), RTOL)


def test_results_of_an_operator_share_no_memory():
    for shape in ("layer-norm", "split"):
        results = check_kernel("affine_sq_norms", AFFINE[shape], torch.float32)
        assert len({result.untyped_storage().data_ptr() for result in results}) == 2


def test_statistics_of_another_shape_are_refused():
    ones = torch.ones(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"mean has shape \(2, 3, 4\); for activations"):
        KERNELS["affine_sq_norms"](ones, ones, ones, None)


@pytest.mark.parametrize("processors", [1, 64])
def test_runs_across_splits_are_counted_once(processors, monkeypatch):
    """Splits of one and of eight positions, in runs that begin, end or lie within them."""
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    monkeypatch.setattr(embedding, "SHORTEST_SPLIT", 1 if processors == 64 else 8)
    for rows in (1, 2, 11):
        check_kernel("embedding_sq_norms", (2, 41, 3, rows), torch.float32)


@pytest.mark.parametrize("positions", [5, 20])
def test_ids_of_32_bits(positions):
    case = make("embedding_sq_norms", (2, positions, 3, 4), torch.float32, DEVICE)
    ids, b = case.args
    close(KERNELS["embedding_sq_norms"](ids.int(), b), case.expected[0], RTOL)
    close(gram.gram_norms(ids, b), case.expected[0], RTOL)


def test_the_interpreter_takes_the_smallest_configuration():
    assert (DEVICE.type == "cpu") == tuning.INTERPRETED


def sizes(*most):
    return st.tuples(*[st.integers(1, each) for each in most])


@settings(max_examples=15, deadline=None)
@given(sizes(4, 20, 36, 36), st.booleans(), st.sampled_from(DTYPES))
def test_outer_of_any_shape(shape, deterministic, dtype):
    check_kernel("weight_grad_moments", shape, dtype, deterministic)
    check_kernel("outer_sq_norms", shape, dtype)


@settings(max_examples=20, deadline=None)
@given(sizes(3, 60, 20, 30), st.sampled_from(DTYPES))
def test_embedding_of_any_shape(shape, dtype):
    check_kernel("embedding_sq_norms", shape, dtype)


STATISTICS = ("layer", "rms", "group", "batch", "mixed", "none")


@settings(max_examples=15, deadline=None)
@given(sizes(4, 20, 40), st.sampled_from(STATISTICS), st.sampled_from(DTYPES), st.booleans())
def test_affine_of_any_shape(shape, kind, dtype, channels_first):
    check_kernel("affine_sq_norms", (*shape, kind, channels_first), dtype)


@settings(max_examples=12, deadline=None)
@given(sizes(3, 3, 3, 2), sizes(3, 3), sizes(2, 2), sizes(3, 3), sizes(2, 2))
def test_conv_of_any_geometry(counts, kernel, stride, padding, dilation):
    samples, channels, outs, groups = counts
    padding = tuple(each - 1 for each in padding)
    inputs = (samples, channels * groups, 6, 7)
    shape = (inputs, outs * groups, kernel, stride, padding, dilation, groups)
    for name in ("conv_weight_grad_moments", "conv_sq_norms", "conv_second_moment"):
        check_kernel(name, shape, torch.float32)


class Both(nn.Module):
    """Token ids through an embedding, LayerNorm and Linear; images through convolutions and group
    norm; a Linear with T = 1 on both results."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.wide = nn.Embedding(7, 12), nn.LayerNorm(12), nn.Linear(12, 20)
        self.conv, self.channels = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
        self.head = nn.Linear(26, 5)

    def forward(self, ids, images):
        words = torch.tanh(self.wide(self.norm(self.tokens(ids)))).mean(1)
        pooled = torch.relu(self.channels(self.conv(images))).mean((2, 3))
        return self.head(torch.cat((words, pooled), dim=1))


def losses(model, batch):
    return model(*batch[:2]).log_softmax(1).gather(1, batch[2].unsqueeze(1))[:, 0].neg()


@pytest.fixture
def calls(monkeypatch):
    """Names of the Triton kernels that ran; operations that have one take it on any device."""
    found = []

    def recorded(name):
        return lambda *args, **kwargs: found.append(name) or KERNELS[name](*args, **kwargs)

    for name in KERNELS:
        monkeypatch.setitem(OPERATIONS[name].forms, DEVICE.type, recorded(name))
    monkeypatch.setattr(normalization, "takes_statistics", lambda activations: True)
    return found


WAYS = {
    "all": {},
    "some": {"samples": 3},
    "second moments": {"statistics": ["second_moment"]},
    "weighted": {"statistics": [PreconditionedTrace(torch.Tensor.exp)]},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_all_layers_are_measured_by_triton(calls, options, monkeypatch):
    torch.manual_seed(0)
    model = Both().to(DEVICE)
    batch = (torch.randint(7, (4, 5)), torch.randn(4, 3, 6, 6), torch.randint(5, (4,)))
    batch = tuple(tensor.to(DEVICE) for tensor in batch)
    grads = oracle.per_sample_grads(model, losses, batch)
    monkeypatch.setattr(LayerCost, "fused_is_cheaper", lambda self, n, measured: measured == n)
    hooks = GradSampleHooks(model, **options)
    statistics = hooks.statistics
    losses(model, batch).mean().backward()
    moments = hooks.collect()
    rows = slice(None) if moments.indices is None else moments.indices.cpu()
    close(moments.sq_norms, oracle.sq_norms(grads)[rows], RTOL)
    for name, parameter in model.named_parameters():
        close(parameter.grad, grads[name].mean(0), RTOL)
        second = grads[name].square().sum(0)
        if "second_moment" in statistics:
            close(moments.second_moment[name], second, RTOL)
        if "preconditioned_trace" in statistics:
            weighted = (parameter.detach().double().exp().cpu() * second.cpu()).sum()
            found = moments.statistics["preconditioned_trace"].squares[name]
            close(found, weighted, RTOL)
    wanted = {"affine_sq_norms", "embedding_sq_norms", "outer_sq_norms"}
    if "samples" in options:
        wanted |= {"conv_sq_norms"}
    else:
        wanted |= {"weight_grad_moments", "conv_weight_grad_moments"}
    if statistics:
        wanted -= {"affine_sq_norms"}  # norms and moments come from the gradients [N, P]
        name = "preconditioned_trace"
        wanted |= {name if name in statistics else "outer_second_moment"}
    assert wanted <= set(calls)
