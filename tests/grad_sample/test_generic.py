"""Layers without a rule, measured in their operations or run again sample by sample: exact against
one backward pass per sample, or a clear error before anything is wrong."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import close, untraceable
from tests.grad_sample.same_forward import exact, outputs_loss

N, T, D = 5, 6, 8


class Layer(nn.Module):
    """A layer without submodules: two weights [D], a buffer, and the case's function."""

    def __init__(self, forward, shape=(D,)):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)
        self.other = nn.Parameter(torch.rand(shape) + 0.5)
        self.register_buffer("average", torch.zeros(D))
        self.case = forward

    def forward(self, *args, **kwargs):
        return self.case(self, *args, **kwargs)


def in_a_stack(layer):
    return nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, 3))


def rms_norm(m, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * m.weight


def in_place_inside(m, x):
    x = x.clone()
    x *= m.weight
    x += m.other
    return x


def not_vectorizable(m, x):
    # .item() cannot be vectorized
    return x * m.weight if float(x.detach().square().sum()) >= 0 else x


EXACT = {
    "RMSNorm": rms_norm,
    "in place inside": in_place_inside,
    "a loop where vmap cannot": not_vectorizable,
    "a parameter without use": lambda m, x: x * m.weight,
    "two uses": lambda m, x: torch.tanh(x * m.weight) + m.weight.exp() * m.other,
    "a buffer": lambda m, x: (x - m.average) * m.weight + m.other,
    "returns its input": lambda m, x: x,
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("forward", EXACT.values(), ids=EXACT)
def test_exact(forward, samples):
    torch.manual_seed(0)
    exact(in_a_stack(Layer(forward)), torch.randn(N, T, D), samples=samples)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("forward", EXACT.values(), ids=EXACT)
def test_exact_where_it_is_run_again(forward, samples):
    torch.manual_seed(0)
    exact(in_a_stack(Layer(lambda m, x: untraceable(forward(m, x)))), torch.randn(N, T, D),
          samples=samples)


@pytest.mark.parametrize("forward", EXACT.values(), ids=EXACT)
def test_checkpointed(forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = in_a_stack(Layer(forward)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    torch.manual_seed(0)
    exact(Model(), torch.randn(N, T, D))


def test_followed_by_operations_in_place():
    torch.manual_seed(0)
    exact(nn.Sequential(nn.Linear(D, D), Layer(lambda m, x: 2 * torch.tanh(x * m.weight)),
                        nn.ReLU(inplace=True), nn.Linear(D, 2)), torch.randn(N, T, D))


class Named(nn.Module):
    """Calls a layer with keywords, constants and two inputs; takes what it needs of the dict that
    comes back."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(D, D), Layer(self.case)

    @staticmethod
    def case(m, x, *, scale, mask, extra=None):
        return {"all": x * m.weight * mask, "pooled": (x * m.other.exp() * scale).sum(1),
                "nothing": extra, "number": 3}

    def forward(self, x, y):
        found = self.layer(self.first(x), scale=y, mask=torch.ones(D, dtype=x.dtype))
        return found["all"].sum(1) + found["pooled"]


@pytest.mark.parametrize("samples", [None, 2])
def test_keywords_two_inputs_and_a_dict(samples):
    torch.manual_seed(0)
    exact(Named(), torch.randn(N, T, D), torch.randn(N, T, D), samples=samples)


def cells(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(D, D), nn.Linear(D, 2)

        def forward(self, x):
            state = x.new_zeros(len(x), D)
            state = (state, state) if kind is nn.LSTMCell else state
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if kind is nn.LSTMCell else state)

    return Loop()


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_time_loop(kind, samples):
    torch.manual_seed(0)
    exact(cells(kind), torch.randn(N, T, D), samples=samples)


class Recurrent(nn.Module):
    def __init__(self, layer, hidden_only=False):
        super().__init__()
        self.layer, self.hidden_only = layer, hidden_only

    def forward(self, x):
        output, hidden = self.layer(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if self.hidden_only:
            return hidden.transpose(0, 1)
        return output if self.layer.batch_first else output.transpose(0, 1)


RECURRENT = {
    "LSTM": lambda: nn.LSTM(D, 3, batch_first=True),
    "LSTM, two layers, two directions, projected": lambda: nn.LSTM(
        D, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
    "GRU, two layers": lambda: nn.GRU(D, 3, 2, batch_first=True),
    "RNN, no bias": lambda: nn.RNN(D, 3, bias=False, batch_first=True),
}


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("hidden_only", [False, True])
@pytest.mark.parametrize("layer", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_layers(layer, hidden_only, samples):
    torch.manual_seed(0)
    exact(Recurrent(layer(), hidden_only), torch.randn(N, T, D), samples=samples)


def test_recurrent_layer_in_bfloat16_autocast():
    torch.manual_seed(0)
    exact(Recurrent(nn.LSTM(D, 3, batch_first=True)), torch.randn(N, T, D), rtol=5e-2,
          around=lambda: torch.autocast("cpu", torch.bfloat16))


COUNTER = itertools.count(1)


def changing_average(m, x):
    with torch.no_grad():
        m.average.mul_(0.9).add_(0.1 * x.mean((0, 1)))
    return (x - m.average) * m.weight


def in_place_on_the_input(m, x):
    x += m.weight
    return x


REFUSED = {
    "dropout": (lambda m, x: F.dropout(x, 0.3) * m.weight,
                "1 draws random numbers inside its forward pass.*nn.Dropout"),
    "noise": (lambda m, x: (x + torch.randn_like(x)) * m.weight, "draws random numbers"),
    "its input in place": (in_place_on_the_input, "1 changes its input in place.*clone the input"),
    "mixes samples": (lambda m, x: (x - x.mean(0)) * m.weight,
                      "1 gives other values when it is run again for one sample.*mixes samples"),
    "a buffer of its own changed": (changing_average, "1 gives other values"),
    "a branch taken by the batch": (lambda m, x: x * m.weight if x.sum() > 0 else x * m.other,
                                    "1 gives other values"),
    "dropout where vmap cannot": (lambda m, x: F.dropout(not_vectorizable(m, x), 0.3),
                                  "draws random numbers"),
    "its input in place where vmap cannot": (
        lambda m, x: in_place_on_the_input(m, x) * float(x.detach().sum() * 0 + 1),
        "changes its input in place"),
    "Python's random numbers": (lambda m, x: x * m.weight * random.random(),
                                "draws random numbers"),
    "NumPy's random numbers": (lambda m, x: x * m.weight * np.random.rand(),  # noqa: NPY002
                               "draws random numbers"),
    "a global counter": (lambda m, x: x * m.weight * next(COUNTER), "global counter"),
    "the mean of the samples": (lambda m, x: (x * m.weight).mean(0),
                                r"it mixes samples, or depends on the size of the batch"),
}


@pytest.mark.parametrize(("forward", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_where_it_must_be_run_again(forward, match):
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=match):
        exact(in_a_stack(Layer(lambda m, x: untraceable(forward(m, x)))), torch.randn(N, T, D))


# What is measured in a layer's operations is not run again.
RUN_ONCE = ["dropout", "noise", "its input in place"]
MIXING = ["mixes samples", "a buffer of its own changed", "a branch taken by the batch",
          "the mean of the samples", "its input in place where vmap cannot"]


@pytest.mark.parametrize("how", RUN_ONCE)
def test_exact_where_it_runs_once(how):
    torch.manual_seed(0)
    exact(in_a_stack(Layer(REFUSED[how][0])), torch.randn(N, T, D))


@pytest.mark.parametrize("how", MIXING)
def test_what_mixes_samples_is_not_traced(how):
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=REFUSED[how][1]):
        exact(in_a_stack(Layer(REFUSED[how][0])), torch.randn(N, T, D))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: next(COUNTER)],
                         ids=["Python", "NumPy", "a counter"])
def test_exact_with_numbers_that_are_never_the_same(draw):
    torch.manual_seed(0)
    drawn, batch = [], torch.randn(N, T, D).double()

    def forward(m, x):
        drawn.append(draw())
        return x * m.weight * drawn[-1]

    model = in_a_stack(Layer(forward)).double()
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        outputs_loss(model, (batch,)).mean().backward()
        plain = in_a_stack(Layer(lambda m, x, number=drawn[-1]: x * m.weight * number))
        plain.double().load_state_dict(model.state_dict())
        grads = oracle.per_sample_grads(plain, outputs_loss, (batch,))
        close(hooks.collect().sq_norms, oracle.sq_norms(grads), 1e-9)


def test_functional_dropout_is_measured_in_evaluation_mode():
    torch.manual_seed(0)
    exact(in_a_stack(Layer(lambda m, x: F.dropout(x, 0.3, m.training) * m.weight)).eval(),
          torch.randn(N, T, D))


def test_packed_sequences_are_refused():
    model = nn.LSTM(D, 3, batch_first=True)
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match=r"PackedSequence.*pad the sequences"):
        model(pack_padded_sequence(torch.randn(N, T, D), torch.tensor([6, 5, 4, 3, 2]),
                                   batch_first=True))


def test_dropout_between_recurrent_layers_is_refused():
    with pytest.raises(ValueError, match="dropout between layers"):
        GradSampleHooks(nn.GRU(D, 3, 2, dropout=0.2))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph):
    """A graph break, or an error that names the fix."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = in_a_stack(Layer(rms_norm)).double()
    batch = torch.randn(N, T, D).double()
    hooks = GradSampleHooks(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    if fullgraph:
        with pytest.raises(Exception,
                           match="without a grad_sample rule is run again sample by sample"):
            compiled(batch)
    else:
        compiled(batch).square().flatten(1).sum(1).mean().backward()
        measured = hooks.collect().sq_norms
        model.zero_grad()
        model(batch).square().flatten(1).sum(1).mean().backward()
        torch.testing.assert_close(measured, hooks.collect().sq_norms)
    torch._dynamo.reset()
