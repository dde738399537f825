"""The measuring plan: the average cost, the first steps, warnings, and which of wrap's arguments
wins."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveDataLoader, Every, GradSampleHooks
from adabatch.controllers import Scheduled
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.null import NullEstimator
from adabatch.grad_sample.cost import LayerCost, StepCost
from adabatch.scheduler.decision import STRETCH, WARM_UP, Budget
from tests.options import make_scheduler
from tests.scripted import Proposals, ones, slope_run, steps


class Priced(NullEstimator):
    """Hooks of which measuring all of N samples costs `share` of a step, whatever N."""

    def __init__(self, share, samples=None, accumulate=1):
        super().__init__(accumulate)
        self.samples, self.price = samples, share

    enabled = True

    def cost(self):
        return StepCost((LayerCost(training=1e12, passthrough=self.price * 1e12),), numel=0)


def run(plan, hooks, n_steps, size=lambda step: 64):
    """Which steps were measured, and what that cost in plain steps."""
    measured, spent = [], 0.0
    for step in range(n_steps):
        took, samples = hooks.enabled, hooks.samples
        measured.append(took)
        if took:
            spent += hooks.cost().share(size(step), samples)
        plan.next_step(step + 1, took, size(step + 1))
    return measured, spent


@pytest.mark.parametrize("measure", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("share", [0.01, 0.09, 0.4, 1.2, 5.0])
def test_the_average_cost_is_within_the_budget(share, measure):
    hooks = Priced(share)
    plan = Budget(hooks, measure)
    n_steps = 40 * 100 + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured, spent = run(plan, hooks, n_steps)
    assert all(measured[:WARM_UP])
    one = plan.measurement.share * plan.measurement.every  # it may end with one
    assert spent <= measure * n_steps + one or plan.measurement.every == 100
    assert spent >= 0.6 * min(measure, share) * n_steps
    gaps = [later - earlier for earlier, later in zip(at(measured), at(measured)[1:], strict=False)]
    assert set(gaps[WARM_UP - 1 :]) <= {plan.measurement.every,
                                        math.ceil(STRETCH * plan.measurement.every)}
    assert set(gaps[-3:]) == {plan.measurement.every}  # the debt of the first steps is repaid


def at(measured):
    return [step for step, took in enumerate(measured) if took]


def test_the_plan_follows_the_size_beyond_a_factor():
    hooks = Priced(0.4)
    hooks.cost = lambda: StepCost((LayerCost(training=1e6, passthrough=4e5),), numel=10**7)
    plan = Budget(hooks, 0.05)
    sizes = {0: 16, 40: 23, 80: 160}
    seen = []
    for step in range(160):
        took = hooks.enabled
        size = sizes[max(start for start in sizes if start <= step + 1)]
        plan.next_step(step + 1, took, size)
        seen.append((size, plan.measurement))
    assert len({measurement for size, measurement in seen if size <= 23}) == 1
    assert seen[-1][1] != seen[0][1]
    assert seen[-1][1].share == pytest.approx(
        hooks.cost().share(160, seen[-1][1].samples) / seen[-1][1].every
    )


def test_accumulated_passes_are_what_is_planned_for():
    hooks = Priced(0.4, accumulate=4)
    hooks.cost = lambda: StepCost((LayerCost(training=1e6, passthrough=4e5),), numel=10**7)
    plan = Budget(hooks, 0.05)
    plan.next_step(1, True, 64)
    alone = Priced(0.4)
    alone.cost = hooks.cost
    other = Budget(alone, 0.05)
    other.next_step(1, True, 16)
    assert plan.measurement == other.measurement


def test_a_budget_that_nothing_fits_is_warned_about_at_once():
    hooks = Priced(100.0)
    plan = Budget(hooks, 0.01)
    with pytest.warns(UserWarning,
                      match=r"measure=0.01 is too small for this model: measuring 8 of 64 samples "
                            r"at one step in 20 costs 0.75[0-9]* of a step"):
        plan.next_step(1, True, 64)
    assert plan.measurement.every > 20


def test_a_trace_that_is_not_known_well_enough_is_warned_about_once():
    plan = Budget(Priced(0.4), 0.05)
    trace = MovingAverage(0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(19):
            trace.update(100.0 * (-1) ** index + 1, 1)
            plan.judge(trace)
    trace.update(-99.0, 1)
    error = trace.std_error() / abs(trace.average)
    with pytest.warns(UserWarning,
                      match=r"measure=0.05 is too small: after 20 measurements .* "
                            rf"error of {error:.2f}, above 0.5. Raise"):
        plan.judge(trace)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.judge(trace)


def test_a_steady_trace_is_not_warned_about():
    plan, trace = Budget(Priced(0.4), 0.05), MovingAverage()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(30):
            trace.update(1.0 + 0.1 * (-1) ** index, 1)
            plan.judge(trace)


def test_the_scheduler_measures_what_the_plan_says():
    model, optimizer, loader, scheduler = slope_run(Proposals(16), n=4000, measure=0.05)
    for _ in steps(model, optimizer, loader, scheduler, 100):
        pass
    measured = list(scheduler.diagnostics.column("measured"))
    every = scheduler.measurement_plan.every
    assert measured[:WARM_UP] == [True] * WARM_UP
    assert every > 1
    assert at(measured)[WARM_UP] == WARM_UP - 1 + math.ceil(STRETCH * every)
    assert scheduler.measurement_plan.share == pytest.approx(
        scheduler.estimator.cost().share(16) / every
    )
    assert scheduler.measurement_plan.share <= 0.05


def test_the_share_of_a_fixed_interval_is_reported_once_it_is_known():
    model, optimizer, loader, scheduler = slope_run(Proposals(16), every=4)
    assert math.isnan(scheduler.measurement_plan.share)
    list(steps(model, optimizer, loader, scheduler, 1))
    assert scheduler.measurement_plan == (measurement := scheduler.measurement_plan)
    assert (measurement.samples, measurement.every) == (None, 4)
    assert measurement.share == scheduler.estimator.cost().share(16) / 4


def test_off_steps_touch_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 3))
    hooks = GradSampleHooks(model)
    hooks.enabled = False

    def fail(*args, **kwargs):
        raise AssertionError("a step that is not measured looked at its layer")

    for name in ("_measures", "_tap_layer", "_count_call", "_samples_in"):
        setattr(hooks._placer, name, fail)
    inputs = torch.randn(5, 1, 3)
    plain = torch.nn.functional.layer_norm
    output = model[1](model[0](inputs))
    assert output.grad_fn.name() == plain(output, (4,), model[1].weight,
                                          model[1].bias).grad_fn.name()


def wrapped(**options):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(ones(640), 16),
                         **options)[2]


@pytest.mark.parametrize(
    ("measure", "every", "samples"),
    [("all", 1, None), (Every(1, 4), 1, 4), (Every(3), 3, None), (Every(2, samples=4), 2, 4)],
)
def test_what_is_given_is_measured(measure, every, samples):
    measurement = wrapped(measure=measure).measurement_plan
    assert (measurement.every, measurement.samples) == (every, samples)


def test_a_budget_is_the_default():
    assert isinstance(wrapped()._plan, Budget)
    assert wrapped()._plan.state_dict()["share"] == 0.05
    assert wrapped(measure=0.2)._plan.state_dict()["share"] == 0.2


def test_a_controller_without_need_of_moments_is_measured_only_if_a_budget_is_given():
    assert not wrapped(controller=Scheduled("0:8"), batch_sizes=(1, 2048)).estimator.parameters
    assert wrapped(controller=Scheduled("0:8"), batch_sizes=(1, 2048),
                   measure=0.05).estimator.parameters


def test_a_share_needs_samples_to_choose_among():
    with pytest.raises(ValueError, match=r"measure=0.1 chooses among samples.*MicroBatch\(\)"):
        wrapped(measure=0.1, estimator=adabatch.MicroBatch())


@pytest.mark.parametrize(("options", "culprit", "fixed"), [
    ({}, "^CABS needs .*use a controller that needs none", {"controller": Scheduled("0:8")}),
    ({"controller": Scheduled("0:8"), "coupling": "adascale"},
     "^coupling='adascale' needs .*use coupling='linear', 'sqrt' or 'none'$",
     {"coupling": "sqrt"}),
    ({"coupling": "adascale"}, "^CABS and coupling='adascale' need .*Scheduled.* and coupling=",
     {"controller": Scheduled("0:8"), "coupling": "linear"}),
])
def test_what_needs_moments_is_named_and_nothing_else(options, culprit, fixed):
    with pytest.raises(ValueError, match=culprit):
        wrapped(measure=None, **options)
    assert not wrapped(measure=None, **options | fixed).estimator.parameters


def test_the_schedulers_own_arguments():
    model = nn.Linear(1, 1)
    hooks = GradSampleHooks(model, samples=4)
    parts = SGD(model.parameters(), lr=0.1), AdaptiveDataLoader(ones(64), 8), hooks
    with pytest.raises(ValueError, match="the estimator measures samples=4"):
        make_scheduler(*parts, measure=0.1)


def test_another_overhead_after_resuming_is_planned_for_again():
    model, optimizer, loader, scheduler = slope_run(Proposals(16), n=4000, measure=0.05)
    list(steps(model, optimizer, loader, scheduler, 30))
    again = slope_run(Proposals(16), n=4000, measure=0.4)
    again[3].load_state_dict(scheduler.state_dict())
    list(steps(*again, 30))
    assert again[3].measurement_plan.every < scheduler.measurement_plan.every
