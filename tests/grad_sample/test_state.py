"""Layers without a rule: their state is as if they had run once, and they are measured with the
state that the call had. Against training without hooks, and one backward pass per sample."""

import copy
import itertools
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from tests.grad_sample.measuring import close, untraceable
from tests.grad_sample.same_forward import grads_of_one_forward, outputs_loss

N, D, STEPS = 6, 4, 5


@dataclass
class Meter:
    count: int = 0
    seen: list = field(default_factory=list)


class Stateful(nn.Module):
    """A layer without a rule, with state of some kind, that the case's function uses."""

    def __init__(self, forward, **state):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(D) + 0.5)
        for name, value in state.items():
            self.register_buffer(name, value) if name.startswith("buffer") else setattr(
                self, name, value)
        self.case = forward

    def forward(self, x):
        return self.case(self, x)


class RunAgain(Stateful):
    """The same with operations that are not traced."""

    def forward(self, x):
        return untraceable(super().forward(untraceable(x)))


def counts(m, x):
    m.state += 1
    return x * m.weight / m.state


def counts_up(m, x):
    m.state = m.state + 1
    return x * m.weight / m.state


def appends(m, x):
    m.state.append(float(x.detach().sum()))
    return x * m.weight * len(m.state)


def keeps_what_it_saw(m, x):
    m.state.append(x.detach())
    return x * m.weight * len(m.state)


def keeps_its_output(m, x):
    m.state = x * m.weight
    return m.state.tanh()


def counts_items(m, x):
    m.state["calls"] += 1
    return x * m.weight / m.state["calls"]


def counts_in_nested_items(m, x):
    m.state["of"][0]["calls"] += 1
    return x * m.weight / m.state["of"][0]["calls"]


def counts_in_an_object(m, x):
    m.state.count += 1
    return x * m.weight / m.state.count


def updates_a_meter(m, x):
    m.state.count += 1
    m.state.seen.append(x.detach())
    return x * m.weight * len(m.state.seen)


def caches(m, x):
    if m.state is None:
        m.state = m.weight.exp()
    found, m.state = x * m.state, None
    return found


def caches_by_key(m, x):
    key = len(x)
    m.state.setdefault(key, torch.arange(D) + 1.0)
    return x * m.weight * m.state[key]


def draws_of_its_own(m, x):
    return x * m.weight * (m.state.random() + 0.5)


def running_average(m, x):
    found = (x - m.buffer) * m.weight
    with torch.no_grad():
        m.buffer.mul_(0.9).add_(0.1 * x.mean(0))
    return found


def new_running_average(m, x):
    found = (x - m.buffer) * m.weight
    m.buffer = 0.9 * m.buffer + 0.1 * x.detach().mean(0)
    return found


def rescales_an_array(m, x):
    m.state[0] += 1
    return x * m.weight * float(m.state[0])


def registers_on_the_first_call(m, x):
    if not hasattr(m, "scale"):
        m.register_buffer("scale", torch.full((D,), 2.0, dtype=x.dtype))
    return x * m.weight * m.scale


def halves_after_three(m, x):
    m.state.appendleft(1)
    return x * m.weight * (1 if len(m.state) < 3 else 0.5)


CASES = {
    "a number": (counts, {"state": 0}),
    "a number, assigned": (counts_up, {"state": 0}),
    "a plain tensor": (counts, {"state": torch.tensor(0.0)}),
    "a list": (appends, {"state": []}),
    "a list of tensors": (keeps_what_it_saw, {"state": []}),
    "its last output": (keeps_its_output, {"state": None}),
    "a dict": (counts_items, {"state": {"calls": 0}}),
    "a Counter": (counts_items, {"state": Counter()}),
    "a defaultdict": (counts_items, {"state": defaultdict(int)}),
    "nested": (counts_in_nested_items, {"state": {"of": ({"calls": 0},)}}),
    "an object": (counts_in_an_object, {"state": Meter()}),
    "a namespace": (counts_in_an_object, {"state": SimpleNamespace(count=0)}),
    "an object with a list": (updates_a_meter, {"state": Meter()}),
    "a deque": (halves_after_three, {"state": deque()}),
    "itertools.count": (lambda m, x: x * m.weight * next(m.state), {"state": itertools.count(1)}),
    "a cache of one call": (caches, {"state": None}),
    "a cache by size": (caches_by_key, {"state": {}}),
    "Python's random numbers": (draws_of_its_own, {"state": random.Random(0)}),
    "NumPy's random numbers": (draws_of_its_own, {"state": np.random.default_rng(0)}),
    "an array": (rescales_an_array, {"state": np.zeros(2)}),
    "a buffer in place": (running_average, {"buffer": torch.zeros(D)}),
    "a buffer replaced": (new_running_average, {"buffer": torch.zeros(D)}),
    "a buffer registered late": (registers_on_the_first_call, {}),
}


def stack(layer):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, 2)).double()


def described(value):
    """What can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (random.Random, np.random.Generator)):
        return value.random()
    if isinstance(value, (list, tuple, deque)):
        return [described(each) for each in value]
    return repr(value)


@pytest.mark.parametrize("kind", [Stateful, RunAgain])
@pytest.mark.parametrize(("forward", "state"), CASES.values(), ids=CASES)
def test_as_if_it_had_run_once(forward, state, kind):
    model = stack(kind(forward, **copy.deepcopy(state)))
    plain, calls = copy.deepcopy(model), []
    model[1].register_forward_hook(lambda layer, args, output: calls.append(output.detach()))
    hooks = GradSampleHooks(model)
    batches = [torch.randn(N, D, dtype=torch.float64) for _ in range(STEPS)]
    for batch in batches:
        grads = grads_of_one_forward(plain, (batch,))
        model.zero_grad()
        outputs_loss(model, (batch,)).mean().backward()
        close(hooks.collect().sq_norms,
              sum(grad.reshape(N, -1).square().sum(1) for grad in grads.values()), 1e-9)
    torch.stack(calls)  # none of torch.func's
    assert len(calls) == STEPS
    for one, other in zip(vars(model[1]).items(), vars(plain[1]).items(), strict=True):
        if one[0] in ("state", "_buffers"):
            assert described(one[1]) == described(other[1])


@pytest.mark.parametrize("kind", [Stateful, RunAgain])
def test_a_layer_that_is_called_twice_and_counts(kind):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(counts, state=0)

        def forward(self, x):
            return self.inner(self.inner(x).tanh())

    model = Twice().double()
    plain, hooks = copy.deepcopy(model), GradSampleHooks(model)
    for _ in range(3):
        batch = torch.randn(N, D, dtype=torch.float64)
        grads = grads_of_one_forward(plain, (batch,))
        outputs_loss(model, (batch,)).mean().backward()
        close(hooks.collect().sq_norms, grads["inner.weight"].square().sum(1), 1e-9)
    assert model.inner.state == plain.inner.state == 6


def test_a_forward_of_the_instance_and_methods_of_the_layer():
    """What refers to the layer still finds it."""
    model = stack(Stateful(lambda m, x: m.helper(x), state=0))
    layer = model[1]
    layer.helper = lambda x: counts(layer, x)
    layer.forward = lambda x: layer.helper(x)
    hooks = GradSampleHooks(model)
    outputs_loss(model, (torch.randn(N, D, dtype=torch.float64),)).mean().backward()
    assert hooks.collect().sq_norms.shape == (N,)
    assert layer.state == 1


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand(),  # noqa: NPY002
                                  lambda: float(torch.rand(()))],
                         ids=["Python", "NumPy", "torch"])
def test_refused_draws_are_taken_back(draw):
    def seeded():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    model = stack(RunAgain(lambda m, x: x * m.weight * draw()))
    hooks = GradSampleHooks(model)
    seeded()
    loss = outputs_loss(model, (torch.ones(N, D, dtype=torch.float64),)).mean()
    with pytest.raises(RuntimeError, match="1 draws random numbers"):
        loss.backward()
    after = draw()
    hooks.remove()
    seeded()
    draw()
    assert after == draw()


class Rounded(torch.autograd.Function):
    """Without setup_context, which torch.func needs."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Quantized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, Rounded.apply(self.weight * 8) / 8, self.bias)


@pytest.mark.parametrize("layer", [
    lambda: Quantized(D, D),
    lambda: Stateful(lambda m, x: Rounded.apply(x * m.weight * 9) / 9),
    lambda: Stateful(lambda m, x: torch.tanh(x) * Rounded.apply(m.weight * 7)),
    lambda: Stateful(lambda m, x: torch.autograd.grad(
        (torch.tanh(x) * m.weight).sum(), x, create_graph=True)[0]),
    lambda: Stateful(lambda m, x: torch.from_numpy(x.detach().numpy().copy()) * m.weight + x),
], ids=["quantized weight", "quantized output", "both", "a gradient", "through NumPy"])
def test_what_torch_func_cannot_run_is_run_by_autograd(layer):
    model = stack(layer())
    plain, hooks = copy.deepcopy(model), GradSampleHooks(model)
    for _ in range(2):
        batch = torch.randn(N, D, dtype=torch.float64)
        grads = grads_of_one_forward(plain, (batch,))
        outputs_loss(model, (batch,)).mean().backward()
        close(hooks.collect().sq_norms,
              sum(grad.reshape(N, -1).square().sum(1) for grad in grads.values()), 1e-9)


def test_a_recurrent_layer_of_ones_own():
    class Counting(nn.LSTM):
        calls = 0

        def forward(self, x, state=None):
            self.calls += 1
            return super().forward(x / self.calls, state)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Counting(D, 3, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    torch.manual_seed(0)
    model = Model().double()
    plain, hooks = copy.deepcopy(model), GradSampleHooks(model)
    for _ in range(2):
        batch = torch.randn(N, 3, D, dtype=torch.float64)
        grads = grads_of_one_forward(plain, (batch,))
        outputs_loss(model, (batch,)).mean().backward()
        close(hooks.collect().sq_norms,
              sum(grad.reshape(N, -1).square().sum(1) for grad in grads.values()), 1e-9)
    assert model.layer.calls == 2
