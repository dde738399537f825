"""Which inputs carry samples is learned from passes of unlike N, not from one size: constants as
long as the batch, before and after their role is settled, beside samples whose flow is lost."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch import GradSampleHooks
from adabatch.grad_sample.functional.flow import Roles
from adabatch.interfaces import NotMeasured
from tests.grad_sample.measuring import Double, close

K, D = 6, 4
# A small batch, then one that is larger, then one as long as the constant.
SIZES = (3, 8, K)


class Case(nn.Module):
    """Layers `a` and `b` and a constant of K rows, as a buffer or hidden from the hooks."""

    def __init__(self, forward, constant=(K, D), as_buffer=False, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        for name, part in parts.items():
            setattr(self, name, part())
        if as_buffer:
            self.register_buffer("constant", torch.randn(constant))
        else:
            self.constant = torch.randn(constant)
        self.case = forward

    def forward(self, *inputs):
        return self.case(self, *inputs)


def by_list(x):
    """The same numbers, in a way that no hook can follow."""
    return torch.tensor(x.tolist(), dtype=x.dtype)


def two_layers(m, x):
    return m.b(m.a(x).tanh())


def grid(m, x):
    return m.a(x) @ m.b(m.constant.tanh()).T


CONSTANTS = {
    "grid of an operator network": (grid, {}),
    "item features": (lambda m, x: (m.a(x)[:, None] * m.b(m.constant)).sum(-1), {}),
    "class texts": (lambda m, x: F.normalize(m.a(x), dim=-1) @ F.normalize(
        m.b(m.constant), dim=-1).T, {}),
    "two layers on a table": (lambda m, x: m.a(x) @ m.c(m.b(m.constant).tanh()).T,
                              {"c": lambda: nn.Linear(D, D)}),
    "a mask of a layer's weights": (lambda m, x: torch.cdist(m.a(x), m.b(m.constant)), {}),
    "a hypernetwork": (lambda m, x: F.linear(m.a(x), m.b(m.constant)), {}),
    "prototypes beside a traced parameter": (
        lambda m, x: torch.cdist(m.a(x) * m.p, m.constant),
        {"p": lambda: nn.Parameter(torch.ones(D))}),
    "a function of a table": (lambda m, x: m.a(x) @ m.b(Double.apply(m.constant)).T, {}),
}
FLOW_LOST = {
    "a list": lambda m, x: m.b(m.a(by_list(x)).tanh()),
    "a NumPy array": lambda m, x: m.b(m.a(torch.from_numpy(x.numpy())).tanh()),
    "noise of the batch's size": lambda m, x: m.b(m.a(torch.ones(len(x), D).double()) + 1) * 3 + (
        x.sum() * 0),
}


def norms(model, *batch):
    """‖g_i‖² by one backward pass per sample; every input of N rows is cut."""
    size, parameters = len(batch[0]), list(model.parameters())
    found = []
    for row in range(size):
        own = [each[row : row + 1] if len(each) == size else each for each in batch]
        loss = model(*own).square().mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(sum(float(grad.square().sum()) for grad in grads if grad is not None))
    return torch.tensor(found, dtype=torch.float64)


def measured(model, hooks, *batch):
    model.zero_grad()
    model(*batch).flatten(1).square().mean(1).mean().backward()
    return hooks.collect().sq_norms


def expected(model, hooks, *batch):
    with hooks.paused():
        return norms(model, *batch)


@pytest.mark.parametrize("as_buffer", [True, False], ids=["buffer", "attribute"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_as_long_as_a_later_batch(name, as_buffer):
    forward, parts = CONSTANTS[name]
    model = Case(forward, as_buffer=as_buffer, **parts).double()
    model.constant = model.constant.double()
    hooks = GradSampleHooks(model)
    for size in SIZES:
        x = torch.randn(size, D).double()
        close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)


@pytest.mark.parametrize("as_buffer", [True, False], ids=["buffer", "attribute"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_as_long_as_the_first_batch_is_not_guessed(name, as_buffer):
    """A buffer is seen to be a constant; of others the step is not measured until a batch of
    another size has come, and then for good."""
    forward, parts = CONSTANTS[name]
    model = Case(forward, as_buffer=as_buffer, **parts).double()
    model.constant = model.constant.double()
    hooks, x = GradSampleHooks(model), torch.randn(K, D).double()
    if as_buffer or "prototypes" in name:
        close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)
    else:
        with pytest.raises(NotMeasured, match=rf"has {K} rows.*adabatch\.check"):
            measured(model, hooks, x)
    for size in (K - 1, K, K, 9):
        x = torch.randn(size, D).double()
        close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)


@pytest.mark.parametrize("name", CONSTANTS)
def test_check_settles_it_where_all_batches_have_one_size(name):
    forward, parts = CONSTANTS[name]
    model, x = Case(forward, **parts).double(), torch.randn(K, D).double()
    model.constant = model.constant.double()
    report = adabatch.check(model, x, lambda model, x: model(x).flatten(1).square().mean(1),
                            verbose=False)
    assert report.ok, str(report)
    hooks = GradSampleHooks(model, layout=report)
    for _ in range(2):
        close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)


def test_check_settles_what_a_second_input_is():
    def loss_fn(model, batch):
        return model(*batch).square().mean(1)

    model = Case(lambda m, x, y: m.a(x) @ (m.p * y).T, p=lambda: nn.Parameter(torch.ones(D)))
    model, batch = model.double(), [torch.randn(5, D).double() for _ in range(2)]
    hooks = GradSampleHooks(model)
    with pytest.raises(NotMeasured, match="input 2 is called with has 5 rows"):
        measured(model, hooks, *batch)
    hooks.remove()
    report = adabatch.check(model, batch, loss_fn, verbose=False)
    assert report.ok, str(report)
    hooks = GradSampleHooks(model, layout=report)
    got = measured(model, hooks, *batch)
    with hooks.paused():
        want = [sum(float(grad.square().sum()) for grad in torch.autograd.grad(
            loss, list(model.parameters())[:3], retain_graph=True, allow_unused=True)
            if grad is not None) for loss in loss_fn(model, batch)]
    close(got, want, 1e-9)


@pytest.mark.parametrize("name", FLOW_LOST)
def test_samples_whose_flow_is_lost_are_settled_by_a_batch_of_another_size(name):
    model = Case(FLOW_LOST[name]).double()
    hooks, x = GradSampleHooks(model), torch.randn(5, D).double()
    with pytest.raises(NotMeasured, match="a is called with has 5 rows"):
        measured(model, hooks, x)
    for size in (7, 5, 5):
        x = torch.randn(size, D).double()
        close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)


@pytest.mark.parametrize("forward", [
    lambda m, x: m.b(Double.apply(m.a(x))), lambda m, x: m.b(m.a(Double.apply(x))),
    lambda m, x: m.b(m.a(x) + m.a(torch.zeros_like(x)) + m.a(x.new_ones(x.shape))),
    lambda m, x: m.b(torch.stack([m.a(row) for row in x.unbind(1)], 1)),
    lambda m, x: m.b(m.a(x).transpose(0, 1).cumsum(0).transpose(0, 1)),
    lambda m, x: m.b(torch.einsum("ntd,nsd->nts", m.a(x), m.a(x)).softmax(-1) @ x),
], ids=["autograd.Function", "of the inputs", "zeros like", "positions in a loop",
        "time first and back", "einsum"])
def test_what_the_data_flow_shows_is_measured_at_once(forward):
    model = Case(forward).double()
    hooks, x = GradSampleHooks(model), torch.randn(5, 5, D).double()
    close(measured(model, hooks, x), expected(model, hooks, x), 1e-9)


@pytest.mark.parametrize("forward", [
    lambda m, x, t: m.a(x) + m.b(t),
    lambda m, x, t: torch.cat([m.a(x), m.b(t)], dim=1),
    lambda m, x, t: m.a(x) * m.b(t).sigmoid() + m.b(t),
], ids=["added", "concatenated", "gated"])
def test_a_second_input_that_meets_the_samples_row_by_row_is_measured_at_once(forward):
    model = Case(forward).double()
    hooks, batch = GradSampleHooks(model), [torch.randn(5, D).double() for _ in range(2)]
    close(measured(model, hooks, *batch), expected(model, hooks, *batch), 1e-9)


def test_a_second_input_that_does_not_is_a_table_or_samples():
    """Two towers: users and items, as many items as users, or always the same ones."""
    model = Case(lambda m, x, y: m.a(x) @ m.b(y).T).double()
    hooks, table = GradSampleHooks(model), torch.randn(K, D).double()
    with pytest.raises(NotMeasured, match=f"input 2 is called with has {K} rows"):
        measured(model, hooks, torch.randn(K, D).double(), table)
    model.zero_grad()
    x = torch.randn(4, D).double()
    close(measured(model, hooks, x, table), expected(model, hooks, x, table), 1e-9)
    x = torch.randn(K, D).double()
    want = torch.tensor([float(sum(
        grad.square().sum() for grad in torch.autograd.grad(
            (model.a(row[None]) @ model.b(table).T).square().mean(), list(model.parameters()))))
        for row in x], dtype=torch.float64)
    close(measured(model, hooks, x, table), want, 1e-9)


@pytest.mark.parametrize("first", [
    torch.randn(3), torch.randn(K, K), {"times": torch.randn(3)}, torch.tensor(2.0)],
    ids=["times", "adjacency", "in a dict", "scalar"])
def test_a_first_input_without_samples(first):
    """An error that names from where N was read, and layout= mends it; a scalar has no rows."""
    values = first["times"] if isinstance(first, dict) else first

    def forward(m, first, x):
        return values.double() @ m.a(x) if values.dim() == 2 else m.a(x) * values.sum()

    model, x = Case(forward).double(), torch.randn(4, K, D).double()
    loss_fn = lambda model, batch: model(*batch).flatten(1).square().mean(1)  # noqa: E731
    report = adabatch.check(model, (first, x), loss_fn, verbose=False)
    assert report.ok, str(report)
    assert "args[1]" in str(report.batch_size_source) or "inputs" in str(report.batch_size_source)
    hooks = GradSampleHooks(model)
    if values.dim():
        with pytest.raises(RuntimeError, match="read from dimension 0 of the first tensor"):
            measured(model, hooks, first, x)
        hooks.remove()
        hooks = GradSampleHooks(model, layout=report)
    model.zero_grad()
    loss_fn(model, (first, x)).mean().backward()
    parameters = list(model.a.parameters())
    with hooks.paused():
        losses = loss_fn(model, (first, x))
        want = [sum(float(grad.square().sum()) for grad in torch.autograd.grad(
            loss, parameters, retain_graph=True)) for loss in losses]
    close(hooks.collect().sq_norms, want, 1e-9)


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor


def test_a_data_class_as_the_models_input_and_output():
    def forward(m, batch):
        return Batch(m.b(m.a(batch.x) * m.p) * batch.mask, batch.mask)

    model = Case(forward, p=lambda: nn.Parameter(torch.ones(D))).double()
    batch = Batch(torch.randn(5, D).double(), torch.ones(5, 1).double())
    hooks = GradSampleHooks(model)
    model(batch).x.square().mean().backward()
    want = [sum(float(grad.square().sum()) for grad in torch.autograd.grad(
        (model.b(model.a(row[None]) * model.p)).square().mean(), list(model.parameters())))
        for row in batch.x]
    close(hooks.collect().sq_norms, want, 1e-9)


def test_time_first_is_not_taken_for_samples_where_both_are_as_long():
    model = Case(lambda m, x: m.b(m.a(x.transpose(0, 1))).transpose(0, 1)).double()
    for length in (5, 3):
        hooks = GradSampleHooks(model)
        with pytest.raises(RuntimeError, match=r"adabatch\.check"):
            measured(model, hooks, torch.randn(5, length, D).double())
        hooks.remove()


def test_roles_are_kept_for_good():
    roles = Roles()
    for size, n_samples, found in ((8, 8, None), (8, 5, False), (8, 8, False)):
        roles.begin(n_samples)
        assert roles.carries(("table", 0), size) is found
        assert bool(roles.open) == (found is None)


def train(model, batch_sizes, first):
    data = TensorDataset(torch.randn(96, D))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, DataLoader(data, batch_size=first), batch_sizes=batch_sizes,
        measure="all", controller=adabatch.controllers.Scheduled(f"0:{first}"))
    sizes = []
    for (x,) in loader:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        sizes.append(len(x))
    return sizes, scheduler.diagnostics


@pytest.mark.parametrize(("bounds", "second"), [((2, 32), K + 1), ((2, K), K - 1)])
def test_wrap_lets_the_second_batch_differ_while_a_role_is_open(bounds, second):
    with pytest.warns(UserWarning, match=f"b is called with has {K} rows") as caught:
        sizes, diagnostics = train(Case(grid), bounds, K)
    assert sizes[:3] == [K, second, K]
    assert sum("is called with" in str(each.message) for each in caught) == 1
    dropped = [record.dropped for record in diagnostics]
    assert dropped[0].startswith("it is not known yet")
    assert not any(dropped[1:-1])  # the last batch may be of one sample


def test_wrap_leaves_the_sizes_where_nothing_is_open(recwarn):
    sizes, diagnostics = train(Case(two_layers), (2, 32), K)
    assert sizes == [K] * (96 // K)
    assert not any(record.dropped for record in diagnostics)
    assert not [each for each in recwarn if "is called with" in str(each.message)]
