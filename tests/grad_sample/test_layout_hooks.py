"""Hooks given what check() found: samples along the second dimension, flattened in both orders,
shared by all; and the errors without it."""

import pytest
import torch
from torch import nn

import adabatch
from adabatch import GradSampleHooks
from tests.grad_sample.same_forward import double, exact, outputs_loss

N, T, D = 5, 6, 4


class Scale(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        return torch.tanh(x) * self.scale


class Arranged(nn.Module):
    """Layers that see the samples in an order of the case's making: arrange(x [N, T, D]) -> their
    input, restore(their output, x) -> [N, ...]."""

    def __init__(self, arrange, restore, generic=True):
        super().__init__()
        self.arrange, self.restore = arrange, restore
        self.body = nn.Sequential(nn.Linear(D, D), Scale() if generic else nn.LayerNorm(D),
                                  nn.LayerNorm(D), nn.Linear(D, D))
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        return self.head(self.restore(self.body(self.arrange(x)), x))


ORDERS = {
    "batch_first": (lambda x: x, lambda y, x: y),
    "batch_second": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "flat_batch_major": (lambda x: x.flatten(0, 1), lambda y, x: y.view_as(x)),
    "flat_time_major": (lambda x: x.transpose(0, 1).flatten(0, 1), lambda y,
                        x: y.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)),
}


def checked(model, *batch):
    """The model and batch in float64, and what check() says of them."""
    model, batch = model.double(), double(batch)
    return model, batch, adabatch.check(model, batch, outputs_loss, verbose=False)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("generic", [False, True], ids=["ruled", "generic"])
@pytest.mark.parametrize("length", [T, N, 2 * N, 1], ids=["T", "T = N", "T = 2N", "T = 1"])
@pytest.mark.parametrize("name", ORDERS)
def test_exact_with_the_layout_of_check(name, length, generic, samples):
    torch.manual_seed(0)
    model, batch, report = checked(Arranged(*ORDERS[name], generic), torch.randn(N, length, D))
    if length > 1:
        assert report["body.0"].layout.value == name
    exact(model, *batch, layout=report, samples=samples)


@pytest.mark.parametrize("name", ["batch_second", "flat_batch_major", "flat_time_major"])
def test_batches_of_other_sizes_than_the_checked_one(name):
    torch.manual_seed(0)
    model, _, report = checked(Arranged(*ORDERS[name]), torch.randn(N, T, D))
    for size, length in ((1, 2), (3, 3), (8, 5), (2, 8)):
        exact(model, torch.randn(size, length, D), layout=report, steps=1)


@pytest.mark.parametrize("name", ["batch_second", "flat_batch_major", "flat_time_major"])
def test_without_check_other_layouts_raise(name):
    with pytest.raises(RuntimeError, match=r"adabatch\.check"):
        exact(Arranged(*ORDERS[name], generic=False), torch.randn(N, T, D))


class Positions(nn.Module):
    """Embeds tokens and positions; the positions once for all samples."""

    def __init__(self, leading):
        super().__init__()
        self.tokens, self.positions, self.leading = nn.Embedding(9, D), nn.Embedding(12, D), leading
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 2)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])
        return self.head(self.norm(self.tokens(ids)
                                   + self.positions(
                                       positions[None] if self.leading else positions)))


@pytest.mark.parametrize("with_layout", [True, False], ids=["checked", "assumed"])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("length", [T, N], ids=["T", "T = N"])
@pytest.mark.parametrize("leading", [True, False], ids=["[1, T]", "[T]"])
def test_position_tables_shared_by_all_samples(leading, length, samples, with_layout):
    torch.manual_seed(0)
    model, batch, report = checked(Positions(leading), torch.randint(0, 9, (N, length)))
    if with_layout:
        assert report["positions"].layout.value == "shared"
    exact(model, *batch, layout=report if with_layout else None, samples=samples)


class TimeFirstRecurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0]).transpose(0, 1)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("length", [T, N], ids=["T", "T = N"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_time_first(kind, length, samples):
    torch.manual_seed(0)
    model, batch, report = checked(TimeFirstRecurrent(kind(D, 3, 2)), torch.randn(length, N, D))
    exact(model, *batch, layout=report, samples=samples)


class Windows(nn.Module):
    """Attention within windows of an image: the windows are a second batch dimension, as in
    Swin."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.linear, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        windows = self.linear(x.unflatten(1, (3, 2)).flatten(0, 1))
        return self.head(windows.tanh().view_as(x))


def test_windows_of_each_sample():
    torch.manual_seed(0)
    model = Windows()
    model.attention.requires_grad_(False)
    model, batch, report = checked(model, torch.randn(N, T, D))
    assert report["linear"].layout.value == "flat_batch_major"
    exact(model, *batch, layout=report)


def test_parts_called_without_the_model_raise_where_the_size_is_read_from_its_inputs():
    torch.manual_seed(0)
    model, batch, report = checked(Arranged(*ORDERS["flat_time_major"]), torch.randn(N, T, D))
    GradSampleHooks(model, layout=report)
    with pytest.raises(RuntimeError, match="call the model, not its parts"):
        model.body(batch[0].flatten(0, 1))
