"""The cost model: products as torch counts them, and a budget that is kept."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adabatch import GradSampleHooks, kernels
from adabatch.grad_sample.cost import (
    CALL,
    FEWEST_SAMPLES,
    LAST_RESORT,
    LONGEST_INTERVAL,
    PASS,
    STEP,
    LayerCost,
    StepCost,
    layer_cost,
    within_budget,
)
from adabatch.grad_sample.layers.conv import FACTOR
from adabatch.kernels import conv_timings


class Positioned(nn.Module):
    """A parameter of its own, without a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.zeros(5, 4)), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.head(inputs + self.table)


class Scaled(nn.Module):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        return inputs * self.factor


MODELS = {
    "linear": (lambda: nn.Linear(4, 2), (6, 4), 1),
    "sequence": (lambda: nn.Linear(4, 2), (6, 5, 4), 1),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (6, 3, 8, 8), 1),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (6, 4), 2),
    "run again": (lambda: nn.Sequential(nn.Linear(4, 4), Scaled()), (6, 4), 2),
    "traced": (Positioned, (6, 5, 4), 2),
}
# Layers of matrix products, with an input.
PRODUCTS = {
    "vectors": (lambda: nn.Linear(7, 5), (4, 7)),
    "sequence": (lambda: nn.Linear(7, 5), (4, 3, 7)),
    "grid": (lambda: nn.Linear(7, 5), (4, 3, 2, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, stride=2), (4, 3, 50)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 8, (3, 1), groups=2, dilation=2), (4, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 5, 6)),
}


def cost_of(build, shape, **options):
    torch.manual_seed(0)
    model = build()
    hooks = GradSampleHooks(model, **options)
    model(torch.randn(shape)).square().mean().backward()
    hooks.collect()
    return hooks.cost()


def multiply_adds(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("build", "shape", "layers"), MODELS.values(), ids=MODELS)
def test_every_kind_of_layer_is_counted(build, shape, layers):
    cost = cost_of(build, shape)
    assert len(cost.layers) == layers
    assert all(layer.training > 0 and layer.measuring(6, 6) > 0 for layer in cost.layers)
    assert cost.numel == sum(parameter.numel() for parameter in build().parameters())
    assert 0 < cost.share(6, 2) < cost.share(6)


@pytest.mark.parametrize(("build", "shape"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_those_that_torch_counts(build, shape):
    layer, inputs = build(), torch.randn(shape, requires_grad=True)
    outputs = layer(inputs)
    cost = layer_cost(layer, inputs.shape, outputs.shape)
    passes = 2 * PASS * (inputs.numel() + outputs.numel()) / 4
    if getattr(layer, "groups", 0) != 1:  # the others' times are measured
        # torch counts a grouped weight gradient groups times too often.
        trained = 3 * multiply_adds(lambda: layer(inputs))
        assert 4 * (cost.training - passes) == trained
    assert cost.numel == layer.weight.numel()
    if isinstance(layer, nn.Linear):
        a = inputs.detach().view(4, -1, 7)
        b = torch.ones(4, a.shape[1], 5)
        counted, factor = multiply_adds(lambda: kernels.outer_dot(a, b, layer.weight)), 1
    else:
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        b, factor = torch.ones_like(outputs), FACTOR
        counted = multiply_adds(
            lambda: kernels.conv_dot(inputs.detach(), b, layer.weight, *geometry)
        )
    assert 4 * cost.product == pytest.approx(factor * counted)


@pytest.mark.parametrize(("positions", "form"), [(1, "rows"), (3, "gram"), (500, "gradients")])
def test_a_linear_costs_what_the_form_costs_that_the_kernels_choose(positions, form):
    cost = layer_cost(nn.Linear(64, 32), (2, positions, 64), (2, positions, 32))
    assert kernels.outer_form(positions, 64, 32) == form
    bias, products = PASS * positions * 32, positions * 64 * 32 + 2 * PASS * 64 * 32
    expected = {"rows": PASS * 96, "gram": bias + positions**2 * 96, "gradients": bias + products}
    assert cost.passthrough == expected[form]


def test_a_convolution_has_a_gram_form_where_its_images_are_small():
    layer = nn.Conv2d(512, 512, 3, padding=1)
    small, large = (layer_cost(layer, (2, 512, size, size), (2, 512, size, size))
                    for size in (4, 64))
    # Nothing of the weight gradient is shared.
    assert small.passthrough == pytest.approx(small.fused)
    assert small.passthrough - PASS * 16 * 512 < 2 * PASS * layer.weight.numel()
    assert large.fused < 0.7 * large.passthrough


def test_a_convolution_of_a_measured_shape_costs_what_was_measured():
    shape, (channels, widths, kernels_, positions) = (1, 2, 1, 2), conv_timings.AXES
    layer = nn.Conv2d(channels[1], widths[2], math.isqrt(kernels_[1]), padding=1)
    side = math.isqrt(positions[2])
    cost = layer_cost(layer, (4, channels[1], side, side), (4, widths[2], side, side))

    def measured(table):
        for index in shape:
            table = table[index]
        return conv_timings.PRODUCTS * table

    elements, bias = side**2 * (channels[1] + widths[2]), PASS * side**2 * widths[2]
    gradient = measured(conv_timings.WEIGHT_GRADIENT)
    assert cost.training == pytest.approx(3 * gradient + 2 * PASS * elements)
    fastest = min(measured(conv_timings.WINDOWS), measured(conv_timings.GROUPS))
    assert cost.passthrough == pytest.approx(bias + fastest)
    assert cost.fused == pytest.approx(bias + max(0, fastest - gradient))


@pytest.mark.parametrize(
    "setting", [(lambda: nn.Linear(64, 64), (32, 16, 64)),
                (lambda: nn.Conv1d(8, 8, 3), (32, 8, 50))]
)
@pytest.mark.parametrize(
    "options", [{"statistics": ["inner_products"]}, {"statistics": ["second_moment"]},
                {"statistics": ["inner_products", "second_moment"]}], ids=str,
)
def test_what_is_measured_besides_norms_is_counted(setting, options):
    plain, more = cost_of(*setting), cost_of(*setting, **options)
    assert {each.name for each in more.statistics} >= set(options["statistics"])
    assert more.measuring(32) > plain.measuring(32)
    assert more.plain(32) == plain.plain(32)


def test_a_step_by_hand():
    step = StepCost((LayerCost(training=100.0, passthrough=10.0),), numel=8)
    assert step.measuring(4, 2) == 2 * 10 + STEP + CALL + 2 * PASS * 8


@pytest.mark.parametrize("overhead", [0.5, 0.05, 0.02, 0.005, 1e-4])
@pytest.mark.parametrize("share", [0.01, 0.2, 3.0])
def test_a_plan_keeps_to_its_budget(overhead, share):
    cost = StepCost((LayerCost(training=1e9, passthrough=share * 1e9),), numel=0)
    plan = within_budget(cost, 256, overhead)
    taken = 256 if plan.samples is None else plan.samples
    assert taken >= FEWEST_SAMPLES
    assert plan.share == cost.share(256, plan.samples) / plan.every
    assert plan.share <= overhead * (1 + 1e-9) or plan.every == LAST_RESORT
    assert plan.every <= LONGEST_INTERVAL or taken == FEWEST_SAMPLES
    if plan.every == LONGEST_INTERVAL and FEWEST_SAMPLES < taken < 256:  # one more does not fit
        assert cost.share(256, taken + 1) / plan.every > overhead


def test_a_product_in_an_operation_costs_as_much_as_a_linear_layer():
    """The choice of samples and interval does not depend on who wrote the layer."""
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 48))
            self.bias = nn.Parameter(torch.zeros(48))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, 64), self.weight).view(*x.shape[:-1], 48)

    shares = []
    for layer in (Own(), nn.Linear(64, 48)):
        model = nn.Sequential(layer, nn.Tanh(), nn.Linear(48, 2))
        hooks = GradSampleHooks(model)
        model(torch.randn(16, 128, 64)).square().mean().backward()
        shares.append(hooks.cost().share(16))
    assert shares[0] == pytest.approx(shares[1], rel=0.2)
