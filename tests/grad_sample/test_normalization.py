"""Normalization layers by their input and statistics, as on a GPU, and the factors of scale and
shift."""

import pytest
import torch
from torch import nn

from adabatch import kernels
from adabatch.grad_sample.factors.affine import Scale, Shift
from adabatch.grad_sample.factors.base import Dense
from adabatch.grad_sample.factors.merge import merge_factors
from adabatch.grad_sample.layers import normalization
from adabatch.grad_sample.registry import find_grad_sampler
from tests import oracle
from tests.cases import NORMALIZATION, SAMPLES

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=[False, True], ids=["by x̂", "by statistics"])
def form(request, monkeypatch):
    """Both forms in which x̂ goes to the kernels, whatever the device."""
    monkeypatch.setattr(normalization, "takes_statistics", lambda activations: request.param)
    return request.param


def close(actual, expected, rtol):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=rtol,
                               atol=rtol * max(float(expected.abs().max()), 0.1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", NORMALIZATION, ids=lambda case: case.id)
def test_both_forms_agree_with_the_oracle(case, dtype, form):
    torch.manual_seed(0)
    layer, inputs = case.make_layer(dtype), case.make_inputs(dtype)
    weights = torch.randn_like(layer(inputs).detach())
    mixes = find_grad_sampler(layer).full_batch(layer)
    grads_of = oracle.contributions if mixes else oracle.per_sample_grads

    def losses(model, batch):
        return (model(batch[0]) * batch[1]).reshape(len(batch[0]), -1).sum(1)

    expected = grads_of(layer, losses, (inputs, weights))
    factors = find_grad_sampler(layer).rule(layer, inputs, weights)
    assert factors.keys() == expected.keys()
    for name, factor in factors.items():
        grads, rtol = expected[name], TOLERANCE[dtype]
        close(factor.sq_norms(), oracle.sq_norms({name: grads}), rtol)
        close(factor.second_moment(), grads.square().sum(0), rtol)
        close(factor.compact().dense(), grads, rtol)


def test_the_input_reaches_the_kernel_once_and_uncopied(monkeypatch):
    monkeypatch.setattr(normalization, "takes_statistics", lambda activations: True)
    asked = []
    operation = kernels.affine_sq_norms
    monkeypatch.setattr(kernels, "affine_sq_norms",
                        lambda *args: asked.append(args) or operation(*args))
    inputs, backprops = torch.randn(2, 3, 4, 5, 2).bfloat16()
    factors = find_grad_sampler(nn.GroupNorm(2, 4)).rule(nn.GroupNorm(2, 4), inputs, backprops)
    for factor in factors.values():
        factor.sq_norms()
    ((activations, second, mean, rstd),) = asked
    assert activations.data_ptr() == inputs.data_ptr()
    assert second.data_ptr() == backprops.data_ptr()
    assert activations.shape == (3, 10, 4)
    assert mean.shape == rstd.shape == (3, 1, 4)


def make_factor(kind, mean_shape, rstd_shape):
    """A factor of float64 and its gradients."""
    torch.manual_seed(0)
    a, b = torch.randn(2, SAMPLES, 4, 6, dtype=torch.float64)
    mean, rstd = (None if shape is None else torch.rand(shape, dtype=torch.float64)
                  for shape in (mean_shape, rstd_shape))
    scale = Scale(a, b, mean, rstd, (2, 3))
    normalized = (a - (0 if mean is None else mean)) * (1 if rstd is None else rstd)
    grads = (b if kind is Shift else b * normalized).sum(1).view(SAMPLES, 2, 3)
    return (Shift(scale) if kind is Shift else scale), grads


@pytest.mark.parametrize("kind", [Scale, Shift])
@pytest.mark.parametrize(
    ("mean_shape", "rstd_shape"),
    [(None, None), (None, (SAMPLES, 4, 1)), ((SAMPLES, 1, 6), (SAMPLES, 1, 6)),
     ((1, 1, 6), (1, 1, 6)), ((1, 4, 1), (SAMPLES, 1, 6)), ((1, 1, 6), None)],
)
def test_scale_and_shift(kind, mean_shape, rstd_shape):
    factor, grads = make_factor(kind, mean_shape, rstd_shape)
    direction, some = torch.randn(2, 3, dtype=torch.float64), torch.tensor([2, 0])
    for part, expected in ((factor, grads), (factor.select(some), grads[some]),
                           (factor.select(slice(1, 3)), grads[1:3])):
        assert part.shape == (2, 3)
        assert part.n_samples == len(expected)
        close(part.dense(), expected, 1e-10)
        close(part.sq_norms(), expected.flatten(1).square().sum(1), 1e-10)
        close(part.second_moment(), expected.square().sum(0), 1e-10)
        close(part.dot(direction), (expected * direction).sum((1, 2)), 1e-10)
    assert isinstance(factor.compact(), Dense)
    close(merge_factors([factor, factor.compact()]).sq_norms(),
          (2 * grads).flatten(1).square().sum(1), 1e-10)


def test_no_samples(form):
    for layer, shape in ((nn.LayerNorm(3), (0, 2, 3)), (nn.RMSNorm(3), (0, 2, 3)),
                         (nn.BatchNorm2d(3).eval(), (0, 3, 2, 2))):
        for name, factor in find_grad_sampler(layer).rule(
            layer, torch.ones(shape), torch.ones(shape)).items():
            assert factor.sq_norms().shape == (0,)
            assert factor.dense().shape == (0, *getattr(layer, name).shape)
