"""Compiled, exported and traced models, and torch.func transforms of hooked ones."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import linear

from adabatch import GradSampleHooks
from adabatch.interfaces import NotMeasured
from tests import oracle
from tests.grad_sample.measuring import (
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    raises_while_compiling,
    squared_error,
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """aot_eager that counts the graphs it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


def make_image_model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.PReLU(),
              nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    return model, lambda size: (
        torch.randn(size, 2, 6, 6, dtype=dtype), torch.randn(size, 3, dtype=dtype))


def make_token_model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.ReLU(inplace=True),
              nn.RMSNorm(6), nn.Linear(6, 3), nn.Flatten()]
    return nn.Sequential(*layers).to(dtype), lambda size: (
        torch.randint(7, (size, 4)), torch.randn(size, 12, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "samples", "dtype"),
    [
        pytest.param(make_image_model, None, torch.float32, marks=pytest.mark.slow),
        (make_image_model, 3, torch.float64),
        (make_token_model, None, torch.float64),
        pytest.param(make_token_model, 3, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_several_batch_sizes_in_two_graphs(make, samples, dtype):
    model, make_batch_of = make(dtype)
    # From 16 samples on torch itself compiles this convolution once more.
    batches = [make_batch_of(size) for size in (8, 12, 5, 15, 9)]
    expected = [oracle.per_sample_grads(model, squared_error, batch) for batch in batches]
    hooks = GradSampleHooks(
        model, samples=samples, per_parameter=True, statistics=["second_moment"])
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    rows = []
    for batch, grads in zip(batches, expected, strict=True):
        model.zero_grad()
        backward(compiled, batch)
        moments = hooks.collect()
        agrees(moments, grads, 1e-5 if dtype == torch.float32 else 1e-10)
        rows.append(moments.indices)
        for name, part in grads.items():
            part = part if moments.indices is None else part[moments.indices]
            close(moments.by_parameter[name], oracle.sq_norms({name: part}), 1e-5)
            close(moments.second_moment[name], oracle.second_moment({name: part})[name], 1e-5)
    assert backend.graphs <= 2
    assert samples is None or len({tuple(row.tolist()) for row in rows}) > 1


def test_inductor():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), make_batch(7)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=4)
    backward(torch.compile(model, fullgraph=True), batch)
    agrees(hooks.collect(), grads)


@pytest.mark.filterwarnings("ignore:.*batch normalization in train mode:UserWarning")
@pytest.mark.parametrize("samples", [None, 3])
def test_batch_norm_in_train_mode(samples):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)]
    model, batch = nn.Sequential(*layers), make_batch(7)
    grads = oracle.contributions(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=samples)
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    agrees(hooks.collect(), grads)


def test_steps_that_measure_nothing_cost_one_graph_and_no_tap():
    model, backend = make_mlp(), Counting()
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step, size in enumerate((8, 12, 5, 20, 16, 9, 11, 6)):
        hooks.enabled = step % 3 == 0
        batch = make_batch(size)
        model.zero_grad()
        backward(compiled, batch)
        if hooks.enabled:
            assert hooks.collect().batch_size == size
        else:
            with pytest.raises(RuntimeError, match="no measured backward pass"):
                hooks.collect()
    assert backend.graphs <= 4


def test_a_good_step_after_a_failed_compiled_pass_is_exact():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda parameter: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(compiled, make_batch())
    handle.remove()
    model.zero_grad()
    backward(compiled, batch)
    agrees(hooks.collect(), grads)


def test_compiled_and_run_before_the_hooks_were_attached_raises():
    model, batch = make_mlp(), make_batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(batch[0])
    hooks = GradSampleHooks(compiled)
    backward(compiled, batch)
    message = r"compiled and run before the hooks were attached.*torch\._dynamo\.reset\(\)"
    with pytest.raises(RuntimeError, match=message):
        hooks.collect()
    torch._dynamo.reset()
    model.zero_grad()
    backward(compiled, batch)
    assert hooks.collect().batch_size == 8


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("in_place", [nn.Module.compile, torch.compile])
def test_a_part_compiled_before_an_in_place_operation_is_exact_or_raises(in_place, run_before):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    part = in_place(model[0], backend="aot_eager")
    model[0] = part if part is not None else model[0]
    if run_before:
        model(batch[0])
    hooks = GradSampleHooks(model)
    if run_before and part is not None:
        message = r"no tap saw: 0\.weight, 0\.bias\..*compiled and run before"
        with pytest.raises(RuntimeError, match=message):
            backward(model, batch)
    else:
        backward(model, batch)
        agrees(hooks.collect(), grads)


def test_a_batch_beyond_the_capacity_of_a_compiled_model_is_explained():
    model = make_mlp()
    GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    backward(compiled, make_batch(8))
    with raises_while_compiling("capacity"):
        backward(compiled, make_batch(1500))


@pytest.mark.parametrize("samples", [None, 3])
def test_a_capacity_given_beforehand_serves_a_compiled_model(samples):
    model, batch = make_mlp(), make_batch(1500)
    hooks = GradSampleHooks(model, samples=samples, capacity=1500)
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    moments = hooks.collect()
    assert (moments.batch_size, moments.n_measured) == (1500, samples or 1500)


class Repeated(nn.Module):
    """A layer called twice, or two layers with one weight."""

    def __init__(self, tied):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4) if tied else self.first
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


@pytest.mark.parametrize("tied", [False, True])
def test_several_uses_inside_one_graph_raise(tied):
    torch.manual_seed(0)
    model, batch = Repeated(tied), make_batch(targets=4)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    message = r"(?s)do not compile the model|run the model without torch\.compile"
    with raises_while_compiling(message):
        backward(compiled, batch)
    hooks.reset()
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_uses_in_parts_that_are_compiled_apart_raise_or_are_exact():
    torch.manual_seed(0)
    model, batch = Repeated(tied=False), make_batch(targets=4)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    model.second.compile(backend="aot_eager", fullgraph=True)
    hooks = GradSampleHooks(model)
    try:
        backward(model, batch)
    except RuntimeError as error:
        assert "run the model without torch.compile" in str(error)  # noqa: PT017
    else:
        agrees(hooks.collect(), grads)


class Uses(nn.Module):
    """Calls its layers, and in `body` may use their weights without."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.body = None

    def forward(self, ids):
        h = torch.tanh(self.first(self.norm(self.table(ids))))
        return self.last(h if self.body is None else self.body(self, h)).mean(1)


IN_A_GRAPH = {
    "a weight": ("first", lambda m, h: linear(h, m.first.weight)),
    "its transpose": ("first", lambda m, h: h @ m.first.weight.T),
    "layer.forward": ("first", lambda m, h: m.first.forward(h)),
    "a bias": ("first", lambda m, h: h * m.first.bias),
    "the scale of a norm": ("norm", lambda m, h: h * m.norm.weight),
    "rows of a table": ("table", lambda m, h: h + m.table.weight[2]),
}


def train_compiled(model, loss_fn, steps, change=None, start=0, **options):
    """Each step's moments, or why it was left out, beside the oracle's gradients."""
    hooks = GradSampleHooks(model, **options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    try:
        for step in range(steps):
            if step == start:
                model.body = change
            batch = torch.randint(7, (8, 5)), torch.randn(8, 3)
            with hooks.paused():
                grads = oracle.per_sample_grads(model, loss_fn, batch)
            model.zero_grad()
            backward(compiled, batch, loss_fn)
            try:
                yield hooks.collect(), grads
            except NotMeasured as error:
                yield error, grads
    finally:
        hooks.remove()


@pytest.mark.parametrize(("layer", "body"), IN_A_GRAPH.values(), ids=IN_A_GRAPH)
def test_a_use_in_the_graph_that_bypasses_the_layer_is_refused(layer, body):
    torch.manual_seed(0)
    model = Uses()
    names = rf"{layer}\.\w+(, {layer}\.\w+)?"
    message = rf"do not add up.*: {names}\. In a compiled graph.*model without torch\.compile"
    with pytest.raises(RuntimeError, match=message):
        list(train_compiled(model, squared_error, 1, body, samples=3))
    hooks, batch = GradSampleHooks(model), (torch.randint(7, (8, 5)), torch.randn(8, 3))
    grads = oracle.per_sample_grads(model, squared_error, batch)
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


BESIDE_A_GRAPH = {
    "a penalty": lambda m, b: m(b[0]).square().sum(1) + b[2].first.weight.square().sum(),
    "a tied weight in the loss": lambda m, b: (m(b[0]) @ b[2].last.weight).square().sum(1),
}


@pytest.mark.parametrize("loss_fn", BESIDE_A_GRAPH.values(), ids=BESIDE_A_GRAPH)
def test_a_use_beside_the_graph_is_refused(loss_fn):
    torch.manual_seed(0)
    model = Uses()
    GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = torch.randint(7, (8, 5)), torch.randn(8, 3), model
    with pytest.raises(RuntimeError, match=r"(?s)do not add up.*weight"):
        loss_fn(compiled, batch).mean().backward()


@pytest.mark.parametrize("start", [pytest.param(3, marks=pytest.mark.slow), 20])
def test_a_use_in_the_graph_that_begins_later_is_refused(start):
    """Until then all steps are measured, with and without the comparison."""
    torch.manual_seed(0)
    seen = []
    steps = train_compiled(Uses(), squared_error, start + 3, IN_A_GRAPH["a weight"][1], start,
                           samples=3)
    with pytest.raises(RuntimeError, match="do not add up"):
        seen.extend(steps)
    for moments, grads in seen[:start]:
        agrees(moments, grads)
    late = seen[start:]
    assert len(late) == (start > 16)  # the passes before are all compared
    assert all("compiled the model again" in str(moments) for moments, _ in late)


HOOKED_STRICTLY = pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.9 exports no layer with any forward hook strictly"
)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=HOOKED_STRICTLY)])
def test_exported_models_have_no_tap(strict):
    model, batch = make_mlp(), make_batch()
    plain = torch.export.export(model, (batch[0],), strict=strict)
    expected = [node.name for node in plain.graph.nodes]
    GradSampleHooks(model, samples=3)
    exported = torch.export.export(model, (batch[0],), strict=strict)
    assert [node.name for node in exported.graph.nodes] == expected
    close(exported.module()(batch[0]), model(batch[0]), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_models_have_no_tap():
    model, batch = make_mlp(), make_batch()
    expected = str(torch.jit.trace(model, (batch[0],)).inlined_graph).count("aten::")
    GradSampleHooks(model)
    traced = torch.jit.trace(model, (batch[0],))
    assert str(traced.inlined_graph).count("aten::") == expected
    assert torch.equal(traced(batch[0]), model(batch[0]))


def test_func_transforms_are_not_tapped():
    model, batch = make_mlp(), make_batch()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, inputs, targets):
        def call(inputs):
            return torch.func.functional_call(model, parameters, (inputs,))

        return squared_error(call, (inputs[None], targets[None])).sum()

    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=3)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, *batch)
    jacobian = torch.func.jacrev(model)(batch[0])
    for name, rows in grads.items():
        close(per_sample[name], rows, 1e-5)
    assert jacobian.shape == (8, 3, 8, 4)
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        hooks.collect()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_importing_leaves_the_compiler_alone():
    """Importing it takes as long as importing torch itself."""
    source = (
        "import sys, torch\nbefore = 'torch._dynamo' in sys.modules\nimport adabatch\n"
        "assert before or 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", source], check=True)
