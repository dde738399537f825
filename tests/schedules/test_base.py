"""What all schedules share: what they say of themselves."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from adabatch import schedules
from adabatch.schedules import (
    ChainedBSScheduler,
    LinearLR,
    RampBS,
    SampleClock,
    SequentialBS,
    StepBS,
    VirtualBatchSize,
)
from tests.schedules.cases import FIXED


@pytest.mark.parametrize("name", FIXED)
def test_the_repr_names_the_arguments_given_and_the_state(name):
    schedule = getattr(schedules, name)(DataLoader(range(500), batch_size=16), **FIXED[name])
    schedule.step(metrics=1.0)
    shown = repr(schedule)
    assert shown.startswith(f"{name}(")
    for argument, value in FIXED[name].items():
        if argument not in ("milestones", "max_batch_size", "min_batch_size"):
            assert f"{argument}={value!r}" in shown, argument
    low, high = schedule.min_batch_size, schedule.max_batch_size
    assert shown.endswith(f"batch {schedule.batch_size} in [{low}, {high}], step 1)")


def test_reprs_of_functions_ramps_and_compositions():
    loader = DataLoader(range(500), batch_size=16)
    assert "bs_lambda=<lambda>" in repr(schedules.LambdaBS(loader, lambda epoch: 1))
    assert "milestones=[2, 5, 5]" in repr(schedules.MultiStepBS(loader, [5, 2, 5]))
    assert "ramp='0:64 1K:128'" in repr(RampBS(loader, "0:64 1K:128"))
    virtual = {"batch_size_manager": VirtualBatchSize(4)}
    assert repr(virtual["batch_size_manager"]) == "VirtualBatchSize(4)"
    first, second = StepBS(None, 2, **virtual), StepBS(None, 3, 1.5, **virtual)
    parts = "StepBS(step_size=2, gamma=2.0, batch 4, step 0), StepBS(step_size=3, gamma=1.5, batch"
    assert parts in repr(ChainedBSScheduler([first, second]))
    assert "milestones=[5], batch 4, step 0)" in repr(SequentialBS([first, second], [5]))
    finished = schedules.ConstantBS(loader, factor=2, milestone=1)
    finished.step()
    assert repr(finished).endswith("step 1, finished)")


def test_reprs_of_lr_schedules():
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    assert repr(LinearLR(optimizer, 100)) == "LinearLR(T=100, lr 0.5, step 0)"
    by_samples = LinearLR(optimizer, budget_samples=1000)
    optimizer.step()
    by_samples.step(200)
    assert repr(by_samples) == "LinearLR(budget_samples=1000, lr 0.4, 200 samples)"
    clock = SampleClock(StepLR(optimizer, 3), samples_per_step=100)
    clock.step(250)
    assert repr(clock) == "SampleClock(StepLR, samples_per_step=100, 250 samples, 2 steps)"
