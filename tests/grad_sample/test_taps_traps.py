"""The ten traps that were found by trying, each with its fix. More of 1, 5 and 8 under
torch.compile in test_compile.py."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adabatch import GradSampleHooks, register_grad_sampler
from adabatch.grad_sample import registry
from adabatch.grad_sample.factors.base import Dense
from tests import oracle
from tests.grad_sample.measuring import (
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    measure,
    squared_error,
)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, inputs):
        return inputs + self.shift


@pytest.fixture
def shift_rule():
    yield register_grad_sampler(Shift)
    registry._SAMPLERS.pop(Shift)


class NormsOfTwoDimensions(Dense):
    def sq_norms(self):
        return self.grad.square()


class NormsOfOneSampleLess(Dense):
    def sq_norms(self):
        return super().sq_norms()[1:]


@pytest.mark.parametrize(
    ("factor", "match"),
    [(NormsOfTwoDimensions, r"0 gave sq_norms of shape \(8, 4\); one value per sample"),
     (NormsOfOneSampleLess, "shape")],
)
def test_1_norms_of_another_shape_are_not_summed_in_silence(shift_rule, factor, match):
    shift_rule(lambda layer, activations, backprops: {"shift": factor(backprops)})
    model = nn.Sequential(Shift(), nn.Linear(4, 3))
    GradSampleHooks(model)
    with pytest.raises(RuntimeError, match=match):
        backward(model, make_batch())


def times_five(parameter):
    parameter.grad.mul_(5)


def test_2_grad_sq_norm_is_read_when_the_gradients_are_complete():
    """All taps have reported before the first layer's gradient exists, let alone what a hook, or
    DistributedDataParallel, makes of it."""
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    model[0].weight.register_post_accumulate_grad_hook(times_five)
    model[0].weight.grad = torch.ones_like(model[0].weight)  # so that its sum is not compared
    backward(model, batch)
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters()]
    close(hooks.collect().grad_sq_norm, sum(squares), 1e-5)


def test_3_the_size_of_the_batch_is_what_the_layers_report_not_what_was_last_seen():
    model, batch = make_mlp(), make_batch(6)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    model(torch.randn(11, 4))
    loss.backward()
    moments = hooks.collect()
    assert moments.batch_size == 6
    agrees(moments, grads)


IN_PLACE = {
    "relu_": torch.relu_,
    "sigmoid_": torch.sigmoid_,
    "exp_": torch.exp_,
    "mul_": lambda output: output.mul_(2),
    "add_": lambda output: output.add_(output.detach()),
    "dropout": lambda output: F.dropout(output, 0.0, inplace=True),
    "index": lambda output: output.index_fill_(1, torch.tensor([0]), 1.0),
    "view": lambda output: output.view(-1).mul_(3).view_as(output),
}


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
@pytest.mark.parametrize("operation", IN_PLACE.values(), ids=IN_PLACE)
def test_4_in_place_operations_behind_a_layer(operation, shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, inputs):
            hidden = operation(self.norm(operation(self.first(inputs))))
            return self.second(hidden).reshape(len(inputs), -1)

    torch.manual_seed(0)
    width = 3 * (shape[0] if len(shape) == 2 else 1)
    model, batch = Model(), (torch.randn(6, *shape), torch.randn(6, width))
    agrees(measure(model, batch), oracle.per_sample_grads(model, squared_error, batch))


def test_5_outputs_that_are_views():
    """Linear's output over tokens is a view in eager mode, up to torch 2.13."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Flatten())
    batch = (torch.randn(6, 2, 4), torch.randn(6, 6))
    assert model[0](batch[0])._is_view() or torch.__version__ >= (2, 14)
    expected = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch, samples=None), expected)
    agrees(measure(model, batch, samples=2), oracle.per_sample_grads(model, squared_error, batch))


def test_6_hooks_of_others_act_on_the_tapped_output():
    model, batch = make_mlp(), make_batch()
    model[0].register_forward_hook(lambda layer, args, output: 3 * output)
    model[2].register_forward_hook(lambda layer, args, output: output.square(), prepend=True)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch), grads)


@pytest.mark.parametrize("differentiate", [
    lambda loss, inputs: loss.backward(create_graph=True),
    lambda loss, inputs: torch.autograd.grad(loss, inputs, create_graph=True),
], ids=["backward", "grad"])
def test_7_higher_order_gradients_raise_and_the_next_step_is_good(differentiate):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    inputs = batch[0].clone().requires_grad_()
    loss = squared_error(model, (inputs, batch[1])).mean()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*scheduler\.paused\(\)"):
        differentiate(loss, inputs)
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_7_a_gradient_penalty_on_paused_steps():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    inputs = batch[0].clone().requires_grad_()
    with hooks.paused():
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
    assert model[0].weight.grad is not None


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.LayerNorm(4))
        self.head, self.use_reentrant = nn.Linear(4, 3), use_reentrant

    def forward(self, inputs):
        for _ in range(2):
            inputs = checkpoint(self.block, inputs, use_reentrant=self.use_reentrant)
        return self.head(inputs)


def test_7_reentrant_checkpointing_raises_with_the_cure_and_other_steps_are_good():
    torch.manual_seed(0)
    model, (inputs, targets) = Checkpointed(use_reentrant=True), make_batch()
    hooks = GradSampleHooks(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        backward(model, (inputs.requires_grad_(), targets))
    model.use_reentrant = False
    model.zero_grad()
    backward(model, (inputs, targets))
    moments = hooks.collect()
    hooks.remove()
    agrees(moments, oracle.per_sample_grads(model, squared_error, (inputs.detach(), targets)))


@pytest.mark.parametrize("samples", [None, 3])
def test_7_other_checkpointing_is_exact(samples):
    torch.manual_seed(0)
    model, batch = Checkpointed(use_reentrant=False), make_batch(10)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=samples, statistics=["second_moment"])
    for _ in range(3):
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        agrees(moments, grads)
        for name, rows in grads.items():
            measured = rows if samples is None else rows[moments.indices]
            expected = oracle.second_moment({name: measured})[name]
            close(moments.second_moment[name], expected, 1e-5)


@pytest.mark.parametrize("interrupt", ["autograd.grad", "failure"])
def test_7_a_checkpointed_pass_that_was_not_measured_leaves_no_false_alarm(interrupt):
    torch.manual_seed(0)
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    def run(inputs):
        return checkpoint(model, inputs, use_reentrant=False)

    loss = squared_error(run, batch).mean()
    if interrupt == "autograd.grad":
        torch.autograd.grad(loss, list(model.parameters()))
    else:
        handle = model[0].weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()
        hooks.reset()
    model.zero_grad()
    backward(model, batch)
    agrees(hooks.collect(), grads)


def test_8_vmap_over_the_model_runs_past_the_hooks():
    model, batch = make_mlp(), make_batch()
    expected = torch.func.vmap(model)(batch[0])
    GradSampleHooks(model, samples=2)
    assert torch.equal(torch.func.vmap(model)(batch[0]), expected)


class Differentiated(nn.Module):
    """Its output is a derivative of its layers', taken by `way`."""

    def __init__(self, way):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 3), nn.Linear(3, 3)
        self.scale, self.way = nn.Parameter(torch.ones(3)), way

    def function(self, hidden):
        return torch.tanh(self.layer(hidden)) * self.scale

    def forward(self, inputs):
        return self.way(self.function, self.first(inputs))


def dual_tangent(function, inputs):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs, torch.ones_like(inputs))
        return forward_ad.unpack_dual(function(dual)).tangent


TRANSFORMS = {
    "forward mode": dual_tangent,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.ones(len(x), 3))[0],
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
}


@pytest.mark.parametrize("way", TRANSFORMS.values(), ids=TRANSFORMS)
def test_8_transforms_of_the_model_run_past_the_hooks(way):
    torch.manual_seed(0)
    model, (inputs, targets) = Differentiated(lambda function, x: function(x)), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, (inputs, targets))
    expected = way(model, inputs)
    hooks = GradSampleHooks(model)
    found = way(model, inputs)
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
        hooks.collect()
    model.zero_grad()
    backward(model, (inputs, targets))
    agrees(hooks.collect(), grads)


@pytest.mark.parametrize("way", TRANSFORMS.values(), ids=TRANSFORMS)
def test_8_parameters_inside_of_a_transform_are_refused_by_name(way):
    torch.manual_seed(0)
    model, batch = Differentiated(way), make_batch()
    hooks = GradSampleHooks(model)
    with pytest.raises(RuntimeError, match=r"no tap saw: .*scale.*transform of torch\.func"):
        backward(model, batch)
    hooks.remove()


def test_9_a_weight_used_beside_its_layer_is_exact_or_raises():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, ids):
            return F.linear(self.table(ids), self.table.weight).mean(1)

    torch.manual_seed(0)
    model, batch = Model(), (torch.randint(7, (8, 5)), torch.randn(8, 7))
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    try:
        backward(model, batch)
    except RuntimeError as error:
        assert "table.weight" in str(error)  # noqa: PT017
    else:
        agrees(hooks.collect(), grads)


def test_10_what_is_added_to_the_gradient_biases_the_trace_as_the_formula_says():
    """T̂ − T̂ without it = −m/(m−1) (2⟨g, r⟩ + ‖r‖²), r what is added, as by an L2 term. Only of
    gradients that were there before the pass the hooks do not see it."""
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    penalty = 0.5 * sum(parameter.square().sum() for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"do not add up .*a penalty on the weights"):
        (squared_error(model, batch).mean() + penalty).backward()
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    squared_error(model, batch).mean().backward()
    cross = sum(float((rows.mean(0) * model.get_parameter(name)).sum())
                for name, rows in grads.items())
    square = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    difference = hooks.collect().variance_trace - float(oracle.variance_trace(grads))
    close(difference, -8 / 7 * (2 * cross + square), 1e-3)
