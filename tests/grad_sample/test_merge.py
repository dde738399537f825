"""Parameters used more than once, parameters not used, and uses the taps cannot see."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import GradSampleHooks
from adabatch.grad_sample.factors.base import Dense
from adabatch.grad_sample.factors.conv import ConvOuter
from adabatch.grad_sample.factors.merge import SumOfFactors, merge_factors
from adabatch.grad_sample.factors.outer import OneHotOuter, Outer
from tests import oracle
from tests.grad_sample.measuring import (
    TOLERANCE,
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    measure,
    squared_error,
)


class TiedLinear(nn.Module):
    """Two layers with one weight; `times` > 1 calls the first again."""

    def __init__(self, times=1):
        super().__init__()
        self.first, self.second, self.times = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), times
        self.second.weight = self.first.weight

    def forward(self, inputs):
        for _ in range(self.times):
            inputs = torch.relu_(self.first(inputs))
        return self.second(inputs)


class CalledTwice(nn.Module):
    def __init__(self, layer, head):
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, inputs):
        return self.head(self.layer(torch.relu_(self.layer(inputs))).flatten(1))


class TiedHead(nn.Module):
    """Embedding and head with one table; looked up `times` times."""

    def __init__(self, times=1, padding_idx=None):
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=padding_idx)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight, self.times = self.table.weight, times

    def forward(self, ids):
        hidden = sum(self.mix(self.table(ids + shift)) for shift in range(self.times))
        return self.head(torch.tanh(hidden)).mean(1)


class TiedKernel(nn.Module):
    """Two convolutions with one weight, of which factors can only be added up densely, and a PReLU
    that shares their bias."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Conv1d(3, 3, 3, padding=1), nn.PReLU(3)
        self.second = nn.Conv1d(3, 3, 3, padding=2, dilation=2)
        self.second.weight, self.act.weight = self.first.weight, self.first.bias

    def forward(self, inputs):
        return self.second(self.act(self.first(inputs))).mean(2)


def ids(*shape):
    return torch.randint(7, shape)


MODELS = {
    "tied": (TiedLinear, lambda: torch.randn(7, 4), 4),
    "tied-tokens": (lambda: nn.Sequential(TiedLinear(), nn.Flatten()), lambda: torch.randn(7, 3, 4),
                    12),
    "tied-and-twice": (lambda: TiedLinear(times=2), lambda: torch.randn(7, 4), 4),
    "twice": (lambda: CalledTwice(nn.Linear(4, 4), nn.Linear(4, 2)), lambda: torch.randn(7, 4), 2),
    "conv-twice": (lambda: CalledTwice(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Linear(32, 2)),
                   lambda: torch.randn(7, 2, 4, 4), 2),
    "norm-twice": (lambda: CalledTwice(nn.LayerNorm(4), nn.Linear(12, 2)),
                   lambda: torch.randn(7, 3, 4), 2),
    "prelu-twice": (lambda: CalledTwice(nn.PReLU(3), nn.Linear(12, 2)),
                    lambda: torch.randn(7, 3, 4) - 1, 2),
    "head": (TiedHead, lambda: ids(7, 5), 9),
    "head-padding": (lambda: TiedHead(padding_idx=3), lambda: ids(7, 5), 9),
    "head-looked-up-twice": (lambda: TiedHead(times=2), lambda: ids(7, 5), 9),
    "kernel": (TiedKernel, lambda: torch.randn(7, 3, 6), 3),
}


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_several_uses_are_summed_before_they_are_squared(name, dtype, loss_reduction, samples):
    torch.manual_seed(0)
    make, inputs, width = MODELS[name]
    model, inputs = make().to(dtype), inputs()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    batch = inputs, torch.randn(7, width, dtype=dtype)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, loss_reduction=loss_reduction, samples=samples,
                            per_parameter=True, statistics=["second_moment"])
    for _ in range(2):  # the second step knows what is used twice
        model.zero_grad()
        backward(model, batch, loss_reduction=loss_reduction)
        moments = hooks.collect()
        agrees(moments, grads, TOLERANCE[dtype])
        for name, rows in grads.items():
            rows = rows if moments.indices is None else rows[moments.indices]
            close(moments.by_parameter[name], oracle.sq_norms({name: rows}), TOLERANCE[dtype])
            close(moments.second_moment[name], oracle.second_moment({name: rows})[name],
                  TOLERANCE[dtype])


def test_a_layer_once_called_twice_stays_exact_when_called_once_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.times = nn.Linear(4, 4), 1

        def forward(self, inputs):
            for _ in range(self.times):
                inputs = torch.tanh(self.layer(inputs))
            return inputs

    torch.manual_seed(0)
    model, batch = Model(), make_batch(targets=4)
    expected = {}
    for model.times in (1, 2, 3):
        expected[model.times] = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for model.times in (1, 2, 1, 3, 3, 1):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), expected[model.times])


def test_a_branch_skipped_at_run_time_counts_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.go_left = nn.Linear(4, 3), nn.Linear(4, 3), True

        def forward(self, inputs):
            return (self.left if self.go_left else self.right)(inputs)

    model, batch = Model(), make_batch()
    expected = {}
    for model.go_left in (True, False):
        expected[model.go_left] = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, per_parameter=True)
    for set_to_none in (True, False):
        for model.go_left in (True, False):
            model.zero_grad(set_to_none=set_to_none)
            backward(model, batch)
            agrees(hooks.collect(), expected[model.go_left])


def test_layers_whose_output_gets_no_gradient_count_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, inputs):
            self.unused(inputs)
            return self.used(inputs) + self.unused(inputs).detach()

    torch.manual_seed(0)
    model, batch = Model(), make_batch()
    agrees(measure(model, batch), oracle.per_sample_grads(model, squared_error, batch))


def test_a_weight_used_without_its_layer_raises_and_lists_it():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    with pytest.raises(RuntimeError,
                       match=r"no tap saw: 0\.weight\. .*F\.linear\(x, layer\.weight\)"):
        backward(lambda inputs: model[2](F.linear(inputs, model[0].weight)), batch)
    with pytest.raises(RuntimeError, match=r"no tap saw: 0\.weight, 0\.bias\. "):
        backward(lambda inputs: model[2](F.linear(inputs, model[0].weight, model[0].bias)), batch)
    model.zero_grad()
    backward(model, batch)
    assert hooks.collect().batch_size == 8


def test_layers_with_another_first_dimension_raise_all_of_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.norm = nn.LayerNorm(4)

        def forward(self, inputs):
            tokens = self.norm(self.mix(inputs))
            tokens = self.second(self.first(tokens.flatten(0, 1))).view_as(inputs)
            return self.head(tokens).mean(1)

    torch.manual_seed(0)
    model = Model()
    hooks = GradSampleHooks(model)
    for options in ({}, {"samples": 2}):
        hooks.remove()
        hooks = GradSampleHooks(model, **options)
        with pytest.raises(RuntimeError,
                           match=r"not the batch of 5: first \(15\), second \(15\)\. "
                                 r".*adabatch\.check"):
            backward(model, (torch.randn(5, 3, 4), torch.randn(5, 3)))
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        hooks.collect()


def test_uses_with_different_numbers_of_rows_raise():
    model = TiedLinear()
    hooks = GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="not the batch"):
        (model.first(torch.randn(5, 4)).sum() + model.second(torch.randn(2, 4)).sum()).backward()
    assert not hooks._n_passes
    with pytest.raises(ValueError,
                       match=r"different numbers of samples in one backward pass: \[2, 5\]"):
        merge_factors([Outer(torch.ones(n, 1, 2), torch.ones(n, 1, 2)) for n in (2, 5)])


def factor(kind, samples=4):
    """One factor of shape [6, 3] (or [6, 3, 2])."""
    if kind == "outer":
        return Outer(torch.randn(samples, 5, 6), torch.randn(samples, 5, 3))
    if kind == "lookup":
        return OneHotOuter(torch.randint(6, (samples, 4)), torch.randn(samples, 4, 3), 6)
    if kind == "dense":
        return Dense(torch.randn(samples, 6, 3))
    return ConvOuter(torch.randn(samples, 3, 5), torch.randn(samples, 6, 4), (6, 3, 2), (1,), (0,),
                     (1,), 1)


KINDS = [("outer", "outer"), ("lookup", "lookup"), ("dense", "dense"), ("outer", "lookup"),
         ("lookup", "outer", "outer"), ("outer", "dense"), ("conv", "conv")]


@pytest.mark.parametrize("chunk_bytes", [1, 2**22])
@pytest.mark.parametrize("samples", [0, 1, 4])
@pytest.mark.parametrize("kinds", [*KINDS, ("lookup", "dense", "outer", "dense")], ids="+".join)
def test_merged_uses_against_the_sum_of_dense_gradients(kinds, samples, chunk_bytes, monkeypatch):
    monkeypatch.setattr("adabatch.grad_sample.factors.merge.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("adabatch.kernels.operators.CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    factors = [factor(kind, samples) for kind in kinds]
    dense, merged = sum(use.dense().double() for use in factors), merge_factors(factors)
    direction = torch.randn(dense.shape[1:])
    assert isinstance(merged, SumOfFactors) == (len(set(kinds)) > 1 or "conv" in kinds)
    assert (tuple(merged.shape), merged.n_samples) == (tuple(dense.shape[1:]), samples)
    close(merged.sq_norms(), dense.flatten(1).square().sum(1), 1e-5)
    close(merged.second_moment(), dense.square().sum(0), 1e-5)
    close(merged.dot(direction), (dense * direction).flatten(1).sum(1), 1e-5)
    close(merged.dense(), dense, 1e-5)
    if samples:
        rows = torch.tensor([samples - 1, 0])
        close(merged.select(rows).sq_norms(), dense[rows].flatten(1).square().sum(1), 1e-5)


def test_uses_of_mixed_precision_are_multiplied_in_float32():
    lookup, outer = factor("lookup"), factor("outer")
    rounded = Outer(outer.left.bfloat16(), outer.right.bfloat16())
    dense = lookup.dense().double() + rounded.dense().double()
    with torch.autocast("cpu", enabled=False):
        close(merge_factors([lookup, rounded]).sq_norms(), dense.flatten(1).square().sum(1), 1e-5)
