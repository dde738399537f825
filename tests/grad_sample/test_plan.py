"""What is refused when hooks are attached: everything at once, each with its fix."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from adabatch import GradSampleHooks
from adabatch.grad_sample.plan import plan_layers, unwrap
from tests import oracle
from tests.grad_sample.measuring import agrees, make_batch, make_mlp, measure, squared_error


def test_the_plan_names_layers_parameters_and_what_is_shared():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "act": nn.ReLU(), "mix": nn.Linear(4, 4),
                           "head": nn.Linear(4, 5)})
    model["head"].weight = model["table"].weight
    model["mix"].bias.requires_grad_(False)
    plan = plan_layers(model)
    assert {layer.name: layer.parameters for layer in plan.layers} == {
        "table": {"weight": "table.weight"},
        "mix": {"weight": "mix.weight"},
        "head": {"weight": "table.weight", "bias": "head.bias"},
    }
    assert list(plan.parameters) == ["table.weight", "mix.weight", "head.bias"]
    assert plan.parameters["table.weight"] is model["head"].weight
    assert plan.shared == {"table.weight"}


@pytest.mark.parametrize("compiled", [False, True])
def test_names_are_the_users_own(compiled):
    model = make_mlp()
    wrapped = torch.compile(model) if compiled else nn.Sequential(torch.compile(model[0]), model[2])
    names = ["0.weight", "0.bias", "2.weight", "2.bias"] if compiled else [
        "0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(plan_layers(wrapped).parameters) == names
    assert unwrap(torch.compile(model)) is model
    assert len(plan_layers(wrapped, ignore=["0"]).parameters) == 2


def test_all_problems_are_listed_at_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, scale_grad_by_freq=True),
                          nn.Embedding(3, 2, sparse=True), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="cannot be measured exactly") as caught:
        GradSampleHooks(model, ignore=["9"])
    message = str(caught.value)
    for part in ("Embedding (1): scale_grad_by_freq", "Embedding (2): sparse=True",
                 "set layer.sparse = False", "3.weight is not initialized: run one batch"):
        assert part in message
    assert "ignore contains '9', but the model has no module or parameter of that name" in message
    assert "Linear (0)" not in message
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_lazy_module_is_measured_after_its_first_batch():
    model, batch = nn.Sequential(nn.LazyLinear(3)), make_batch()
    model(batch[0])
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch), grads)


@pytest.mark.parametrize("layer", [nn.Bilinear(4, 4, 3),
                                   parametrizations.weight_norm(nn.Linear(4, 3))],
                                   ids=["bilinear", "weight-norm"])
def test_a_layer_without_a_rule_is_exact_or_refused(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, inputs):
            both = isinstance(self.layer, nn.Bilinear)
            return self.layer(inputs, inputs) if both else self.layer(inputs)

    model, batch = Model(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    try:
        moments = measure(model, batch)
    except ValueError as error:
        assert "layer" in str(error)  # noqa: PT017
    else:
        agrees(moments, grads)


def test_a_layer_without_a_rule_may_be_frozen_or_ignored():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = nn.Bilinear(4, 4, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(self.pair(inputs, inputs))

    model, batch = Model(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch, ignore=["pair"]),
           {name: rows for name, rows in grads.items() if name.startswith("head")})
    model.pair.requires_grad_(False)
    agrees(measure(model, batch), oracle.per_sample_grads(model, squared_error, batch))


def test_a_parameter_shared_with_an_ignored_module_is_left_out_everywhere():
    """Its gradient has a part that no tap would see."""
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), make_batch(targets=4)
    model[1].weight = model[0].weight
    grads = oracle.per_sample_grads(model, squared_error, batch)
    agrees(measure(model, batch, ignore=["1"]), {"0.bias": grads["0.bias"]})
    shared = nn.Sequential(model[0], nn.Sequential(model[0]), nn.Linear(4, 4))
    grads = oracle.per_sample_grads(shared, squared_error, batch)
    agrees(measure(shared, batch, ignore=["1"]),
           {name: rows for name, rows in grads.items() if name.startswith("2.")})


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (nn.ReLU(), ValueError, "no trainable parameters"),
        (nn.Linear(2, 2).requires_grad_(False), ValueError, "no trainable parameters"),
        (nn.DataParallel(nn.Linear(2, 2)), ValueError, "use DistributedDataParallel"),
        (nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))), ValueError,
         "use DistributedDataParallel"),
        ([nn.Linear(2, 2)], TypeError, r"must be a torch\.nn\.Module, got list"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), ValueError,
         r"Embedding \(the model itself\): scale_grad_by_freq"),
    ],
    ids=["relu", "frozen", "data-parallel", "inner-data-parallel", "list", "embedding"],
)
def test_models_that_are_refused(model, error, match):
    with pytest.raises(error, match=match):
        GradSampleHooks(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_reduction": "none"},
         r"loss_reduction must be one of \('mean', 'sum'\), got 'none'"),
        ({"samples": 0}, "samples must be a positive integer or None, got 0"),
        ({"samples": 2.0}, "samples must be a positive integer or None, got 2.0"),
        ({"accumulate": 0}, "accumulate must be a positive integer, got 0"),
        ({"accumulate": True}, "accumulate must be a positive integer, got True"),
        ({"capacity": -1}, "capacity must be a positive integer, got -1"),
        ({"ignore": ["3", "2.scale"]}, r"(?s)contains '3'.*'2\.scale'"),
        ({"param_groups": []}, "no trainable parameters"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        GradSampleHooks(make_mlp(), **options)


class Bare(nn.Module):
    """A bare parameter that the loss uses, and one inside of a submodule without a rule."""

    def __init__(self):
        super().__init__()
        self.body, self.log_scale = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))
        self.part = nn.ParameterDict({"shift": nn.Parameter(torch.ones(3))})

    def forward(self, inputs):
        return self.body(inputs) + self.part["shift"]


@pytest.mark.parametrize("ignore", [
    ["log_scale"], ["log_scale", "part.shift"], ["log_scale", "body.weight"], ["", "body.bias"],
    ["log_scale", "part", "body"]], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_ignore_takes_names_of_parameters_too(ignore, compiled):
    model, batch = Bare(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    left = {name for name in grads if name not in ignore and name.split(".")[0] not in ignore}
    left -= {"log_scale"}
    if not left:
        with pytest.raises(ValueError, match="no trainable parameters"):
            GradSampleHooks(model, ignore=ignore)
        return
    if compiled:
        assert set(plan_layers(torch.compile(model), ignore=ignore).parameters) == left
        return
    moments = measure(model, batch, ignore=ignore, per_parameter=True)
    assert moments.by_parameter.keys() == left
    agrees(moments, {name: grads[name] for name in left})


def test_the_error_of_a_bare_parameter_in_the_loss_names_a_fix_that_works():
    def loss_fn(model, batch):
        return (-model.log_scale).exp() * squared_error(model, batch) + model.log_scale

    model, batch = Bare(), make_batch()
    grads = oracle.per_sample_grads(model, loss_fn, batch)
    with pytest.raises(RuntimeError, match=r"no tap saw: log_scale.*ignore=\[...\]"):
        measure(model, batch, loss_fn)
    model.zero_grad()
    del grads["log_scale"]
    agrees(measure(model, batch, loss_fn, ignore=["log_scale"]), grads)
