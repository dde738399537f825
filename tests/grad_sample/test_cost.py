"""The cost model: every kind of layer is counted, and what a budget chooses keeps to it."""

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.grad_sample.cost import CALL, FEWEST_SAMPLES, LAST_RESORT, LONGEST_INTERVAL, PASS, STEP, LayerCost, StepCost, within_budget


class Positioned(nn.Module):
    """A parameter of its own, without a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.zeros(5, 4)), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.head(inputs + self.table)


MODELS = {
    "linear": (lambda: nn.Linear(4, 2), (6, 4), 1),
    "sequence": (lambda: nn.Linear(4, 2), (6, 5, 4), 1),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (6, 3, 8, 8), 1),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (6, 4), 2),
    "run again": (lambda: nn.Sequential(nn.Linear(4, 4), Scaled()), (6, 4), 2),
    "traced": (Positioned, (6, 5, 4), 2),
}


class Scaled(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        return inputs * self.factor


def cost_of(build, shape, **options):
    torch.manual_seed(0)
    model = build()
    hooks = GradSampleHooks(model, **options)
    model(torch.randn(shape)).square().mean().backward()
    hooks.collect()
    return hooks.cost()


@pytest.mark.parametrize(("build", "shape", "layers"), MODELS.values(), ids=MODELS)
def test_every_kind_of_layer_is_counted(build, shape, layers):
    cost = cost_of(build, shape)
    assert len(cost.layers) == layers
    assert all(layer.training > 0 and layer.measuring(6, 6) > 0 for layer in cost.layers)
    assert cost.numel == sum(parameter.numel() for parameter in build().parameters())
    assert 0 < cost.share(6, 2) < cost.share(6)


@pytest.mark.parametrize("setting", [(lambda: nn.Linear(64, 64), (32, 16, 64)), (lambda: nn.Conv1d(8, 8, 3), (32, 8, 50))])
@pytest.mark.parametrize("options", [{"inner_products": True}, {"second_moment": True}, {"inner_products": True, "second_moment": True}], ids=str)
def test_what_is_measured_beside_norms_is_counted(setting, options):
    plain, more = cost_of(*setting), cost_of(*setting, **options)
    assert more.measures >= set(options)
    assert more.measuring(32) > plain.measuring(32)
    assert more.plain(32) == plain.plain(32)


def test_a_layer_by_hand():
    # 4 samples of 10 positions, from 3 to 5: 3·10·3·5 multiply-adds of training, and two passes over 10·(3 + 5) elements.
    (layer,) = cost_of(lambda: nn.Linear(3, 5), (4, 10, 3)).layers
    assert layer.training == 3 * 150 + 2 * PASS * 80
    assert layer.product == 150
    step = StepCost((LayerCost(training=100.0, listening=10.0),), numel=8)
    assert step.measuring(4, 2) == 2 * 10 + STEP + CALL + 2 * PASS * 8


@pytest.mark.parametrize("overhead", [0.5, 0.05, 0.02, 0.005, 1e-4])
@pytest.mark.parametrize("share", [0.01, 0.2, 3.0])
def test_a_plan_keeps_to_its_budget(overhead, share):
    cost = StepCost((LayerCost(training=1e9, listening=share * 1e9),), numel=0)
    plan = within_budget(cost, 256, overhead)
    taken = 256 if plan.samples is None else plan.samples
    assert taken >= FEWEST_SAMPLES
    assert plan.share == cost.share(256, plan.samples) / plan.every
    assert plan.share <= overhead * (1 + 1e-9) or plan.every == LAST_RESORT
    assert plan.every <= LONGEST_INTERVAL or taken == FEWEST_SAMPLES
    if plan.every == LONGEST_INTERVAL and FEWEST_SAMPLES < taken < 256:  # not one sample less than fits
        assert cost.share(256, taken + 1) / plan.every > overhead
