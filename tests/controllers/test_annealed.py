"""Annealed: the step per sample of every optimizer step, as taken, is the decay's own, whatever the
batch."""

import math
import warnings

import pytest
import torch
from torch import nn

import adabatch
from adabatch import AdaptiveDataLoader, GradSampleHooks
from adabatch.controllers import CABS, Annealed, AtMost, NoiseScale
from tests.options import make_scheduler
from tests.scripted import Proposals, ones, slope_run, steps

SHAPES = {
    "linear": lambda p: 1 - p,
    "power": lambda p: (1 - p) ** 2,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
}
CAPS = {"max_batch_size": lambda: None, "number": lambda: 40,
        "measured": lambda: Proposals(100.0, 60.0, 30.0)}


@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_over_m_is_the_decay_at_every_step_of_sgd(shape, cap, scheduler_first):
    budget, base = 1500, 8
    controller = Annealed(budget, base, shape=shape, cap=CAPS[cap]())
    model, optimizer, loader, scheduler = slope_run(controller, n=600, batch_size=30, lr=0.5,
                                                    min_batch_size=4, max_batch_size=64)
    assert scheduler.get_last_batch_size() == base
    seen, sizes, etas = 0, [], []
    for rows, moved in steps(model, optimizer, loader, scheduler, n_steps=300,
                             scheduler_first=scheduler_first):
        expected = 0.5 / base * SHAPES[shape](min(1.0, seen / budget))
        # The gradient is 1, so that the distance moved is the lr.
        assert moved / rows == pytest.approx(expected, rel=1e-4, abs=1e-6)
        seen += rows
        sizes.append(rows)
        etas.append(moved / rows)
        assert optimizer.param_groups[0]["lr"] == 0.5
        if seen > budget:
            break
    assert max(sizes) == {"max_batch_size": 64, "number": 40, "measured": max(sizes)}[cap]
    assert etas[-1] < 0.05 * etas[0]


class Ratio(torch.optim.SGD):
    """Steps as SGD does, but counts as one of Adam's family."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["betas"] = (0.9, 0.99)


def test_alpha_over_the_root_of_m_is_the_decay_for_adams_family():
    controller = Annealed(1500, 8, rule="sqrt", cap=50)
    model, optimizer, loader, scheduler = slope_run(controller, n=1600, lr=0.5, min_batch_size=4,
                                                    max_batch_size=64)
    seen, sizes = 0, []
    for rows, moved in steps(model, optimizer, loader, scheduler):
        if seen + rows > 1500:
            break
        assert moved / math.sqrt(rows) == pytest.approx(0.5 / math.sqrt(8) * (1 - seen / 1500),
                                                        rel=1e-3)
        seen += rows
        sizes.append(rows)
    assert max(sizes) == 50


@pytest.mark.parametrize(("optimizer", "rule"), [(torch.optim.SGD, "linear"),
                                                 (torch.optim.AdamW, "sqrt"),
                                                 (torch.optim.RMSprop, "sqrt")])
def test_the_optimizer_decides_the_rule(optimizer, rule):
    model = nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(ones(64), batch_size=8)
    controller = AtMost(Annealed(1000, 8), 32)
    *_, scheduler = adabatch.wrap(model, optimizer(model.parameters(), lr=0.1), loader,
                                  controller=controller, batch_sizes=(4, 2048))
    assert controller.operands[0].rule == rule
    scheduler.remove()


def test_while_the_batch_grows_the_lr_is_held_to_rounding():
    controller = Annealed(4000, 16)
    model, optimizer, loader, scheduler = slope_run(controller, n=5000, lr=0.5,
                                                    max_batch_size=10_000)
    for rows, _ in steps(model, optimizer, loader, scheduler):
        if controller.samples_seen > 3800:
            break
        assert scheduler.get_last_lr()[0] == pytest.approx(0.5, rel=0.5 / (rows - 0.5) + 1e-9)


def test_a_resumed_run_has_the_same_rates():
    def build():
        return slope_run(Annealed(800, 8, cap=20), n=800, lr=0.5, min_batch_size=4)

    unbroken = build()
    moves = [moved for _, moved in steps(*unbroken, n_steps=30)]
    first = build()
    part = [moved for _, moved in steps(*first, n_steps=12)]
    resumed = build()
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[2].load_state_dict(first[2].state_dict())
    resumed[3].load_state_dict(first[3].state_dict())
    part += [moved for _, moved in steps(*resumed, n_steps=18)]
    assert part == moves


def test_the_cap_is_never_below_the_base_and_proposes_at_every_step():
    rule = Annealed(100, 16, cap=NoiseScale(), rule="linear")
    moments = adabatch.GradientMoments(2, torch.tensor([1.0, 1.0]), 0.9)  # a noise scale of 0.25
    rule.on_step(samples=90, epoch=0)
    assert rule.propose(moments, loss=1.0, lr=0.1) == 16.0
    assert rule.children[0].trace.count == 1


def test_at_the_end_of_the_budget_the_rate_is_the_final_one():
    rule = Annealed(100, 16, cap=64, rule="linear", final=0.1)
    rule.on_step(samples=1000, epoch=3)
    assert rule.propose(None, loss=1.0, lr=0.1) == 64.0
    assert rule.lr_factor()(64) == pytest.approx(0.1 * 64 / 16)


@pytest.mark.parametrize("options", [{"on_limit": "lower_lr"}, {"coupling": "linear"}])
def test_nothing_else_may_set_the_lr(options):
    with pytest.raises(ValueError, match="Annealed sets the lr itself"):
        slope_run(Annealed(100, 8), **options)


def test_a_summed_loss_is_refused():
    with pytest.raises(ValueError, match="a summed loss"):
        slope_run(Annealed(100, 8), loss_reduction="sum")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Annealed(0), "budget must be a positive number, got 0"),
        (lambda: Annealed(10, shape="step"), "shape must be one of"),
        (lambda: Annealed(10, cap=-1), "cap must be a positive number, got -1"),
        (lambda: Annealed(10, final=2.0), "final must be a number from 0 to 1, got 2.0"),
        (lambda: Annealed(10), r"budget \(10\) must not be below batch_size \(16\): it counts"),
        (lambda: Annealed(10, rule="cube"), "rule must be one of"),
        (lambda: Annealed(100).propose(None, loss=1.0, lr=0.1),
         "Annealed does not know its rule yet"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cabs_can_be_the_cap():
    rule = Annealed(100, 4, cap=CABS(f_star=0.5), rule="linear")
    assert rule.needs_effective_lr
    assert rule.needs_moments
    rule.on_step(samples=99, epoch=0)
    moments = adabatch.GradientMoments(2, torch.tensor([8.0, 8.0]), 4.0)  # T = 8
    assert rule.propose(moments, loss=1.0, lr=2.0) == pytest.approx(2.0 * 8 / 0.5)


def test_the_model_is_not_measured_where_the_cap_is_not():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = make_scheduler(optimizer, AdaptiveDataLoader(ones(64), 8), None, Annealed(1000, 8),
                               min_batch_size=4)
    scheduler.remove()
    with pytest.raises(ValueError, match="needs gradient moments"):
        make_scheduler(optimizer, AdaptiveDataLoader(ones(64), 8), None,
                       Annealed(1000, 8, cap=NoiseScale()), min_batch_size=4)
    GradSampleHooks(model).remove()


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_training_beyond_the_budget_is_warned_of_once(final):
    rule = Annealed(64, 16, rule="linear", final=final)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            rule.on_step(samples=16, epoch=0)
    with pytest.warns(UserWarning, match="after its budget of 64 samples.*counts samples") as seen:
        [rule.on_step(samples=16, epoch=0) for _ in range(3)]
    assert len(seen) == 1
