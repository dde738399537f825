"""The backward pass of products that no layer with a rule makes: exact norms and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adabatch.grad_sample.taps import products
from tests.grad_sample.measuring import untraceable
from tests.grad_sample.same_forward import exact

N, T, D = 5, 3, 4


class Conv1D(nn.Module):
    """A Linear layer with its weight transposed, of samples and positions in one dimension."""

    def __init__(self, width=D, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, width))
        self.bias = nn.Parameter(torch.randn(width)) if bias else torch.ones(width).double()

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, D), self.weight).view(*x.shape[:-1], -1)


class Own(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        self.case = case

    def forward(self, x):
        return self.case(self, x)


FUSED = {
    "addmm": Conv1D,
    "linear": lambda: Own(lambda m, x: F.linear(x, m.weight, m.bias)),
    "linear, no bias": lambda: Own(lambda m, x: F.linear(x, m.weight) * m.bias),
    "matmul": lambda: Own(lambda m, x: x @ m.weight + m.bias),
    "twice": lambda: Own(lambda m, x: F.linear(F.linear(x, m.weight, m.bias), m.weight, m.bias)),
    "and another use": lambda: Own(lambda m, x: F.linear(x, m.weight) + m.weight[0] * m.bias),
    "not traced in the end": lambda: Own(lambda m, x: untraceable(F.linear(x, m.weight, m.bias))),
    "followed in place": lambda: Own(lambda m, x: F.linear(x, m.weight, m.bias).mul_(2).relu_()),
}
PLAIN = {
    "a constant bias": lambda: Conv1D(bias=False),
    "one position": lambda: Own(lambda m, x: torch.stack(
        [F.linear(each, m.weight, m.bias) for each in x.unbind(1)], 1)),
    "a transposed weight": lambda: Own(lambda m, x: F.linear(x, m.weight.T, m.bias)),
}


def count(monkeypatch):
    taps, place = [], products.ProductTap.apply
    monkeypatch.setattr(products.ProductTap, "apply",
                        lambda *args: (taps.append(args[-1]), place(*args))[1])
    return taps


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layer", FUSED.values(), ids=FUSED)
def test_exact(layer, checkpointed, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(D, D), layer(), nn.Linear(D, 2)

        def forward(self, x):
            x = self.first(x)
            x = checkpoint(self.layer, x, use_reentrant=False) if checkpointed else self.layer(x)
            return self.last(x)

    torch.manual_seed(0)
    taps = count(monkeypatch)
    exact(Model(), torch.randn(N, T, D))
    assert taps


@pytest.mark.parametrize("options", [{"samples": 2}, {"statistics": ["second_moment"]},
                                     {"statistics": ["inner_products"]}], ids=str)
def test_with_more_to_measure_than_norms_of_all_samples_the_backward_pass_is_torchs(
        options, monkeypatch):
    torch.manual_seed(0)
    taps = count(monkeypatch)
    exact(nn.Sequential(Conv1D(), nn.Linear(D, 2)), torch.randn(N, T, D), **options)
    assert not taps


@pytest.mark.parametrize("layer", PLAIN.values(), ids=PLAIN)
def test_other_products(layer, monkeypatch):
    torch.manual_seed(0)
    taps = count(monkeypatch)
    exact(nn.Sequential(nn.Linear(D, D), layer(), nn.Linear(D, 2)), torch.randn(N, T, D))
    assert not taps


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), Conv1D(), nn.Linear(D, 2))
    model[1].get_parameter(frozen).requires_grad_(False)
    exact(model, torch.randn(N, T, D))


def test_the_first_layer_needs_no_gradient_of_its_input():
    torch.manual_seed(0)
    exact(nn.Sequential(Conv1D(), nn.Tanh(), Conv1D(2)), torch.randn(N, T, D))
