"""Every rule against one float64 backward pass per sample, and what the registry accepts."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import adabatch.grad_sample.layers.activation
import adabatch.grad_sample.layers.conv
import adabatch.grad_sample.layers.embedding
import adabatch.grad_sample.layers.linear
import adabatch.grad_sample.layers.normalization  # noqa: F401
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import (
    find_grad_sampler,
    register_grad_sampler,
    registered_layer_types,
)
from tests import oracle
from tests.cases import CASES, SAMPLES

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ids = {"argvalues": CASES, "ids": [case.id for case in CASES]}


def weighted_output(model, batch):
    """Per-sample losses whose gradient with respect to the output is the given weight."""
    inputs, weights = batch
    return (model(inputs) * weights).reshape(len(inputs), -1).sum(1)


def close(actual, expected, rtol):
    """Relative to the largest entry: small ones are sums that cancel, and one-wide norms have a
    gradient of zero up to rounding."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=rtol,
                               atol=rtol * max(float(expected.abs().max()), 0.1))


def make(case, dtype):
    torch.manual_seed(0)
    layer, inputs = case.make_layer(dtype), case.make_inputs(dtype)
    weights = torch.randn_like(layer(inputs).detach())
    return layer, inputs, weights


def expected_grads(layer, inputs, weights):
    mixes = find_grad_sampler(layer).full_batch(layer)
    return (oracle.contributions if mixes else oracle.per_sample_grads)(
        layer, weighted_output, (inputs, weights))


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", **ids)
def test_rule_agrees_with_the_oracle(case, dtype, loss_reduction):
    layer, inputs, weights = make(case, dtype)
    expected = expected_grads(layer, inputs, weights)
    outputs = layer(inputs).detach().requires_grad_()
    losses = (outputs * weights).reshape(SAMPLES, -1).sum(1)
    (backprops,) = torch.autograd.grad(getattr(losses, loss_reduction)(), outputs)
    factors = find_grad_sampler(layer).rule(layer, inputs, backprops)
    scale = SAMPLES if loss_reduction == "mean" else 1
    assert factors.keys() == expected.keys()
    for name, factor in factors.items():
        rtol, grads = TOLERANCE[dtype], expected[name]
        direction = torch.randn(grads.shape[1:], dtype=dtype)
        assert tuple(factor.shape) == tuple(layer.get_parameter(name).shape)
        assert factor.sq_norms().dtype == dtype
        close(scale**2 * factor.sq_norms(), oracle.sq_norms({name: grads}), rtol)
        close(scale**2 * factor.second_moment(), oracle.second_moment({name: grads})[name], rtol)
        close(scale * factor.dot(direction), (grads * direction).reshape(SAMPLES, -1).sum(1), rtol)
        close(scale * factor.dense(), grads, rtol)


@pytest.mark.parametrize("case", **ids)
def test_bfloat16_backprops_with_float32_activations(case):
    layer, inputs, weights = make(case, torch.float32)
    weights = weights.bfloat16()
    expected = expected_grads(layer, inputs, weights)
    for name, factor in find_grad_sampler(layer).rule(layer, inputs, weights).items():
        results = factor.sq_norms(), factor.dense(), factor.second_moment()
        assert {each.dtype for each in results} == {torch.float32}
        close(factor.sq_norms(), oracle.sq_norms({name: expected[name]}), 1e-5)
        close(factor.second_moment(), oracle.second_moment({name: expected[name]})[name], 1e-5)
        close(factor.dense(), expected[name], 1e-5)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("case", **ids)
def test_fused_backward_agrees_with_autograd_and_the_rule(case, norms):
    layer, inputs, weights = make(case, torch.float64)
    sampler, inputs = find_grad_sampler(layer), inputs.detach()
    if inputs.is_floating_point():
        inputs.requires_grad_()
    outputs = layer(inputs)
    fused, layout = sampler.fused, Layout.BATCH_FIRST
    frozen = not all(parameter.requires_grad for parameter in layer.parameters())
    if fused is None or frozen or not fused.supports(layer, inputs, outputs, layout, True):
        return
    own = dict(layer.named_parameters())
    expected = torch.autograd.grad(outputs, [inputs, *own.values()], weights, retain_graph=True)
    saved = (inputs.detach(), *(fused.from_node(outputs) if fused.from_node else ()))
    result = fused.backward(layer, saved, layer.weight.detach(), weights, SAMPLES, layout,
                            needs_inputs=True, norms=norms, second_moment=norms)
    close(result.grad_inputs, expected[0], 1e-10)
    for name, grad in zip(own, expected[1:], strict=True):
        close(result.grads[name], grad, 1e-10)
    factors = sampler.rule(layer, inputs.detach(), weights)
    names = own.keys() if norms else set()
    assert result.sq_norms.keys() == result.second_moments.keys() == names
    for name in result.sq_norms:
        close(result.sq_norms[name], factors[name].sq_norms(), 1e-10)
        close(result.second_moments[name], factors[name].second_moment(), 1e-10)


@pytest.mark.parametrize("backprops_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.inputs().is_floating_point()],
                         ids=lambda case: case.id)
def test_bfloat16_activations(case, backprops_dtype):
    layer, inputs, weights = make(case, torch.float32)
    inputs, weights = inputs.bfloat16(), weights.to(backprops_dtype)
    expected = expected_grads(layer, inputs.float(), weights)
    for name, factor in find_grad_sampler(layer).rule(layer, inputs, weights).items():
        assert factor.sq_norms().dtype == torch.float32
        close(factor.sq_norms(), oracle.sq_norms({name: expected[name]}), 1e-5)
        close(factor.dense(), expected[name], 1e-5)


def test_every_registered_layer_type_has_a_case():
    built_in = {layer_type for layer_type in registered_layer_types()
                if layer_type.__module__.startswith("torch.nn.")}
    assert built_in - {type(case.layer()) for case in CASES} == set()


def test_case_ids_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(3, 2), torch.ones(3)),
        (nn.Conv1d(3, 2, 1), torch.ones(3, 5)),
        (nn.Conv2d(3, 2, 1), torch.ones(3, 5, 5)),
        (nn.Conv3d(3, 2, 1), torch.ones(3, 5, 5, 5)),
        (nn.Embedding(3, 2), torch.tensor(1)),
        (nn.LayerNorm((2, 3)), torch.ones(2, 3)),
        (nn.RMSNorm(3), torch.ones(3)),
        (nn.InstanceNorm2d(3, affine=True), torch.ones(3, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_without_a_batch_dimension_are_refused(layer, inputs):
    backprops = layer(inputs).detach()
    with pytest.raises(ValueError,
                       match=r"(?s)without a batch dimension.*Add one with "
                             r"(inputs|ids)\.unsqueeze\(0\)"):
        find_grad_sampler(layer).rule(layer, inputs, backprops)


@pytest.mark.parametrize(("option", "fix"), [
    ("sparse", "set layer.sparse = False"), (
        "scale_grad_by_freq", "set layer.scale_grad_by_freq = False")])
def test_embedding_options_that_are_unsupported_name_the_fix(option, fix):
    layer = nn.Embedding(5, 2, **{option: True})
    assert fix in find_grad_sampler(layer).unsupported(layer)
    setattr(layer, option, False)
    assert find_grad_sampler(layer).unsupported(layer) is None


@pytest.mark.parametrize(
    "layer_types",
    [(), (3,), (nn.Linear(2, 2),), (nn.ReLU, torch.relu), (int,)],
    ids=["none", "a number", "a layer", "a type and a function", "another type"],
)
def test_registering_what_is_no_module_type_is_a_type_error(layer_types):
    before = registered_layer_types()
    with pytest.raises(TypeError, match="register_grad_sampler"):
        register_grad_sampler(*layer_types)
    assert registered_layer_types() == before


def test_only_subclasses_that_compute_the_same_are_covered():
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).square()

    class Standardised(nn.Conv2d):
        def _conv_forward(self, inputs, weight, bias):
            return super()._conv_forward(inputs, weight - weight.mean(), bias)

    patched = nn.Linear(2, 2)
    patched.forward = torch.relu
    assert find_grad_sampler(Same(2, 2)) is find_grad_sampler(nn.Linear(2, 2))
    for layer in (Other(2, 2), Standardised(2, 2, 1), patched, nn.ReLU(), nn.Bilinear(2, 2, 2)):
        assert find_grad_sampler(layer) is None


def test_layers_whose_parameters_were_changed_from_outside_are_not_covered():
    parametrized, pruned, extended = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    parametrizations.weight_norm(parametrized)
    prune.identity(pruned, "weight")
    extended.scale = nn.Parameter(torch.ones(2))
    for layer in (parametrized, pruned, extended):
        assert find_grad_sampler(layer) is None


def test_rules_have_one_signature():
    for layer_type in registered_layer_types():
        case = next((case for case in CASES if type(case.layer()) is layer_type), None)
        if case:
            assert list(inspect.signature(find_grad_sampler(case.layer()).rule).parameters) == [
                "layer", "activations", "backprops"]
