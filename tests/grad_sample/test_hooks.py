"""Moments through the hooks against the oracle: every rule, mixed models, subsets, groups,
ignored modules."""

import warnings

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.grad_sample.registry import find_grad_sampler
from tests import oracle
from tests.cases import CASES, SAMPLES
from tests.grad_sample.measuring import (
    TOLERANCE,
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    mean_grad_sq_norm,
    measure,
    squared_error,
)

MIXED = "ignore:.*batch normalization in train mode:UserWarning"


class Behind(nn.Module):
    """A layer, an in-place ReLU on its output, and a head: there is always something to measure."""

    def __init__(self, layer, inputs):
        super().__init__()
        self.layer = layer
        width = layer(inputs).reshape(len(inputs), -1).shape[1]
        self.head = nn.Linear(width, 3).to(next(layer.parameters(), inputs).dtype)

    def forward(self, inputs):
        return self.head(torch.relu_(self.layer(inputs).add_(0.1)).reshape(len(inputs), -1))


@pytest.mark.filterwarnings(MIXED)
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_rule_before_an_in_place_relu(case, dtype, loss_reduction):
    torch.manual_seed(0)
    layer, inputs = case.make_layer(dtype), case.make_inputs(dtype)
    model, batch = Behind(layer, inputs), (inputs, torch.randn(SAMPLES, 3, dtype=dtype))
    mixes = find_grad_sampler(layer).full_batch(layer)
    reference = oracle.contributions if mixes else oracle.per_sample_grads
    grads = reference(model, squared_error, batch)
    agrees(measure(model, batch, loss_reduction=loss_reduction), grads, TOLERANCE[dtype])
    subset = measure(model, batch, loss_reduction=loss_reduction, samples=3, per_parameter=True,
                     statistics=["second_moment"])
    agrees(subset, grads, TOLERANCE[dtype])
    assert subset.by_parameter.keys() == subset.second_moment.keys() == grads.keys()
    for name, rows in grads.items():
        measured = rows[subset.indices]
        close(subset.by_parameter[name], oracle.sq_norms({name: measured}), TOLERANCE[dtype])
        expected = oracle.second_moment({name: measured})[name]
        close(subset.second_moment[name], expected, TOLERANCE[dtype])


def make_convolutional():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(2, 4),
              nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, stride=2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)), torch.randn(9, 2, 6, 6)


def make_tokens():
    layers = [nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.ReLU(inplace=True),
              nn.RMSNorm(6), nn.PReLU(), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers), torch.randint(7, (9, 4))


def make_batch_norm():
    layers = [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Flatten(),
              nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(5, 3)), torch.randn(9, 2, 6)


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [make_convolutional, make_tokens])
def test_mixed_models(make, dtype, loss_reduction, samples):
    torch.manual_seed(1)
    model, inputs = make()
    model, inputs = model.to(dtype), inputs.to(dtype) if inputs.is_floating_point() else inputs
    batch = inputs, torch.randn(9, 3, dtype=dtype)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    moments = measure(model, batch, loss_reduction=loss_reduction, samples=samples)
    agrees(moments, grads, TOLERANCE[dtype])


@pytest.mark.parametrize("samples", [None, 4])
def test_batch_norm_contributions_add_up_to_the_gradient_and_warn_once(samples):
    torch.manual_seed(1)
    model, inputs = make_batch_norm()
    batch = inputs, torch.randn(9, 3)
    grads = oracle.contributions(model, squared_error, batch)
    hooks = GradSampleHooks(model, samples=samples)
    with pytest.warns(UserWarning, match=r"1, 5: batch normalization.*proxy") as warned:
        backward(model, batch)
    assert [entry.filename for entry in warned] == [backward.__code__.co_filename]
    agrees(hooks.collect(), grads)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, batch)
    for name, parameter in model.named_parameters():
        close(parameter.grad, grads[name].mean(0), 1e-4)


def test_batch_norm_in_eval_mode_is_exact_and_does_not_warn(recwarn):
    torch.manual_seed(1)
    model, inputs = make_batch_norm()
    model.eval()
    batch = inputs, torch.randn(9, 3)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch), grads)
    assert not recwarn.list


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_whose_mode_changes_between_forward_and_backward_raises(training, samples):
    model, inputs = make_batch_norm()
    GradSampleHooks(model.train(training), samples=samples)
    loss = squared_error(model, (inputs, torch.randn(9, 3))).mean()
    model.train(not training)
    message = r"5 changed between train and eval mode.*eval\(\) after loss\.backward\(\)"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_rows_are_distinct_seeded_and_drawn_again_each_step():
    def draws(seed, steps=30):
        model = make_mlp()
        hooks = GradSampleHooks(model, samples=3, seed=seed)
        rows = []
        for _ in range(steps):
            backward(model, make_batch(10))
            rows.append(hooks.collect().indices)
        return torch.stack(rows)

    rows = draws(0)
    assert all(len(set(row)) == 3 for row in rows.tolist())
    assert set(rows.flatten().tolist()) == set(range(10))
    assert len({tuple(sorted(row)) for row in rows.tolist()}) > 20
    assert torch.equal(rows, draws(0))
    assert not torch.equal(rows, draws(1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_no_larger_than_samples_is_measured_whole(size):
    moments = measure(make_mlp(), make_batch(size), samples=3)
    assert (moments.n_measured, moments.batch_size, moments.indices) == (size, size, None)


def test_samples_can_be_set_between_steps():
    model, batch = make_mlp(), make_batch(20)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    for samples in (None, 5, 20, 2, None):
        hooks.samples = samples
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        agrees(moments, grads)
        assert (hooks.samples, moments.n_measured) == (samples, samples or 20)
    with pytest.raises(ValueError, match="samples must be a positive integer or None, got 0"):
        hooks.samples = 0


def test_a_batch_of_one_has_no_variance():
    moments = measure(make_mlp(), make_batch(1))
    with pytest.raises(ValueError, match="at least 2 samples, got a batch of 1"):
        moments.variance_trace  # noqa: B018


def test_an_empty_batch():
    moments = measure(make_mlp(), make_batch(0), loss_reduction="sum")
    assert (moments.batch_size, moments.n_measured, moments.grad_sq_norm) == (0, 0, 0.0)


@pytest.mark.parametrize("samples", [None, 5])
def test_batches_beyond_the_capacity(samples):
    model = make_mlp()
    hooks = GradSampleHooks(model, samples=samples, capacity=4)
    for size in (3, 1100, 7, 2500):
        batch = make_batch(size)
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        assert moments.batch_size == size
        assert moments.n_measured == (size if samples is None else min(size, samples))
        expected = per_sample_by_closed_form(model, batch)
        measured = expected if moments.indices is None else expected[moments.indices]
        close(moments.sq_norms, measured, 1e-5)


def per_sample_by_closed_form(model, batch):
    """‖g_i‖² of make_mlp under squared_error, by hand."""
    first, second = model[0], model[2]
    inputs, targets = (tensor.double() for tensor in batch)
    hidden = (inputs @ first.weight.double().T + first.bias.double()).clamp(min=0).detach()
    outer = 2 * (hidden @ second.weight.double().T + second.bias.double() - targets).detach()
    inner = (outer @ second.weight.double()).detach() * (hidden > 0)
    return (outer.square().sum(1) * (1 + hidden.square().sum(1))
            + inner.square().sum(1) * (1 + inputs.square().sum(1)))


def test_param_groups_add_up_and_leave_out_what_is_in_none():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    weights = {name: grads[name] for name in ("0.weight", "2.weight")}
    biases = {"0.bias": grads["0.bias"]}
    groups = [[], [model[0].weight, model[2].weight], iter([model[0].bias])]
    moments = measure(model, batch, param_groups=groups)
    assert moments.by_group.keys() == {1, 2}
    agrees(moments, weights | biases)
    agrees(moments.by_group[1], weights)
    agrees(moments.by_group[2], biases)
    total = sum(group.variance_trace for group in moments.by_group.values())
    close(total, moments.variance_trace, 1e-5)


def test_one_group_needs_no_by_group():
    model = make_mlp()
    assert measure(model, make_batch(), param_groups=[list(model.parameters())]).by_group == {}


def test_ignored_modules_count_neither_in_the_norms_nor_in_the_gradient():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    head = {name: rows for name, rows in grads.items() if name.startswith("2.")}
    agrees(measure(model, batch, ignore=["0"]), head)


def test_frozen_parameters_and_those_frozen_later_are_left_out():
    model, batch = make_mlp(), make_batch()
    model[0].weight.requires_grad_(False)
    hooks = GradSampleHooks(model, per_parameter=True, statistics=["second_moment"])
    assert set(hooks.parameters) == {"0.bias", "2.weight", "2.bias"}
    model[2].weight.requires_grad_(False)
    backward(model, batch)
    moments = hooks.collect()
    hooks.remove()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(moments, grads)
    close(moments.by_parameter["2.weight"], torch.zeros(8), 1e-5)
    assert moments.second_moment.keys() == {"0.bias", "2.bias"}


def test_an_evaluation_pass_between_forward_and_backward_changes_nothing():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    loss = squared_error(model, batch).mean()
    with torch.no_grad():
        model.eval()(torch.randn(5, 4))
    model.train()(torch.randn(3, 4))  # and one with a graph that nobody differentiates
    loss.backward()
    agrees(hooks.collect(), grads)


def test_layers_called_by_keyword_and_one_use_without_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            with torch.no_grad():
                shift = self.layer(input=inputs)
            return self.head(input=self.layer(input=inputs) + shift)

    torch.manual_seed(0)
    model, batch = Model(), make_batch()
    agrees(measure(model, batch), oracle.per_sample_grads(model, squared_error, batch))


def test_two_sets_of_hooks_do_not_disturb_each_other():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    first, second = GradSampleHooks(model), GradSampleHooks(model, samples=3, ignore=["0"])
    backward(model, batch)
    agrees(first.collect(), grads)
    agrees(second.collect(), {name: rows for name, rows in grads.items() if name.startswith("2.")})


def test_grad_sq_norm_is_that_of_the_finished_gradients():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model)
    backward(model, batch)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    model.zero_grad()
    close(hooks.collect().grad_sq_norm, mean_grad_sq_norm(grads), 1e-5)
