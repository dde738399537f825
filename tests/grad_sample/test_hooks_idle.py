"""While nothing is measured, an uncompiled model's modules have no hooks and cost what they would
without; everything is back before the next measured pass."""

import copy
import sys

import pytest
import torch
import torch._dynamo  # as torch's optimizers do
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, make_batch, make_mlp, squared_error
from tests.grad_sample.test_hooks_lifecycle import Blocks, n_hooks, pickled, traces


class Perceptron(nn.Sequential):
    """With a forward of its own: torch up to 2.13 compiles no plain nn.Sequential by compile()."""

    def forward(self, x):
        return super().forward(x)


def measured_and_idle(model, **options):
    """The hooks of a model that was measured twice, and then called twice without."""
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        backward(model, make_batch())
        hooks.collect()
    hooks.enabled = False
    for _ in range(2):
        backward(model, make_batch())
    model.zero_grad()
    assert not n_hooks(model)
    return hooks


def check_measures(model, hooks):
    """A measured step is exact."""
    model.zero_grad()
    batch = make_batch()
    with hooks.paused():
        grads = oracle.per_sample_grads(copy.deepcopy(model), squared_error, batch)
    hooks.enabled = True
    backward(model, batch)
    agrees(hooks.collect(), grads)


def n_calls(model, inputs):
    """Python functions called by a forward; the least of some: a finalizer may run in one."""
    found = []
    for _ in range(4):
        events = []
        sys.setprofile(lambda frame, event, _, add=events.append: add(event))
        try:
            model(inputs)
        finally:
            sys.setprofile(None)
        found.append(events.count("call"))
    return min(found)


@pytest.mark.parametrize("make", [make_mlp, Blocks, lambda: nn.Linear(4, 3)])
def test_an_idle_forward_calls_no_function_more_than_without_hooks(make):
    torch.manual_seed(0)
    model = make().eval()
    plain = copy.deepcopy(model)
    hooks = measured_and_idle(model)
    inputs = make_batch()[0]
    plain(inputs)
    assert n_calls(model, inputs) == n_calls(plain, inputs)
    for _ in range(2):
        check_measures(model, hooks)
    assert n_hooks(model)


def test_in_a_training_loop_hooks_are_there_until_a_second_step_is_not_measured():
    torch.manual_seed(0)
    model = make_mlp()
    data = TensorDataset(*make_batch(64))
    optimizer, loader, scheduler = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.01), DataLoader(data, batch_size=4),
        batch_sizes=(4, 4), measure=adabatch.Every(4))
    found = []
    for inputs, targets in loader:
        optimizer.zero_grad()
        outputs = model(inputs)
        found.append(n_hooks(model) > 0)
        loss = (outputs - targets).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert found == [True, True, False, False] * 4
    assert scheduler.diagnostics.n_measured == 4


def test_hooks_removed_while_idle_leave_no_trace():
    model = make_mlp()
    before = traces(model)
    hooks = measured_and_idle(model)
    hooks.remove()
    hooks.enabled = True
    backward(model, make_batch())
    model.zero_grad()
    assert traces(model) == before


def test_an_idle_forward_that_fails_or_a_pause_that_does_leaves_the_next_step_exact():
    model = make_mlp()
    hooks = measured_and_idle(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(3, 5))
    hooks.enabled = True
    with pytest.raises(RuntimeError, match="mat1 and mat2"), hooks.paused():
        model(torch.randn(3, 5))
    assert n_hooks(model)
    check_measures(model, hooks)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
def test_copies_made_while_idle_have_no_hooks_and_can_be_attached_to(copied):
    model = make_mlp()
    hooks = measured_and_idle(model)
    other = copied(model)
    assert not n_hooks(other)
    assert other._compiled_call_impl is None
    check_measures(model, hooks)
    assert not n_hooks(other)
    check_measures(other, GradSampleHooks(other))


@pytest.mark.parametrize("when", ["before attaching", "after attaching", "while idle"])
def test_hooks_of_users_keep_their_order(when):
    model, called, steps = make_mlp(), [], []

    def register():
        for index, prepend in enumerate((False, True, False)):
            model[0].register_forward_hook(
                lambda *_, index=index: called.append(index), prepend=prepend)
            model.register_forward_pre_hook(
                lambda *_, index=index: called.append(10 + index), prepend=prepend)

    if when == "before attaching":
        register()
    hooks = GradSampleHooks(model)
    if when == "after attaching":
        register()
    for enabled in (True, False, False, True, False, True):
        hooks.enabled = enabled
        if len(steps) == 2 and when == "while idle":
            register()
        called.clear()
        backward(model, make_batch())
        steps.append([*called])
        if enabled:
            assert hooks.collect().batch_size == 8
    assert steps[2:] == [[11, 10, 12, 1, 0, 2]] * 4


def test_parameters_replaced_while_idle_are_named():
    model = make_mlp()
    hooks = measured_and_idle(model)
    model[2] = nn.Linear(6, 3)
    hooks.enabled = True
    with pytest.raises(RuntimeError, match=r"replaced since .*2\.weight.*attach again"):
        backward(model, make_batch())


@pytest.mark.parametrize("compiled", ["whole", "in place"])
def test_a_model_that_is_compiled_while_idle_is_measured(compiled):
    torch._dynamo.reset()
    model, graphs = Perceptron(*make_mlp()), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    hooks = measured_and_idle(model)
    run = model
    if compiled == "whole":
        run = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend)
    backward(run, make_batch())  # idle
    assert graphs
    for later in (False, False, True):
        n_graphs = len(graphs)
        hooks.enabled = True
        model.zero_grad()
        batch = make_batch()
        grads = oracle.per_sample_grads(make_like(model), squared_error, batch)
        backward(run, batch)
        agrees(hooks.collect(), grads)
        hooks.enabled = False
        backward(run, batch)
        assert n_hooks(model)
        assert not later or len(graphs) == n_graphs


def make_like(model):
    """An uncompiled model with the same weights."""
    other = make_mlp()
    other.load_state_dict(model.state_dict())
    return other


def test_wrapping_again_while_idle_removes_the_first():
    model, optimizer = make_mlp(), None
    optimizer = SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(*make_batch(64)), batch_size=4)
    first = adabatch.wrap(model, optimizer, loader)[2]
    first.estimator.enabled = False
    for _ in range(2):
        model(make_batch()[0])
    assert not n_hooks(model)
    with pytest.warns(UserWarning, match="wrapped before"):
        second = adabatch.wrap(model, optimizer, loader)[2]
    assert second.estimator.enabled
    assert not first.estimator.attached
