"""The measuring plan: the average cost, the first steps, warnings, and which of wrap's arguments
wins."""

import itertools
import math
import re
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
from adabatch.grad_sample.cost import LAST_RESORT, LayerCost, StepCost
from adabatch.scheduler import decision
from adabatch.scheduler.decision import (
    HOOKS,
    PLAIN_STEPS,
    STRETCH,
    WARM_UP,
    WARNED_AFTER,
    Budget,
)
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


class Clock:
    """Stands where a run has spent its time: plain steps of a second, measurements at `factor`
    times what the model says, and `own` in scheduler.step() at every step."""

    def __init__(self, factor=1.0, own=0.0):
        self.factor, self.own, self.now = factor, own, 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(decision, "perf_counter", clock)
    return clock


def run(plan, hooks, n_steps, clock, size=lambda step: 64, start=0):
    """Which steps were measured, and what that cost in plain steps."""
    measured, spent = [], 0.0
    for step in range(start, start + n_steps):
        took, samples = hooks.enabled, hooks.samples
        measured.append(took)
        price = clock.factor * hooks.cost().share(size(step), samples) * took
        spent += price
        clock.now += 1.0 + price
        began = clock.now
        clock.now += clock.own
        plan.next_step(step + 1, took, size(step + 1), began)
    return measured, spent


@pytest.mark.parametrize("measure", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("share", [0.01, 0.09, 0.4, 1.2, 5.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_average_cost_is_within_the_budget(share, measure, factor, clock):
    hooks, clock.factor = Priced(share), factor
    plan = Budget(hooks, measure)
    n_steps = 40 * 100 + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured, spent = run(plan, hooks, n_steps, clock)
    assert all(measured[:WARM_UP])
    assert not any(measured[WARM_UP : WARM_UP + PLAIN_STEPS])
    one = plan.measurement.share * plan.measurement.every  # it may end with one
    assert spent <= measure * n_steps + one or plan.measurement.every == 100
    assert spent >= 0.6 * min(measure, factor * share) * n_steps
    assert plan.measurement.clock == pytest.approx(plan.measurement.share, rel=0.25)
    late = at(measured[1500:])
    gaps = [later - earlier for earlier, later in itertools.pairwise(late)]
    assert set(gaps) <= {plan.measurement.every,
                         math.ceil(STRETCH * plan.measurement.every)}
    if plan.measurement.every < LAST_RESORT:
        assert set(gaps[-3:]) == {plan.measurement.every}  # the debt of the first steps is repaid


def at(measured):
    return [step for step, took in enumerate(measured) if took]


def test_the_schedulers_own_time_counts(clock):
    hooks, clock.own = Priced(0.4), 0.01
    plan = Budget(hooks, 0.05)
    _, spent = run(plan, hooks, 4000, clock)
    assert 0.7 * 0.05 < spent / 4000 + HOOKS * clock.own < 1.1 * 0.05
    assert plan.measurement.share <= 0.05
    assert plan.measurement.clock == pytest.approx(plan.measurement.share, rel=0.1)


def test_a_price_that_changes_is_followed(clock):
    hooks = Priced(0.4)
    plan = Budget(hooks, 0.05)
    run(plan, hooks, 1000, clock)
    assert plan.measurement.share == pytest.approx(0.05, rel=0.2)
    clock.factor = 2.5
    run(plan, hooks, 1000, clock, start=1000)
    _, spent = run(plan, hooks, 1000, clock, start=2000)
    assert spent <= 1.1 * 0.05 * 1000


def test_what_happens_between_two_steps_now_and_then_changes_nothing(clock):
    runs = []
    for pause in (0.0, 100.0):
        hooks = Priced(0.4)
        plan = Budget(hooks, 0.05)
        for step in range(0, 1000, 50):
            run(plan, hooks, 50, clock, start=step)
            clock.now += pause
        runs.append(plan.measurement)
    assert runs[0].every == runs[1].every


def test_a_resumed_plan_is_the_same(clock):
    clock.factor = 3.0
    hooks, others = Priced(0.4), Priced(0.4)
    whole, half = Budget(hooks, 0.05), Budget(others, 0.05)
    expected = run(whole, hooks, 400, clock)[0]
    first = run(half, others, 150, clock)[0]
    again = Priced(0.4)
    resumed, again.enabled = Budget(again, 0.05), others.enabled
    resumed.load_state_dict(half.state_dict())
    assert first + run(resumed, again, 250, clock, start=150)[0] == expected
    assert resumed.measurement.every == whole.measurement.every


def test_the_first_process_decides(clock):
    """Two processes whose clocks differ measure the same steps."""
    sent, plans = [], []
    for factor in (3.0, 0.5):
        hooks, clock.factor = Priced(0.4), factor
        hooks.shard = Told(sent, first=not plans)
        plans.append(run(Budget(hooks, 0.05), hooks, 300, clock)[0])
    assert plans[0] == plans[1]
    assert not sent


class Told:
    """The processes of a batch, of which this one sends what it decides to the other, or gets it.
    """

    world_size = 1

    def __init__(self, sent, first):
        self.sent, self.first = sent, first

    def broadcast_from_first(self, value):
        if not self.first:
            return self.sent.pop(0)
        self.sent.append(value)
        return value


def test_the_plan_follows_the_size_beyond_a_factor():
    hooks = Priced(0.4)
    hooks.cost = lambda: StepCost((LayerCost(training=1e6, passthrough=4e5),), numel=10**7)
    plan = Budget(hooks, 0.05)
    sizes = {0: 16, 40: 23, 80: 160}
    seen = []
    for step in range(160):
        took = hooks.enabled
        size = sizes[max(start for start in sizes if start <= step + 1)]
        plan.next_step(step + 1, took, size, 0.0)
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
    plan.next_step(1, True, 64, 0.0)
    alone = Priced(0.4)
    alone.cost = hooks.cost
    other = Budget(alone, 0.05)
    other.next_step(1, True, 16, 0.0)
    assert plan.measurement == other.measurement


@pytest.mark.parametrize(("share", "own", "text"), [
    (100.0, 0.0, r"measure=0.01 cannot be kept on this model: by the clock the scheduler takes 0 of"
                 r" a plain step, and measuring 8 of 64 samples at one step in 100 another 0.15"),
    (2.0, 0.0, r"measure=0.01 is too small for this model: measuring 8 of 64 samples at one step in"
               r" 20 costs 0.016 of a step. .* raise measure to 0.016"),
    (0.4, 0.1, r"measure=0.01 cannot be kept on this model: by the clock the scheduler takes 0.183 "
               r"of a plain step, .* Raise measure to 0.37 or more"),
])
def test_a_budget_that_nothing_fits_is_warned_about_once(share, own, text, clock):
    hooks, clock.own = Priced(share), own
    plan = Budget(hooks, 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(plan, hooks, WARNED_AFTER - 1, clock)
    with pytest.warns(UserWarning, match=text) as found:
        run(plan, hooks, 1000, clock, start=WARNED_AFTER - 1)
    assert len(found) == 1
    figure = re.search(r"(?i)raise measure to ([0-9.]+)", str(found[0].message))[1]
    begin = text[len("measure=0.01 ") :][:12]
    with warnings.catch_warnings():  # the figure it names is enough
        warnings.filterwarnings("error", message=f"measure=.*{begin}")
        run(Budget(hooks := Priced(share), 1.01 * float(figure)), hooks, 1000, clock)


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
    first = max(PLAIN_STEPS + 2, math.ceil(STRETCH * every))
    assert at(measured)[WARM_UP] == WARM_UP - 1 + first
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
