"""Coupling rules: their values, and the lr that batches of a scheduler are stepped with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

from adabatch import Coupling, GradientMoments
from adabatch.controllers import CABS
from adabatch.controllers.seesaw import rule_of_optimizer
from adabatch.estimators.null import NullEstimator
from adabatch.scheduler.coupling import (
    AdaScaleGain,
    coupling_for,
    linear,
    none,
    square_root,
)
from tests.scripted import Proposals, slope_run, steps

sizes = st.integers(1, 10_000)
both_orders = pytest.mark.parametrize("scheduler_first", [False, True],
                                      ids=["step-then-measure", "measure-then-step"])


@given(sizes, sizes, st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_rules_against_their_formulas(size, base, trace, signal):
    assert none(size, base) == 1
    assert linear(size, base) * base == pytest.approx(size)
    assert square_root(size, base) ** 2 * base == pytest.approx(size)
    gain = (trace / base + signal) / (trace / size + signal)
    assert AdaScaleGain()(size, base, trace / signal) == pytest.approx(gain, rel=1e-9)


@given(sizes, sizes, st.floats(0, math.inf))
def test_the_gain_lies_between_one_and_the_ratio_of_sizes(size, base, noise_scale):
    low, high = sorted((1.0, size / base))
    assert low - 1e-9 <= AdaScaleGain()(size, base, noise_scale) <= high * (1 + 1e-9)


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta])
def test_adams_family_takes_the_square_root(kind):
    assert rule_of_optimizer(kind([torch.zeros(1)])) == "sqrt"
    assert coupling_for("seesaw", kind([torch.zeros(1)])) is square_root


def test_unknown_rules_and_optimizers():
    optimizer = Rprop([torch.zeros(1)])
    with pytest.raises(ValueError,
                       match=r"coupling must be one of \['none', 'linear', 'sqrt', 'adascale', "
                             r"'seesaw'\] or a callable.*got 'cubic'"):
        coupling_for("cubic", optimizer)
    with pytest.raises(ValueError, match="Rprop is not known: pass coupling='linear' or 'sqrt'"):
        coupling_for("seesaw", optimizer)
    with pytest.raises(ValueError, match=r"smoothing must be a number from 0 .* got 1\.0"):
        AdaScaleGain(1.0)
    assert coupling_for(max, optimizer) is max


@both_orders
@pytest.mark.parametrize("lr", [lambda: 1.0, lambda: torch.tensor(1.0)], ids=["float", "tensor"])
@pytest.mark.parametrize(("coupling", "power"),
                         [("none", 0), ("linear", 1), ("sqrt", 0.5), ("seesaw", 1),
                          (lambda size, base, noise: (size / base) ** 2, 2)])
def test_each_batch_steps_with_the_factor_of_its_own_size(coupling, power, lr, scheduler_first):
    run = slope_run(Proposals(40, 8, 64, 16), n=16 + 40 + 8 + 64 + 4, coupling=coupling, lr=lr())
    requested, delivered = [16, 40, 8, 64, 16], [16, 40, 8, 64, 4]
    moved = list(steps(*run, scheduler_first=scheduler_first))
    assert [rows for rows, _ in moved] == delivered
    expected = [(size / 16) ** power * rows / size
                for size, rows in zip(requested, delivered, strict=True)]
    assert [move for _, move in moved] == pytest.approx(expected, rel=1e-5)
    assert {passed["lr"] for passed in run[3].controller.passed} == {1.0}
    assert float(run[1].param_groups[0]["lr"]) == 1.0


def test_the_base_can_be_given():
    run = slope_run(Proposals(40), coupling="linear", base_batch_size=32)
    assert [move for _, move in steps(*run, 2)] == pytest.approx([16 / 32, 40 / 32], rel=1e-5)
    assert run[3].last_lr_factor == 40 / 32


@both_orders
def test_coupling_lower_lr_and_short_batch_multiply(scheduler_first):
    run = slope_run(Proposals(128), n=16 + 64 + 32, on_limit="lower_lr", coupling="linear")
    assert [
        move for _, move in steps(*run, scheduler_first=scheduler_first)
    ] == pytest.approx([1.0, 4 * 0.5, 4 * 0.5 * 0.5], rel=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_of_workers_step_with_the_factor_of_what_was_asked_for(workers):
    run = slope_run(Proposals(40, 30, 20, 50), n=200, loader_options={"num_workers": workers},
                    coupling="linear", short_batch="keep")
    moved = [move for _, move in steps(*run)]
    requested = [size for size, _ in run[2].recent]
    assert moved == pytest.approx([size / 16 for size in requested], rel=1e-5)


class Moments(NullEstimator):
    """Stands in for the hooks: the (T, G²) written down, in turn."""

    enabled, lags = True, False

    def __init__(self, loader, pairs):
        super().__init__()
        self.loader, self.pairs, self.requested = loader, pairs, 0

    def observe(self, **options):
        return self

    def moments(self):
        trace, signal = self.pairs[min(self.requested, len(self.pairs) - 1)]
        size = self.loader.recent[-1][1]
        self.requested += 1
        grad_sq_norm = signal + trace / size
        mean = trace * (1 - 1 / size) + grad_sq_norm
        norms = torch.full((size,), mean, dtype=torch.float64)
        return GradientMoments(batch_size=size, sq_norms=norms, grad_sq_norm=grad_sq_norm)

    def state_dict(self):
        return {}


@both_orders
def test_adascale_from_the_moments_of_the_steps_before(scheduler_first):
    run = slope_run(Proposals(64), coupling=AdaScaleGain(smoothing=0.0))
    pairs = [(320.0, 10.0), (64.0, 1.0), (100.0, -1.0), (0.0, 1.0)]
    run[3].estimator.remove()
    run[3].estimator = Moments(run[2], pairs)
    moved = [move for _, move in steps(*run, 5, scheduler_first=scheduler_first)]
    gains = [(trace / 16 + signal) / (trace / 64 + signal) for trace, signal in pairs[:2]]
    assert moved == pytest.approx([1.0, *gains, 4.0, 1.0], rel=1e-5)
    assert run[3].last_lr_factor == pytest.approx(1.0)


def test_adascale_smooths_both_moments_before_it_divides():
    run = slope_run(Proposals(64), coupling="adascale")
    run[3].estimator.remove()
    pairs = [(320.0, 10.0), (64.0, 1.0), (90.0, 3.0)]
    run[3].estimator = Moments(run[2], pairs)
    moved = [move for _, move in steps(*run, 4)]
    weights = [16 * 0.95**2, 64 * 0.95, 64]
    trace, signal = (sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
                     for values in zip(*pairs, strict=True))
    assert moved[3] == pytest.approx((trace / 16 + signal) / (trace / 64 + signal), rel=1e-5)


def test_what_cannot_be_coupled_is_refused_and_leaves_no_hook():
    with pytest.raises(ValueError, match="coupling='linear' is for a loss that is a mean"):
        slope_run(Proposals(40), loss_reduction="sum", coupling="linear")
    with pytest.raises(ValueError,
                       match="base_batch_size must be a positive integer or None, got 0"):
        slope_run(Proposals(40), coupling="linear", base_batch_size=0)
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(ValueError,
                       match=r"scale_betas=True needs an optimizer with betas.*SGD has none"):
        slope_run(Proposals(40), optimizer=lambda *args, **kwargs: optimizer, scale_betas=True)
    assert not optimizer._optimizer_step_pre_hooks
    run = slope_run(Proposals(40), coupling=lambda size, base, noise: math.nan)
    with pytest.raises(ValueError,
                       match="the coupling gave the factor nan for a batch of 16 and a base of 16"):
        next(steps(*run))


@pytest.mark.parametrize("given", [None, "2", [1.0], torch.ones(2)], ids=str)
def test_a_rule_must_return_a_number(given):
    run = slope_run(Proposals(40), coupling=lambda size, base, noise: given)
    with pytest.raises(TypeError, match="coupling must return the factor on the lr, a number, got"):
        next(steps(*run))


@pytest.mark.parametrize("given", [2, torch.tensor(2.0), np.float32(2), True], ids=str)
def test_what_is_a_number_is_taken_as_one(given):
    run = slope_run(Proposals(40), coupling=lambda size, base, noise: given)
    next(steps(*run))
    assert run[3].last_lr_factor == float(given)
    assert type(run[3].last_lr_factor) is float


@pytest.mark.parametrize("rule", [lambda: 1.0, lambda size, base: 1.0, lambda *, size: 1.0],
                         ids=["none", "two", "keyword"])
def test_a_rule_must_take_three_arguments(rule):
    with pytest.raises(ValueError, match=r"Coupling: rule must take three arguments"):
        Coupling(rule)
    assert Coupling(lambda *args: 1.0).rule(1, 1, 0.0) == 1.0
    assert Coupling(AdaScaleGain()).rule(16, 16, 0.0) == 1.0


@pytest.mark.parametrize("given", [None, "0.1"])
def test_an_effective_lr_must_be_a_number(given):
    run = slope_run(CABS(effective_lr=lambda group: given))
    with pytest.raises(TypeError, match="effective_lr must return the lr of a group, a number"):
        next(steps(*run))


def test_a_coupled_lr_does_not_run_away():
    """CABS gets the base lr: with T and the loss constant its proposal is, too."""
    run = slope_run(CABS(), max_batch_size=4096, n=50_000, lr=0.5, coupling="linear")
    run[3].estimator.remove()
    run[3].estimator = Moments(run[2], [(320.0, 1.0)])
    list(steps(*run, 8, loss_of=lambda out: out.mean() - out.mean().detach() + 1))
    assert list(run[3].diagnostics.column("proposed_batch_size")) == pytest.approx([160.0] * 8)
