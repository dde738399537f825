"""Tracing beside torch.compile: compiled parts and functions in an eager model stay whole; what a
graph cannot hold is refused with the fix."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adabatch
from adabatch import GradSampleHooks
from tests.grad_sample.measuring import Double, close, raises_while_compiling
from tests.grad_sample.same_forward import double, exact, grads_of_one_forward, outputs_loss

N, T, D = 5, 6, 4


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Body(nn.Sequential):
    """With a forward of its own: torch up to 2.13 compiles no plain nn.Sequential by compile()."""

    def forward(self, x):
        return super().forward(x)


class Model(nn.Module):
    """A position table (an Embedding or a raw parameter) before a body."""

    def __init__(self, table):
        super().__init__()
        torch.manual_seed(0)
        tables = {"embedding": nn.Embedding(9, D), "raw": nn.Parameter(torch.randn(9, D))}
        self.table = tables.get(table)
        self.body = Body(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, D))
        self.head = nn.Linear(D, 2)
        self.function = torch.tanh

    def forward(self, x):
        if isinstance(self.table, nn.Embedding):
            x = x + self.table(torch.arange(x.shape[1]))
        elif self.table is not None:
            x = x + self.table[: x.shape[1]]
        hidden = self.function(self.body(x))
        return self.head(hidden if not isinstance(self.table, nn.Parameter)
                         else hidden * self.table[0])


def compile_(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def measure_compiled(model, compile_part):
    """Norms of steps of an eager model, a part of which is compiled after the hooks are attached,
    against one backward pass per sample."""
    model, batch = model.double(), double((torch.randn(N, T, D),))
    grads = grads_of_one_forward(model, batch)
    hooks = GradSampleHooks(model)
    compile_part(model)
    for _ in range(3):
        model.zero_grad()
        outputs_loss(model, batch).mean().backward()
        close(hooks.collect().sq_norms, sum(
            grad.flatten(1).square().sum(1) for grad in grads.values()), 1e-9)


@pytest.mark.parametrize("table", ["none", "embedding", "raw"])
def test_a_part_compiled_after_attaching(table):
    measure_compiled(Model(table), lambda model: model.body.compile(
        backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("table", ["none", "embedding", "raw"])
def test_a_compiled_function_inside_the_forward_pass(table):
    def compile_part(model):
        model.function = compile_(lambda x: 2 * torch.tanh(x / 2))

    model = Model(table)
    model.function = lambda x: 2 * torch.tanh(x / 2)
    measure_compiled(model, compile_part)


def test_a_traced_parameter_used_by_a_compiled_function_raises():
    model = Model("raw")
    model.forward = lambda x: model.head(compile_(lambda y, scale: y * scale)(
        model.body(x), model.table[0]))
    with pytest.raises(RuntimeError, match="no tap saw: table"):
        exact(model, torch.randn(N, T, D))


def test_a_compiled_model_with_traced_parameters_is_refused():
    model = Model("raw")
    GradSampleHooks(model)
    with raises_while_compiling(
        "a compiled graph cannot measure parameters that no layer with a tap uses: table"
    ):
        compile_(model)(torch.randn(N, T, D))


@pytest.mark.parametrize("checked", [False, True])
def test_a_compiled_model_with_a_shared_position_table_is_refused(checked):
    model, batch = Model("embedding").double(), double((torch.randn(N, T, D),))
    layout = adabatch.check(model, batch, outputs_loss, verbose=False) if checked else None
    GradSampleHooks(model, layout=layout)
    with raises_while_compiling("position tables that are looked up once" if checked
                                else r"table \(6\).*adabatch\.check"):
        outputs_loss(compile_(model), batch).mean().backward()


def test_the_output_of_a_custom_autograd_function_meets_a_traced_parameter():
    model = Model("raw")
    model.function = Double.apply
    exact(model, torch.randn(N, T, D))


def test_distributed_data_parallel_with_traced_parameters(one_process):
    model, batch = Model("raw").double(), double((torch.randn(N, T, D),))
    grads = grads_of_one_forward(model, batch)
    parallel = DistributedDataParallel(model)
    hooks = GradSampleHooks(parallel)
    for _ in range(2):
        parallel.zero_grad()
        outputs_loss(parallel, batch).mean().backward()
        close(hooks.collect().sq_norms, sum(
            grad.flatten(1).square().sum(1) for grad in grads.values()), 1e-9)
