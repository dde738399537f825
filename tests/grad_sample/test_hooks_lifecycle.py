"""What hooks leave behind, what they survive: removal, reference counts, failures, copies,
checkpoints of their state."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, close, make_batch, make_mlp, squared_error


def node_names(tensor):
    """Names of all nodes of the autograd graph below a tensor."""
    names, todo, seen = set(), [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [parent for parent, _ in node.next_functions]
    return names


def traces(model):
    """Everything a hook could leave on a model's modules and parameters."""
    modules = [
        (sorted(vars(layer)), {name: len(value) for name, value in vars(layer).items()
                               if "hooks" in name and value})
        for layer in model.modules()]
    parameters = [(vars(each), each._backward_hooks, each._post_accumulate_grad_hooks)
                  for each in model.parameters()]
    return modules, parameters


def test_removed_hooks_leave_no_trace():
    model, batch = make_mlp(), make_batch()
    before, nodes = traces(model), node_names(model(batch[0]))
    hooks = GradSampleHooks(model, samples=3)
    backward(model, batch)
    hooks.collect()
    assert any("Tap" in name for name in node_names(model(batch[0])))
    hooks.remove()
    model.zero_grad()
    assert traces(model) == before
    assert node_names(model(batch[0])) == nodes
    with pytest.raises(RuntimeError, match="paused or removed"):
        hooks.collect()


@pytest.mark.parametrize("off", ["paused", "no_grad", "inference_mode", "enabled"])
def test_hooks_that_are_off_add_no_node(off):
    model, batch = make_mlp(), make_batch()
    nodes = node_names(model(batch[0]))
    hooks = GradSampleHooks(model)
    if off == "paused":
        with hooks.paused():
            assert node_names(model(batch[0])) == nodes
        assert hooks.enabled
    elif off == "enabled":
        hooks.enabled = False
        assert node_names(model(batch[0])) == nodes
    else:
        with getattr(torch, off)():
            assert model(batch[0]).grad_fn is None


def test_an_error_inside_paused_does_not_leave_the_hooks_paused():
    hooks = GradSampleHooks(make_mlp())
    with pytest.raises(KeyError), hooks.paused():
        raise KeyError
    assert hooks.enabled


@pytest.mark.parametrize("remove", [False, True])
def test_hooks_and_model_are_freed_by_reference_count_alone(remove):
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model, samples=3, per_parameter=True, statistics=["second_moment"])
    backward(model, batch)
    hooks.collect()
    if remove:
        hooks.remove()
    gone = [weakref.ref(hooks), weakref.ref(model[0]), weakref.ref(model[0].weight)]
    gc.collect()
    gc.disable()
    try:
        del model, hooks
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options", [{}, {"samples": 3}, {"statistics": ["second_moment"], "per_parameter": True}],
    ids=str)
def test_no_memory_grows_over_steps(options):
    """Also where steps go wrong: autograd.grad through layers whose factors are deferred."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    hooks = GradSampleHooks(model, **options)

    def step(size):
        batch = make_batch(size, targets=4)
        torch.autograd.grad(squared_error(model, batch).mean(), list(model.parameters()))
        model.zero_grad()
        backward(model, batch)
        hooks.collect()

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    sizes = range(2, 22)
    for size in sizes:
        step(size)
    before = tensors()
    for size in 10 * list(sizes):
        step(size)
    assert tensors() <= before


def test_gradients_are_unchanged_bit_for_bit():
    model, batch = make_mlp(), make_batch()
    backward(model, batch)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    GradSampleHooks(model, samples=3)
    backward(model, batch)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_removing_the_hooks_between_forward_and_backward_is_harmless():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    hooks.remove()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_deep_copy_is_not_measured_and_does_not_disturb():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    copied = copy.deepcopy(model)
    assert not any("Tap" in name for name in node_names(copied(batch[0])))
    backward(model, batch)
    backward(copied, batch)
    agrees(hooks.collect(), grads)


class Blocks(nn.Module):
    """All kinds of hooks: of layers with and without a rule, of parts, of attention's dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Tanh()))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.token, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = (self.body(inputs) + self.token)[:, None]
        return self.head(self.attention(hidden, hidden, hidden)[0][:, 0])


def n_hooks(model):
    return sum(len(hooks) for layer in model.modules()
               for hooks in (layer._forward_hooks, layer._forward_pre_hooks))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, averaged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("run", [False, True])
def test_copies_and_pickles_are_not_measured_and_can_be_attached_to(copied, run):
    model, batch = Blocks(), make_batch()
    hooks = GradSampleHooks(model)
    n_before = n_hooks(model)
    if run:
        backward(model, batch)
        hooks.collect()
    other = copied(model)
    model.zero_grad()
    backward(other, batch)
    with pytest.raises(RuntimeError, match="a copy of the model was trained"):
        hooks.collect()
    backward(model, batch)
    hooks.collect()
    assert n_hooks(model) == n_before
    if copied is not pickled:
        assert n_hooks(other) == 0
    hooks.remove()
    twice = copied(copied(other))
    twice.attention.dropout = 0.0
    twice.zero_grad()
    grads = oracle.per_sample_grads(twice, squared_error, batch)
    own = GradSampleHooks(twice)
    backward(twice, batch)
    agrees(own.collect(), grads)
    own.remove()
    assert n_hooks(model) == 0


def test_a_copy_of_the_model_has_no_hooks_after_they_are_removed():
    model = Blocks()
    hooks = GradSampleHooks(model)
    copies = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))]
    hooks.remove()
    assert n_hooks(copies[0]) == 0
    for each in (model, *copies):
        pickled(each)
    gone = weakref.ref(hooks)
    del hooks
    assert gone() is None


def test_a_pickled_model_loads_without_adabatch():
    model = make_mlp()
    GradSampleHooks(model)
    assert b"adabatch" not in pickle.dumps(model)


def test_hooks_themselves_are_not_copied():
    hooks = GradSampleHooks(make_mlp())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"GradSampleHooks is attached .*save state_dict\(\)"):
            copied(hooks)


def fail_half_way(model, batch, at):
    def boom(grad):
        raise KeyError("boom")

    handle = model[at].weight.register_hook(boom)
    with pytest.raises(KeyError, match="boom"):
        backward(model, batch)
    handle.remove()
    model.zero_grad()


@pytest.mark.parametrize(
    "options", [{}, {"per_parameter": True, "statistics": ["second_moment"]}, {"samples": 3}],
    ids=str)
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("at", [0, 2])
def test_a_good_step_after_a_failed_backward_pass_is_exact(at, reset, options):
    """at=0: all taps had reported when the pass failed, but it was never finished."""
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, **options)
    fail_half_way(model, make_batch(), at)
    if reset:
        hooks.reset()
    backward(model, batch)
    moments = hooks.collect()
    agrees(moments, grads)
    for name, moment in moments.second_moment.items():
        close(moment, oracle.second_moment(grads)[name], 1e-5)


def test_a_failed_pass_leaves_nothing_in_the_row_of_a_skipped_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, inputs, skip=True):
            return self.always(inputs) + (0 if skip else self.sometimes(inputs))

    model, batch = Model(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, per_parameter=True)
    handle = model.always.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(lambda inputs: model(inputs, skip=False), batch)
    handle.remove()
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_state_dict_repeats_the_draws_of_rows():
    model, batch = make_mlp(), make_batch(20)

    def draws(hooks, steps):
        rows = []
        for _ in range(steps):
            backward(model, batch)
            rows.append(hooks.collect().indices)
            model.zero_grad()
        return torch.stack(rows)

    hooks = GradSampleHooks(model, samples=4, seed=7)
    draws(hooks, 3)
    file = io.BytesIO()
    torch.save(hooks.state_dict(), file)
    expected = draws(hooks, 3)
    hooks.remove()
    file.seek(0)
    resumed = GradSampleHooks(model, samples=4, seed=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(draws(resumed, 3), expected)
    with pytest.raises(ValueError, match="version 99"):
        resumed.load_state_dict({"version": 99})


def replace_head(model):
    model[2] = nn.Linear(6, 3)


def replace_weight(model):
    model[2].weight = nn.Parameter(torch.randn(3, 6))


def assign_state(model):
    state = {name: nn.Parameter(value.clone()) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def append_layer(model):
    model.append(nn.Linear(3, 3))


@pytest.mark.parametrize("change", [replace_head, replace_weight, assign_state, append_layer])
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 9])
def test_parameters_that_are_replaced_after_attaching_are_named(change, steps):
    model, batch = make_mlp(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = GradSampleHooks(model)

    def step():
        optimizer.zero_grad()
        backward(model, batch)
        hooks.collect()
        optimizer.step()

    for _ in range(steps):
        step()
    change(model)
    name = "3.weight" if change is append_layer else "2.weight"
    with pytest.raises(RuntimeError, match=rf"(replaced|added) since .*{name}.*attach again"):
        step()
    hooks.remove()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    agrees(hooks.collect(), grads)


@pytest.mark.parametrize("change", [
    lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    lambda model: model[0].requires_grad_(False),
    lambda model: model.__setitem__(1, nn.Tanh()),
    lambda model: model.append(nn.Identity())], ids=["load", "freeze", "activation", "identity"])
def test_what_replaces_no_parameters_is_no_error(change):
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    for _ in range(4):
        model.zero_grad()
        backward(model, batch)
        hooks.collect()
        change(model)


class Interrupted(nn.Module):
    """Uses a parameter of its own, so that its operations are traced, and can be interrupted."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear, self.error = nn.Parameter(torch.ones(4)), nn.Linear(4, 3), None

    def forward(self, inputs):
        hidden = inputs * self.scale
        if self.error is not None:
            raise self.error
        return self.linear(hidden)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_ends_a_forward_pass_leaves_no_function_mode(error):
    torch.manual_seed(0)
    model, batch = Interrupted(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        with torch.device("cpu"):
            before = _get_current_function_mode_stack()
            model.error = error("in forward")
            with pytest.raises(error):
                model(batch[0])
            assert _get_current_function_mode_stack() == before
        assert not _get_current_function_mode_stack()
        model.error = None
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads)


def test_an_interrupt_while_a_checkpointed_part_runs_again_leaves_no_function_mode():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Interrupted()

        def forward(self, inputs):
            return checkpoint(self.part, inputs, use_reentrant=False)

    torch.manual_seed(0)
    model, batch = Outer(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    agrees(hooks.collect(), grads)
    loss = squared_error(model, batch).mean()
    model.part.error = KeyboardInterrupt("in backward")
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert not _get_current_function_mode_stack()
    model.part.error = None
    model.zero_grad()
    hooks.reset()
    backward(model, batch)
    agrees(hooks.collect(), grads)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_layer_that_is_removed_after_attaching_is_left_out(steps):
    model, batch = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = GradSampleHooks(model)
    for _ in range(steps):
        backward(model, batch)
        hooks.collect()
    optimizer.zero_grad()
    model[2] = nn.Identity()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads)
    assert len(hooks.cost().layers) == 1
