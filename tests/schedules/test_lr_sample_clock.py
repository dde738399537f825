"""SampleClock: torch's schedulers advanced by samples, against the same schedulers advanced by
steps."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from adabatch import schedules
from adabatch.schedules import SampleClock

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5]),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=60),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, 5
    ),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
                    lr_scheduler.CosineAnnealingLR(optimizer, 20)], [4]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
         lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "adabatch LinearLR": lambda optimizer: schedules.LinearLR(optimizer, 50),
}


def new_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)


def metrics(name):
    return {"metrics": 1.0} if name == "ReduceLROnPlateau" else {}


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau"}))
def test_after_n_samples_it_has_taken_n_over_unit_steps(name):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 40))
    def compare(sizes, unit):
        plain = SCHEDULERS[name](new_optimizer())
        plain.optimizer.step() if hasattr(plain, "optimizer") else None
        clock = SampleClock(SCHEDULERS[name](new_optimizer()),
                            samples_per_step=max(unit, sum(sizes) // 50 + 1))
        taken = 0
        for i, size in enumerate(sizes):
            clock.optimizer.step()
            clock.step(size, **metrics(name))
            while taken < sum(sizes[: i + 1]) // clock.samples_per_step:
                plain.step(**metrics(name))
                taken += 1
            assert clock.get_last_lr() == plain.get_last_lr()

    compare()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_run_equals_an_unbroken_one(name):
    def build():
        return SampleClock(SCHEDULERS[name](new_optimizer()), samples_per_step=32)

    def run_steps(clock, sizes):
        rows = []
        for size in sizes:
            clock.optimizer.step()
            clock.step(size, **metrics(name))
            rows.append(clock.optimizer.param_groups[0]["lr"])
        return rows

    sizes = [16, 20, 31, 64, 5, 90, 32, 33, 40, 50, 60, 70]
    expected = run_steps(build(), sizes)
    first = build()
    rows = run_steps(first, sizes[:6])
    file = io.BytesIO()
    torch.save([first.state_dict(), first.optimizer.state_dict()], file)
    assert file.tell() < 10_000
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    second = build()
    second.load_state_dict(state)
    second.optimizer.load_state_dict(optimizer_state)
    assert rows + run_steps(second, sizes[6:]) == expected


@pytest.mark.parametrize("units", [1, 4, 16])
def test_a_plateaus_patience_counts_samples_and_improvements_are_never_bad(units):
    """Against the plain scheduler: stepped once for a metric that improves, `units` times else."""
    def plateau():
        return lr_scheduler.ReduceLROnPlateau(new_optimizer(), patience=6, cooldown=3)

    clock, plain = SampleClock(plateau(), 32), plateau()
    values = [10.0 - step for step in range(8)] + [3.0] * 6 + [1.0] + [2.0] * 20
    best = torch.inf
    for value in values:
        clock.step(32 * units, metrics=torch.tensor(value))
        cooling = plain.in_cooldown
        for _ in range(units if value >= best or cooling else 1):
            if value >= best or plain.in_cooldown or plain.best > value:
                plain.step(value)
        best = min(best, value)
        assert clock.get_last_lr() == [group["lr"] for group in plain.optimizer.param_groups]
    assert clock.get_last_lr() < [0.5]
    assert clock.steps_taken == len(values) * units


def test_a_metric_that_improves_all_the_time_keeps_the_lr():
    clock = SampleClock(lr_scheduler.ReduceLROnPlateau(new_optimizer(), patience=2), 16)
    for step in range(20):
        clock.step(256, metrics=100.0 - step)
    assert clock.get_last_lr() == [0.5]


def test_a_plateau_without_a_metric_says_how():
    clock = SampleClock(lr_scheduler.ReduceLROnPlateau(new_optimizer()), 16)
    with pytest.raises(TypeError, match=r"step\(samples, metrics=loss\)"):
        clock.step(5)
    clock.step(5, metrics=1.0)
    assert clock.samples_seen == 5


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_one_cycle_ends_at_its_last_lr(size):
    plain = lr_scheduler.OneCycleLR(new_optimizer(), 1.0, total_steps=20)
    for _ in range(19):
        plain.optimizer.step()
        plain.step()
    clock = SampleClock(lr_scheduler.OneCycleLR(new_optimizer(), 1.0, total_steps=20), 10)
    for _ in range(-(-400 // size)):  # twice the budget
        clock.optimizer.step()
        clock.step(size)
    assert clock.get_last_lr() == plain.get_last_lr()


def test_bad_arguments():
    scheduler = SCHEDULERS["StepLR"](new_optimizer())
    with pytest.raises(TypeError, match="SGD"):
        SampleClock(new_optimizer(), 10)
    with pytest.raises(ValueError, match="got 0"):
        SampleClock(scheduler, 0)
    with pytest.raises(TypeError, match=r"2\.5"):
        SampleClock(scheduler, 2.5)
    clock = SampleClock(scheduler, 10)
    with pytest.raises(ValueError, match="-1"):
        clock.step(-1)
    with pytest.raises(ValueError, match="version None"):
        clock.load_state_dict({})
