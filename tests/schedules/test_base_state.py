"""Checkpoints: k steps, reload into a new schedule over a new loader, k steps = 2k steps; plain,
small, and free of the old loader."""

import io

import bs_scheduler
import pytest
import torch
from torch.utils.data import DataLoader

from adabatch import schedules
from tests.schedules.cases import FIXED, TableOfFactors


def single(name):
    return lambda loader: getattr(schedules, name)(loader, **FIXED[name])


def chained(loader):
    return schedules.ChainedBSScheduler([schedules.ConstantBS(loader, 3.0, 4),
                                         schedules.ExponentialBS(loader, 1.1)])


def sequential(loader):
    return schedules.SequentialBS([schedules.ConstantBS(loader, 3.0, 4),
                                   schedules.ExponentialBS(loader, 1.1),
                                   schedules.StepBS(loader, 2)], [5, 8])


def nested(loader):
    return schedules.SequentialBS([chained(loader), sequential(loader)], [6])


def ramp(loader):
    return schedules.RampBS(loader, "0:10 200:20 1K:45")


BUILDERS = {name: single(name) for name in FIXED} | {"Chained": chained, "Sequential": sequential,
                                                     "nested": nested, "RampBS": ramp}


def new_loader(batch_size=10):
    return DataLoader(range(500), batch_size=batch_size)


def metrics(step):
    return [1.0, 0.7, 0.9, 0.8, 0.8, 0.8, 0.5, 0.6, 0.6][step % 9]


def run_steps(schedule, steps):
    rows = []
    for step in steps:
        schedule.step(metrics=metrics(step), samples=schedule.batch_size)
        rows.append((schedule.batch_size, schedule.last_bs, schedule.finished))
    return rows


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 10_000
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("k", [0, 1, 4, 7, 12])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_resumed_run_equals_an_unbroken_one(name, k):
    unbroken = BUILDERS[name](new_loader())
    expected = run_steps(unbroken, range(2 * k + 3))

    old_loader = new_loader()
    first = BUILDERS[name](old_loader)
    rows = run_steps(first, range(k))
    state = through_a_file(first.state_dict())
    old_size = old_loader.batch_size

    loader = new_loader()
    second = BUILDERS[name](loader)
    second.load_state_dict(state)
    assert second.batch_size == first.batch_size
    assert second.finished == first.finished
    rows += run_steps(second, range(k, 2 * k + 3))
    assert rows == expected
    assert loader.batch_size == loader.batch_sampler.batch_size == second.batch_size
    assert len(next(iter(loader))) == min(second.batch_size, 500)
    assert old_loader.batch_size == old_size


@pytest.mark.parametrize("name", BUILDERS)
def test_hyperparameters_and_base_are_restored(name):
    """As in torch and bs-scheduler, the state wins over the constructor's arguments: here over the
    loader's size at the start."""
    first = BUILDERS[name](new_loader())
    run_steps(first, range(3))
    second = BUILDERS[name](new_loader(batch_size=13))
    second.load_state_dict(first.state_dict())
    assert run_steps(second, range(3, 15)) == run_steps(first, range(3, 15))


def test_loading_replaces_hyperparameters():
    first = schedules.StepBS(new_loader(), step_size=2, gamma=3.0, max_batch_size=400)
    second = schedules.StepBS(new_loader(), step_size=5, min_batch_size=10)
    second.load_state_dict(first.state_dict())
    assert (second.step_size, second.gamma, second.max_batch_size, second.min_batch_size) == (
        2, 3.0, 400, 1
    )


def test_loading_leaves_the_argument_as_it_was():
    schedule = BUILDERS["Sequential"](new_loader())
    state = schedule.state_dict()
    copy = through_a_file(state)
    schedule.load_state_dict(state)
    assert state == copy


def test_callable_objects_are_restored():
    first = schedules.LambdaBS(new_loader(), TableOfFactors([1.0, 2.0]))
    second = schedules.LambdaBS(new_loader(), TableOfFactors([1.0, 5.0]))
    second.load_state_dict(through_a_file(first.state_dict()))
    second.step()
    assert second.batch_size == 20


def test_scale_function_of_a_cycle_is_restored():
    first = schedules.CyclicBS(new_loader(), step_size_down=2, scale_fn=TableOfFactors([1.0, 0.5]))
    second = schedules.CyclicBS(new_loader(), step_size_down=2, scale_fn=TableOfFactors([0.1, 0.1]))
    second.load_state_dict(through_a_file(first.state_dict()))
    assert run_steps(second, range(8)) == run_steps(first, range(8))


def test_attributes_of_a_subclass_are_saved():
    class Growing(schedules.BSScheduler):
        def __init__(self, loader):
            self.amount = 3
            self.hook = print
            super().__init__(loader)

        def get_new_bs(self, **kwargs):
            self.amount += kwargs.get("more", 0)
            return self.batch_size + self.amount

    first = Growing(new_loader())
    first.step(more=4)
    assert first.batch_size == 10 + 3 + 7
    second = Growing(new_loader())
    second.load_state_dict(through_a_file(first.state_dict()))
    second.step()
    assert second.batch_size == 10 + 3 + 7 + 7


def test_bs_schedulers_state_holds_the_old_loader():
    """The defect: the state is as large as the data, and the schedule that loads it drives the old
    loader."""
    old, new = new_loader(), new_loader()
    first, second = bs_scheduler.StepBS(old, 1), bs_scheduler.StepBS(new, 1)
    second.load_state_dict(first.state_dict())
    second.step()
    assert old.batch_sampler.batch_size == 20
    assert new.batch_sampler.batch_size == 10


def test_states_that_do_not_fit():
    schedule = schedules.StepBS(new_loader(), 1)
    with pytest.raises(ValueError, match="version 99"):
        schedule.load_state_dict(schedule.state_dict() | {"version": 99})
    with pytest.raises(ValueError, match="ExponentialBS"):
        schedule.load_state_dict(schedules.ExponentialBS(new_loader(), 2.0).state_dict())
    with pytest.raises(ValueError, match="holds 2 schedules"):
        sequential(new_loader()).load_state_dict(chained(new_loader()).state_dict())
    assert schedule.batch_size == 10
