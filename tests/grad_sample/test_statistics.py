"""A new statistic is one class: here it is defined in a test, and nothing else is touched."""

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.interfaces import Statistic
from tests import oracle
from tests.grad_sample.measuring import backward, close, make_batch, make_mlp, squared_error


class LargestNorm(Statistic):
    """max_n ‖G_n‖² of each parameter: the largest per-sample norm."""

    name = "largest_norm"

    def of_factor(self, name, factor, grad=None):
        return factor.sq_norms().max()

    def of_fused(self, name, sq_norms, second_moment):
        return sq_norms.max()

    def leaf_shape(self, name):
        return ()

    def pool(self, passes, scales, gradient):
        names = dict.fromkeys(name for values in passes for name in values)
        return {name: max(float(values[name]) * scale**2
                          for values, scale in zip(passes, scales, strict=True) if name in values)
                for name in names}


class AlignedSamples(Statistic):
    """Whether ⟨G_n, g⟩ of each parameter is positive, summed over the parameters: per sample, with
    the finished gradient."""

    name = "aligned"
    per_sample = True
    needs_gradient = True

    def of_factor(self, name, factor, grad=None):
        return (factor.dot(grad) > 0).float()

    def scaled(self, scale):
        return 1.0


def largest(grads):
    return {name: float(grad.flatten(1).square().sum(1).max()) for name, grad in grads.items()}


def tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x):
            return self.one(torch.tanh(self.one(x)))[:, :3]

    return Tied()


def fused():
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [make_mlp, tied, fused])
def test_largest_norm_of_each_parameter(make, reduction):
    torch.manual_seed(0)
    model, batch = make(), make_batch()
    hooks = GradSampleHooks(model, loss_reduction=reduction, statistics=[LargestNorm()])
    backward(model, batch, loss_reduction=reduction)
    expected = largest(oracle.per_sample_grads(model, squared_error, batch))
    found = hooks.collect().statistics["largest_norm"]
    assert found.keys() == expected.keys()
    for name in expected:
        close(found[name], expected[name], 1e-4)


def test_over_accumulated_passes_and_a_subset():
    torch.manual_seed(0)
    model, batches = make_mlp(), [make_batch(), make_batch()]
    hooks = GradSampleHooks(model, accumulate=2, statistics=[LargestNorm()])
    for batch in batches:
        backward(model, batch, divisor=2)
    each = [largest(oracle.per_sample_grads(model, squared_error, batch)) for batch in batches]
    found = hooks.collect().statistics["largest_norm"]
    for name in found:
        close(found[name], max(one[name] for one in each), 1e-4)
    subset = GradSampleHooks(make_mlp(), samples=3, statistics=[LargestNorm()])
    assert "largest_norm" in subset.statistics


@pytest.mark.slow
def test_in_a_compiled_model():
    torch.manual_seed(0)
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model, capacity=16, statistics=[LargestNorm()])
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    expected = largest(oracle.per_sample_grads(model, squared_error, batch))
    found = hooks.collect().statistics["largest_norm"]
    for name in expected:
        close(found[name], expected[name], 1e-4)


def test_a_per_sample_statistic_with_the_gradient():
    torch.manual_seed(0)
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model, statistics=[AlignedSamples()])
    backward(model, batch)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    expected = sum((grad.flatten(1) @ grad.mean(0).flatten() > 0).float()
                   for grad in grads.values())
    close(hooks.collect().statistics["aligned"], expected, 1e-6)


def test_of_several_at_once_and_what_is_refused():
    model = make_mlp()
    given = ["inner_products", "second_moment", LargestNorm()]
    hooks = GradSampleHooks(model, statistics=given)
    backward(model, make_batch())
    moments = hooks.collect()
    assert hooks.statistics == {"inner_products", "second_moment", "largest_norm"}
    assert moments.statistics.keys() == {"second_moment", "largest_norm"}
    assert "largest_norm" in repr(moments)
    hooks.remove()
    with pytest.raises(ValueError, match=r"statistics by name are.*got 'skewness'"):
        GradSampleHooks(model, statistics=["skewness"])
    with pytest.raises(ValueError, match="given twice"):
        GradSampleHooks(model, statistics=[LargestNorm(), LargestNorm()])
    with pytest.raises(TypeError, match="must be a list"):
        GradSampleHooks(model, statistics="inner_products")
    with pytest.raises(TypeError, match="Statistic, got 3"):
        GradSampleHooks(model, statistics=[3])


def test_the_cost_of_a_statistic_counts():
    class Dear(LargestNorm):
        def cost(self, layer, samples, measured, fused):
            return 1e9 * measured

    costs = []
    for statistics in ((), [LargestNorm()], [Dear()]):
        model = make_mlp()
        hooks = GradSampleHooks(model, statistics=statistics)
        backward(model, make_batch())
        costs.append(hooks.cost().measuring(8))
    assert costs[0] == costs[1] < costs[2]


