"""Which of several inputs of a layer carry samples, and whether those of layers do that are called
outside of the model's forward: never guessed from N rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adabatch
from adabatch import GradSampleHooks
from adabatch.interfaces import NotMeasured
from tests import oracle

K, D = 6, 4
LATE, FIRST = (5, 7, K, K, 5, K, 8, K), (K, K, 5, K, K)


class Lookup(nn.Module):
    """Attention of each sample over the rows of a table."""

    def __init__(self):
        super().__init__()
        self.w, self.g = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))

    def forward(self, x, table):
        return torch.softmax(x @ self.w @ table.T, -1) @ table * self.g


class Product(Lookup):
    """Both inputs carry samples."""

    def forward(self, x, other):
        return (x @ self.w) * other * self.g


class Model(nn.Module):
    def __init__(self, call, layer=Lookup):
        super().__init__()
        self.layer, self.a, self.b = layer(), nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("table", torch.randn(K, D))
        self.numbers = torch.randn(K, D, dtype=torch.float64)
        self.call = call

    def forward(self, x):
        return self.b(self.call(self, torch.tanh(self.a(x))))

    def text(self, table):
        return self.b(torch.tanh(self.a(table)))


def squares(model, x):
    return model(x).square().mean(1)


def outcomes(model, loss_fn, sizes, batch=lambda n: torch.randn(n, D).double(), **options):
    """Of one pass of each size: what the pass gave, "right" or the error."""
    found = []
    hooks = GradSampleHooks(model, **options)
    for size in sizes:
        inputs = batch(size)
        with hooks.paused():
            grads = oracle.per_sample_grads(model, loss_fn, inputs)
        model.zero_grad()
        try:
            loss_fn(model, inputs).mean().backward()
            moments = hooks.collect()
        except RuntimeError as error:
            found.append(error)
            hooks.reset()
            continue
        rows = slice(None) if moments.indices is None else moments.indices
        torch.testing.assert_close(moments.sq_norms, oracle.sq_norms(grads)[rows])
        found.append("right")
    hooks.remove()
    return found


TABLES = {
    "buffer": lambda m, x: m.layer(x, m.table),
    "by keyword": lambda m, x: m.layer(table=m.table, x=x),
    "attribute": lambda m, x: m.layer(x, m.numbers),
    "two tables": lambda m, x: m.layer(m.layer(x, m.table), m.numbers),
    "ones": lambda m, x: m.layer(x, torch.ones(K, D).double() * torch.arange(K)[:, None]),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("sizes", [LATE, FIRST], ids=["late", "first"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_beside_the_samples_of_a_layer_without_a_rule(name, sizes, samples):
    torch.manual_seed(0)
    found = outcomes(Model(TABLES[name]).double(), squares, sizes, samples=samples)
    assert found.count("right") >= len(sizes) - 2  # open until a batch has another size
    assert all(each == "right" or isinstance(each, NotMeasured) for each in found)


RARE = {
    "attribute": lambda m, x: x + m.c(m.numbers).mean(0),
    "ones": lambda m, x: x + m.c(torch.ones(K, D).double()).mean(0),
    "NumPy": lambda m, x: x + m.c(torch.from_numpy(m.numbers.numpy())).mean(0),
    "layer without a rule": lambda m, x: x + m.layer(m.numbers, m.numbers).mean(0),
}


@pytest.mark.parametrize("abandoned", [False, True])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("name", RARE)
def test_a_table_that_only_batches_of_its_size_use_stays_open(name, samples, abandoned):
    """No batch of another size ever settles it, and passes without it settle nothing."""
    torch.manual_seed(0)
    model = Model(lambda m, x: RARE[name](m, x) if m.used else x)
    model.c = nn.Linear(D, D)
    model.double()

    def batch(n):
        model.used = n == K
        inputs = torch.randn(n, D).double()
        if abandoned:
            model(inputs)  # and the loop raises before backward()
        return inputs

    sizes = (5, 7, 4, K, K, 5, K, 8, K, 8, 8, K)
    found = outcomes(model, squares, sizes, batch, samples=samples)
    for size, each in zip(sizes, found, strict=True):
        assert isinstance(each, NotMeasured) if size == K else each == "right"
    report = adabatch.check(model, batch(K), squares)  # the fix that the error names
    found = outcomes(model, squares, sizes, batch, samples=samples, layout=report)
    assert found == ["right"] * len(sizes)


@pytest.mark.parametrize("call", [
    lambda m, x: m.layer(x, 2 * x),
    lambda m, x: m.layer(x, torch.zeros(len(x), D).double() + 1),
    lambda m, x: m.layer(x, torch.tensor(x.tolist()).double() + 1),  # not followed
], ids=["followed", "equal rows", "unknown"])
def test_two_inputs_with_samples_are_measured_at_once(call):
    torch.manual_seed(0)
    assert outcomes(Model(call, Product).double(), squares, (K, K, 5)) == ["right"] * 3


def texts(model, batch):
    return F.cross_entropy(model.text(batch[0]) @ model.text(TABLE).T, batch[1], reduction="none")


def texts_before(model, batch):
    table = model.text(TABLE)
    return F.cross_entropy(model(batch[0]) @ table.T, batch[1], reduction="none")


def texts_after(model, batch):
    return F.cross_entropy(model(batch[0]) @ model.text(TABLE).T, batch[1], reduction="none")


def texts_inside(model, batch):
    model.call = lambda m, x: x @ m.text(TABLE).T @ TABLE
    return model(batch[0]).square().mean(1)


TABLE = torch.randn(K, D, generator=torch.Generator().manual_seed(1)).double()


def labelled(n):
    return torch.randn(n, D).double(), torch.randint(K, (n,))


@pytest.mark.parametrize("loss_fn", [texts, texts_before, texts_after])
def test_a_table_outside_of_the_models_forward_is_never_measured(loss_fn):
    torch.manual_seed(0)
    model = Model(lambda m, x: x).double()
    for sizes in LATE, FIRST:
        found = outcomes(model, loss_fn, sizes, labelled)
        assert "right" not in found
        assert any("Called outside of the model's forward: " in str(each) for each in found)
    # The fix that the error names.
    assert "right" in outcomes(model, texts_inside, LATE, labelled)


@pytest.mark.parametrize("loss_fn", [
    lambda m, batch: (m.text(batch[0]) * m.text(batch[1])).sum(1).square(),
    lambda m, batch: (m(batch[0]) * m.text(batch[1])).sum(1).square(),
    lambda m, batch: (m(m.a(batch[0])) * m.text(batch[1])).sum(1).square(),
], ids=["methods", "call and method", "method before the call"])
def test_pairs_outside_of_the_models_forward_are_settled_by_another_size(loss_fn):
    def pairs(n):
        return torch.randn(n, D).double(), torch.randn(n, D).double()

    torch.manual_seed(0)
    model = Model(lambda m, x: x).double()
    found = outcomes(model, loss_fn, (K, K, 5, K, 7), pairs)
    assert [type(each) for each in found[:2]] == [NotMeasured] * 2
    assert found[2:] == ["right"] * 3
    report = adabatch.check(model, pairs(K), loss_fn)  # where all batches have one size
    assert outcomes(model, loss_fn, (K, K), pairs, layout=report) == ["right"] * 2


@pytest.mark.parametrize("loss_fn", [
    lambda m, x: m.text(x).square().mean(1),
    lambda m, x: m.b(m.a(x).tanh() + m.a(x[:, :D])).square().mean(1),
    lambda m, x: m(m.a(x)).square().mean(1),
    lambda m, x: m.a(m(x)).square().mean(1),
], ids=["method", "parts", "before the call", "after the call"])
def test_one_tensor_outside_of_the_models_forward_is_the_batch(loss_fn):
    torch.manual_seed(0)
    model = Model(lambda m, x: x).double()
    model.a(torch.randn(3, D).double()).sum()  # what takes no part in a backward pass
    assert outcomes(model, loss_fn, (K, K, 5)) == ["right"] * 3


@pytest.mark.parametrize("layer", [
    lambda: nn.MultiheadAttention(D, 2), lambda: nn.LSTM(D, D),
    lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0)], ids=["attention", "LSTM", "block"])
def test_a_time_first_layer_that_is_given_the_batch_first(layer):
    """It mixes the samples; where there are as many time steps, only the other sizes show it."""
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(), nn.Linear(D, 2)

        def forward(self, x):
            given = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
            out = self.layer(*given)
            return self.head(out[0] if isinstance(out, tuple) else out)

    torch.manual_seed(0)
    model = Mixes().double()
    for sizes in LATE, FIRST:
        found = outcomes(model, lambda m, x: m(x).square().mean((1, 2)), sizes,
                         lambda n: torch.randn(n, K, D).double())
        assert "right" not in found


@pytest.mark.parametrize("options", [{}, {"samples": 2}, {"statistics": ["inner_products"]}])
@pytest.mark.parametrize("rows", [K, K + 1, 9])
@pytest.mark.parametrize("called", [True, False], ids=["the model", "a method"])
def test_calls_with_different_numbers_of_rows_in_one_pass(called, rows, options):
    """Crops, prototypes, unlabelled samples: the mean of two sizes is none."""
    torch.manual_seed(0)
    model, table = Model(lambda m, x: x).double(), torch.randn(rows, D).double()

    def losses(model, x):
        run = model if called else model.text
        return (run(x) @ run(table).T).square().mean(1)

    found = outcomes(model, losses, (5, 5, 5), **options)
    assert all("different numbers of rows in one backward pass" in str(each) for each in found)


@pytest.mark.parametrize("samples", [None, 2])
def test_a_vector_without_a_batch_dimension(samples):
    """A step's embedding, the same for all samples: refused by name, and the fix measures it."""
    class Steps(nn.Module):
        def __init__(self, unsqueezed):
            super().__init__()
            self.a, self.step, self.unsqueezed = nn.Linear(D, 2), nn.Linear(3, 2), unsqueezed

        def forward(self, step, x):
            shift = self.step(step.unsqueeze(0) if self.unsqueezed else step)
            return self.a(x) + shift

    torch.manual_seed(0)
    step = torch.ones(3).double()
    found = outcomes(Steps(False).double(), lambda m, x: m(step, x).square().mean(1), (5, 7),
                     samples=samples)
    assert all("has no batch dimension" in str(each) for each in found)
    assert all("call the model with the samples first" in str(each) for each in found)

    class SamplesFirst(Steps):
        def forward(self, x, step):
            return super().forward(step, x)

    assert outcomes(SamplesFirst(True).double(), lambda m, x: m(x, step).square().mean(1), (5, 7),
                    samples=samples) == ["right"] * 2


def test_a_layer_of_no_width():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 0), nn.Linear(0, 3)).double()
    assert outcomes(model, squares, (5, 7)) == ["right"] * 2


def test_a_step_that_is_left_out_after_backward():
    torch.manual_seed(0)
    model = nn.Linear(D, 2)
    data = torch.utils.data.TensorDataset(torch.randn(32, D))
    optimizer, loader, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1),
        torch.utils.data.DataLoader(data, batch_size=8), batch_sizes=(8, 8), measure="all")
    for resets in False, True:
        for step, (x,) in enumerate(loader):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if step == 1:  # a gradient that is not finite, say
                if resets:
                    scheduler.estimator.reset()
                continue
            optimizer.step()
            if step == 2 and not resets:
                with pytest.raises(RuntimeError, match=r"call scheduler\.estimator\.reset\(\)"):
                    scheduler.step(loss)
                scheduler.estimator.reset()
                break
            scheduler.step(loss)
    assert scheduler.diagnostics.latest.measured
    scheduler.remove()
