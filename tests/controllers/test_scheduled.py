"""Open-loop schedules in a controller's place: every one per step, per epoch and per samples, as
bs-scheduler users would step it by hand."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveDataLoader, schedules
from adabatch.controllers import CABS, Scheduled, Seesaw
from tests.options import make_scheduler
from tests.schedules.cases import FIXED
from tests.scripted import Slope, ones, slope_run, steps

N, START, STEPS = 120, 10, 45


def single(name):
    return lambda at: getattr(schedules, name)(**FIXED[name], **at)


def chained(at):
    return schedules.ChainedBSScheduler([schedules.ConstantBS(factor=3.0, milestone=4, **at),
                                         schedules.ExponentialBS(gamma=1.1, **at)])


def sequential(at):
    return schedules.SequentialBS([schedules.ConstantBS(factor=3.0, milestone=4, **at),
                                   schedules.StepBS(step_size=2, **at)], [5])


def ramp(at):
    return schedules.RampBS(ramp="0:10 200:20 1K:45", **at)


BUILDERS = {name: single(name) for name in FIXED} | {"Chained": chained, "Sequential": sequential,
                                                     "RampBS": ramp}
every_schedule = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def virtual_size():
    return {"dataloader": None, "batch_size_manager": schedules.VirtualBatchSize(START)}


class Run:
    """A model of one weight whose loss falls, under a scheduled batch size; nothing is measured."""

    def __init__(self, controller, **options):
        self.model = Slope()
        self.optimizer = SGD(self.model.parameters(), lr=0.01)
        self.loader = AdaptiveDataLoader(ones(N), START)
        self.scheduler = make_scheduler(self.optimizer, self.loader, None, controller,
                                        **{"min_batch_size": 1, "max_batch_size": N, **options})
        self.done = 0

    def train(self, n_steps):
        """(size, samples seen, whether an epoch ended) of each step."""
        rows, until = [], self.done + n_steps
        while True:
            delivered = self.scheduler.samples_seen % N
            for (inputs,) in self.loader:
                self.optimizer.step()
                self.scheduler.step(loss_at(self.done))
                delivered += len(inputs)
                rows.append((len(inputs), self.scheduler.samples_seen, delivered == N))
                self.done += 1
                if self.done == until:
                    return rows
            delivered = 0


def loss_at(step):
    return [1.0, 0.7, 0.9, 0.8, 0.8, 0.8, 0.5, 0.6, 0.6][step % 9]


UNITS = {"step": {}, "two steps": {"unit": "step", "every": 2}, "epoch": {"unit": "epoch"},
         "samples": {"unit": "samples", "every": 50}}


def by_hand(build, unit="step", every=1, n_steps=STEPS):
    """The sizes of the same run, with the schedule stepped by hand."""
    schedule = build(virtual_size())
    sizes, position, seen, ended, taken, losses, pending = [], 0, 0, 0, 0, [], 0
    for step in range(n_steps):
        size = min(schedule.batch_size, N - position)
        sizes.append(size)
        position, seen, pending = (position + size) % N, seen + size, pending + size
        ended += position == 0
        losses += [loss_at(step)] * size
        due = {"step": step + 1, "epoch": ended, "samples": seen}[unit] // every
        for _ in range(due - taken):
            schedule.step(metrics=math.fsum(losses) / len(losses), samples=pending)
            pending = 0
        if due > taken:
            losses = []
        taken = due
    return sizes


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@every_schedule
def test_sizes_are_those_of_the_schedule_stepped_by_hand(build, unit):
    if unit.get("unit") == "samples" and build is ramp:
        unit = {"unit": "samples"}
    rows = Run(Scheduled(build(virtual_size()), **unit)).train(STEPS)
    assert [size for size, _, _ in rows] == by_hand(build, **unit)


@pytest.mark.parametrize("unit", ["step", "epoch", "samples"])
@pytest.mark.parametrize("k", [1, 7, 16])
@every_schedule
def test_a_resumed_run_equals_an_unbroken_one(build, unit, k):
    options = {"unit": unit, "every": 30 if unit == "samples" and build is not ramp else None}
    unbroken = Run(Scheduled(build(virtual_size()), **options)).train(2 * k)
    first = Run(Scheduled(build(virtual_size()), **options))
    rows = first.train(k)
    state = first.scheduler.state_dict()
    second = Run(Scheduled(build(virtual_size()), **options))
    second.loader.batch_sampler.load_state_dict(first.loader.batch_sampler.state_dict())
    second.scheduler.load_state_dict(state)
    second.done = k
    assert [row[:2] for row in rows + second.train(k)] == [row[:2] for row in unbroken]


def test_per_epoch_over_a_plain_loader_that_drops_its_last_batch():
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    schedule = schedules.StepBS(None, 1, batch_size_manager=schedules.VirtualBatchSize(16))
    loader = DataLoader(ones(100), batch_size=16, drop_last=True)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader,
                                                 controller=Scheduled(schedule, unit="epoch"),
                                                 batch_sizes=(1, 2048))
    sizes = []
    for _ in range(3):
        sizes.append([])
        for (inputs,) in loader:
            sizes[-1].append(len(inputs))
            optimizer.step()
            scheduler.step(1.0)
    assert sizes == [[16] * 6, [32] * 3, [64]]
    assert not model._forward_hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ramps_and_functions_of_the_count(accumulate):
    controllers = {
        "ramp": Scheduled("0:8 40:16 100:32", unit="samples"),
        "function": Scheduled(schedules.stepwise_ramp("0:8 40:16 100:32"), unit="samples"),
        "RampBS": Scheduled(schedules.RampBS(None, "0:8 40:16 100:32",
                                             batch_size_manager=schedules.VirtualBatchSize(8)),
                            unit="samples"),
    }
    for controller in controllers.values():
        model = nn.Linear(1, 1)
        parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(ones(400), 3),
                              controller=controller, batch_sizes=(1, 2048), accumulate=accumulate)
        _, loader, scheduler = parts
        for count, _ in enumerate(loader, start=1):
            if count % accumulate == 0:
                scheduler.step(1.0)
        sizes = list(scheduler.diagnostics.column("batch_size"))
        assert sizes[:12] == [8] * 5 + [16] * 4 + [32] * 3
    assert Scheduled(lambda step: 10 * (step + 1), every=3).first_batch_size == 10


def test_unmeasured_and_dropped_steps_count():
    def schedule():
        size = schedules.VirtualBatchSize(4)
        return Scheduled(schedules.StepBS(None, 1, batch_size_manager=size))

    for options in ({}, {"every": 3}):
        run = slope_run(schedule(), n=1000, **options)
        losses = iter([1.0, math.nan, 1.0, math.inf, 1.0])
        def loss_of(out, losses=losses):
            return out.mean() * next(losses)

        rows = [rows for rows, _ in steps(*run, 5, loss_of=loss_of)]
        assert rows == [4, 8, 16, 32, 64]
    assert run[3].diagnostics.n_measured + run[3].diagnostics.n_dropped == 2


def test_lr_coupling_lower_lr_and_bounds_are_the_schedulers():
    size = schedules.VirtualBatchSize(16)
    controller = Scheduled(schedules.StepBS(None, 1, batch_size_manager=size))
    run = slope_run(controller, n=5000, on_limit="lower_lr", coupling="sqrt")
    moved = list(steps(*run, 5))
    assert [rows for rows, _ in moved] == [16, 32, 64, 64, 64]
    assert [move for _, move in moved] == pytest.approx([1, 2**0.5, 2, 2 * 64 / 128, 2 * 64 / 256],
                                                        rel=1e-5)


def test_divisibility_is_checked_when_a_size_is_used():
    ramp = schedules.RampBS(None, "0:8 16:12", micro_batch_size=8,
                            batch_size_manager=schedules.VirtualBatchSize(8))
    controller = Scheduled(ramp, unit="samples")
    run = Run(controller)
    run.train(1)
    with pytest.raises(ValueError, match=r"batch size 12 is not a multiple of 8"):
        run.train(1)


def test_arguments():
    message = (r"writes to a loader \(DefaultBatchSizeManager\).*"
               r"StepBS\(None, ..., batch_size_manager=VirtualBatchSize\(8\)\)")
    with pytest.raises(ValueError, match=message):
        Scheduled(schedules.StepBS(DataLoader(ones(20), 8), 2))
    with pytest.raises(ValueError,
                       match="unit must be one of 'step', 'epoch', 'samples', got 'batch'"):
        Scheduled("0:8", unit="batch")
    with pytest.raises(ValueError,
                       match="unit='samples' needs every=, the samples to one step of StepBS"):
        Scheduled(schedules.StepBS(**virtual_size(), step_size=2), unit="samples")
    with pytest.raises(ValueError, match="counts the samples itself: omit every, got 8"):
        Scheduled(ramp(virtual_size()), unit="samples", every=8)
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        Scheduled("0:8", every=0)
    with pytest.raises(TypeError, match="a function of the count, got 8"):
        Scheduled(8)
    with pytest.raises(ValueError, match="the state of Scheduled lacks"):
        Scheduled(ramp(virtual_size())).load_state_dict(Scheduled("0:8").state_dict())


def test_finished():
    controller = Scheduled(schedules.ConstantBS(**virtual_size(), factor=2.0, milestone=1))
    assert not controller.finished
    controller.on_step(samples=10, epoch=0)
    assert controller.propose(None, loss=1.0, lr=0.1) == 10.0
    assert controller.finished
    assert not Scheduled("0:8").finished


def test_hooks_none_needs_a_controller_and_a_coupling_without_moments():
    model = Slope()
    optimizer, loader = SGD(model.parameters(), lr=0.1), AdaptiveDataLoader(ones(40), 8)
    message = (r"CABS needs gradient moments, but nothing is measured .*: "
               r"pass adabatch.GradSampleHooks\(model\)")
    with pytest.raises(ValueError, match=message):
        make_scheduler(optimizer, loader, None, CABS())
    with pytest.raises(ValueError,
                       match="coupling='adascale' needs gradient moments, but nothing is measured"):
        make_scheduler(optimizer, loader, None, Seesaw(8), coupling="adascale")
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, False),
        ({"measure": "all"}, True),
        ({"measure": adabatch.Every(1, samples=4)}, True),
        ({"coupling": "adascale", "measure": "all"}, True),
        ({"measure": 1.0}, True),
        ({"coupling": "linear"}, False),
    ],
)
def test_wrap_measures_an_open_loop_run_only_on_request(options, measured):
    model = nn.Linear(1, 1)
    options = {"controller": Scheduled("0:8"), "batch_sizes": (1, 2048), **options}
    _, loader, scheduler = adabatch.wrap(model, SGD(model.parameters(), lr=0.1),
                                         DataLoader(ones(64), 8), **options)
    assert bool(model._forward_hooks) == measured
    for (inputs,) in loader:
        loss = model(inputs).square().mean()
        loss.backward()
        scheduler.step(loss)
    assert scheduler.diagnostics.column("measured")[:5].tolist() == [measured] * 5
    assert scheduler.get_last_batch_size() == 8
    scheduler.remove()
    assert not model._forward_hooks


def test_a_model_that_cannot_be_measured_can_be_scheduled():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            return (inputs * self.weight.item()).cumsum(0) + self.weight

    model = Odd()
    optimizer, loader = SGD(model.parameters(), lr=0.1), DataLoader(ones(64), 8)
    _, loader, scheduler = adabatch.wrap(model, optimizer, loader,
                                         controller=Scheduled("0:8 16:24", unit="samples"))
    for (inputs,) in loader:
        model(inputs).mean().backward()
        scheduler.step(0.5)
    assert list(scheduler.diagnostics.column("batch_size")) == [16, 24, 24]


def test_the_state_of_another_controller_is_refused():
    with pytest.raises(ValueError,
                       match="the state of a controller CABS cannot be loaded into Scheduled"):
        Scheduled("0:16").load_state_dict(CABS().state_dict())
    with pytest.raises(ValueError, match=r"the state of Scheduled lacks \['counts'"):
        Scheduled("0:16").load_state_dict({"version": 1, "controller": "Scheduled"})


@pytest.mark.parametrize("size", [None, "16"])
def test_a_function_must_return_a_number(size):
    with pytest.raises(TypeError, match="the schedule must return the batch size, a number, got"):
        Scheduled(lambda count: size).propose(None, loss=1.0, lr=0.1)


def test_the_repr_shows_the_schedule():
    start = schedules.VirtualBatchSize(8)
    shown = repr(Scheduled(schedules.StepBS(None, 3, batch_size_manager=start), unit="epoch"))
    assert shown == ("Scheduled(StepBS(step_size=3, gamma=2.0, batch 8, step 0), unit='epoch', "
                     "every=1)")
    assert repr(Scheduled(max)) == f"Scheduled({max!r}, unit='step', every=1)"
    assert repr(Scheduled("0:64 1M:256")) == "Scheduled('0:64 1M:256', unit='step', every=1)"
