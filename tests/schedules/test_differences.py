"""Where adabatch.schedules departs from bs-scheduler on purpose; the numbers are those of the list
in its README (1, 2, 5 and 9: other files)."""

import bs_scheduler
import pytest
from torch.utils.data import DataLoader

from adabatch import schedules


def new_loader():
    return DataLoader(range(500), batch_size=10)


BAD_ARGUMENTS = [
    ("LambdaBS", {"bs_lambda": 2.0}, TypeError, "2.0"),
    ("MultiplicativeBS", {"bs_lambda": None}, TypeError, "None"),
    ("StepBS", {"step_size": 0}, ValueError, "0"),
    ("StepBS", {"step_size": 2.5}, TypeError, "2.5"),
    ("StepBS", {"step_size": True}, TypeError, "True"),
    ("StepBS", {"step_size": 1, "gamma": -2.0}, ValueError, "-2.0"),
    ("StepBS", {"step_size": 1, "gamma": float("inf")}, ValueError, "inf"),
    ("StepBS", {"step_size": 1, "gamma": "two"}, TypeError, "two"),
    ("MultiStepBS", {"milestones": 5}, TypeError, "5"),
    ("MultiStepBS", {"milestones": []}, ValueError, r"\[\]"),
    ("MultiStepBS", {"milestones": [3, 0]}, ValueError, r"milestones\[1\] .* got 0"),
    ("MultiStepBS", {"milestones": [3, 1.5]}, TypeError, "1.5"),
    ("ConstantBS", {"factor": 0}, ValueError, "0"),
    ("ConstantBS", {"factor": 2.0, "milestone": 0}, ValueError, "0"),
    ("LinearBS", {"start_factor": -1.0}, ValueError, "-1.0"),
    ("LinearBS", {"end_factor": 0.0}, ValueError, "0.0"),
    ("ExponentialBS", {"gamma": float("nan")}, ValueError, "nan"),
    ("PolynomialBS", {"total_iters": 1}, ValueError, "1"),
    ("PolynomialBS", {"total_iters": 5, "power": "two"}, TypeError, "two"),
    ("CosineAnnealingBS", {"total_iters": 1}, ValueError, "1"),
    ("CosineAnnealingBS", {"total_iters": 5, "max_batch_size": 10}, ValueError,
     r"below max_batch_size \(10\), got 10"),
    ("CosineAnnealingBS", {"total_iters": 5, "base_batch_size": 3, "min_batch_size": 5}, ValueError,
     ">= 5, got 3"),
    ("IncreaseBSOnPlateau", {"mode": "mid"}, ValueError, "'mid'"),
    ("IncreaseBSOnPlateau", {"threshold_mode": "log"}, ValueError, "'log'"),
    ("IncreaseBSOnPlateau", {"factor": 1.0}, ValueError, "1.0"),
    ("IncreaseBSOnPlateau", {"factor": -1.0}, ValueError, "-1.0"),
    ("IncreaseBSOnPlateau", {"patience": -1}, ValueError, "-1"),
    ("IncreaseBSOnPlateau", {"cooldown": 0.5}, TypeError, "0.5"),
    ("CyclicBS", {"mode": "square"}, ValueError, "'square'"),
    ("CyclicBS", {"scale_mode": "epoch"}, ValueError, "'epoch'"),
    ("CyclicBS", {"scale_fn": 3}, TypeError, "3"),
    ("CyclicBS", {"min_batch_size": 10}, ValueError, r"\(10\), got 10"),
    ("CosineAnnealingBSWithWarmRestarts", {"t_0": 0}, ValueError, "0"),
    ("CosineAnnealingBSWithWarmRestarts", {"t_0": 3, "factor": 1.5}, TypeError, "1.5"),
    ("OneCycleBS", {"total_steps": 10.0}, TypeError, "10.0"),
    ("OneCycleBS", {"total_steps": 10, "decay_percentage": 1.5}, ValueError, "1.5"),
    ("OneCycleBS", {"total_steps": 10, "decay_percentage": 1}, TypeError, "1"),
    ("OneCycleBS", {"total_steps": 10, "decay_percentage": 0.01}, ValueError, "without a step"),
    ("OneCycleBS", {"total_steps": 10, "strategy": "cubic"}, ValueError, "'cubic'"),
    ("OneCycleBS", {"total_steps": 10, "base_batch_size": 1}, ValueError, ">= 2, got 1"),
    ("StepBS", {"step_size": 1, "max_batch_size": 0}, ValueError, "0"),
    ("StepBS", {"step_size": 1, "max_batch_size": 8.0}, TypeError, "8.0"),
    ("StepBS", {"step_size": 1, "min_batch_size": 0}, ValueError, "0"),
    ("StepBS", {"step_size": 1, "min_batch_size": 9, "max_batch_size": 8}, ValueError,
     r"\(8\), got 9"),
    ("StepBS", {"step_size": 1, "batch_size_manager": "default"}, TypeError, "str"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "text"), BAD_ARGUMENTS)
def test_3_bad_arguments_raise_and_leave_the_loader_alone(name, arguments, error, text):
    loader = new_loader()
    with pytest.raises(error, match=text):
        getattr(schedules, name)(loader, **arguments)
    assert loader.batch_size == loader.batch_sampler.batch_size == 10


def test_3_a_bound_that_is_not_known_is_named_with_the_nearest_one():
    with pytest.raises(TypeError, match="'max_batchsize': did you mean max_batch_size="):
        schedules.StepBS(new_loader(), 1, max_batchsize=8)


def test_3_loaders_and_members():
    with pytest.raises(TypeError, match="list"):
        schedules.StepBS([1, 2], 1)
    with pytest.raises(ValueError, match="VirtualBatchSize"):
        schedules.StepBS(None, 1)
    with pytest.raises(TypeError, match="str"):
        schedules.DefaultBatchSizeManager("loader")
    with pytest.raises(ValueError, match="no batch sampler"):
        schedules.DefaultBatchSizeManager(DataLoader(range(5), batch_size=None))
    with pytest.raises(TypeError, match="int"):
        schedules.CustomBatchSizeManager(3)
    loader = new_loader()
    pair = [schedules.StepBS(loader, 1), schedules.StepBS(loader, 2)]
    foreign = schedules.StepBS(new_loader(), 1)
    held = schedules.StepBS(loader, 1, batch_size_manager=schedules.VirtualBatchSize(10))
    for build in (schedules.ChainedBSScheduler,
                  lambda members: schedules.SequentialBS(members, [3] * (len(members) - 1))):
        with pytest.raises(TypeError, match="int"):
            build([pair[0], 3])
        with pytest.raises(ValueError, match="one loader"):
            build([pair[0], foreign])
        with pytest.raises(ValueError, match="VirtualBatchSize"):
            build([pair[0], held])
    with pytest.raises(TypeError, match="list or tuple of schedules, got StepBS"):
        schedules.ChainedBSScheduler(pair[0])
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        schedules.SequentialBS([*pair, schedules.StepBS(loader, 1)], [4, 3])
    with pytest.raises(ValueError, match="1 milestones, got 2"):
        schedules.SequentialBS(pair, [3, 4])


def test_3_plateau_needs_its_metric():
    for package in (schedules, bs_scheduler):
        with pytest.raises(TypeError, match="metrics"):
            package.IncreaseBSOnPlateau(new_loader()).step(metric=1.0)


def test_3_sizes_that_are_not_finite():
    for factor, error in ((float("nan"), ValueError), (float("inf"), OverflowError)):
        for package in (schedules, bs_scheduler):
            factors = [1, factor]
            schedule = package.LambdaBS(new_loader(), factors.__getitem__)
            with pytest.raises(error):
                schedule.step()


@pytest.mark.parametrize("kind", [schedules.LambdaBS, schedules.MultiplicativeBS])
@pytest.mark.parametrize("factor", [None, "2"])
def test_3_factors_that_are_no_numbers(kind, factor):
    with pytest.raises(TypeError, match="bs_lambda must return a number, got"):
        kind(DataLoader(range(100), 8), lambda epoch: factor)


def test_4_an_empty_batch():
    bs_scheduler.StepBS(new_loader(), step_size=1, min_batch_size=0)
    with pytest.raises(ValueError, match="min_batch_size"):
        schedules.StepBS(new_loader(), step_size=1, min_batch_size=0)


def test_6_many_cycles():
    arguments = {"step_size_down": 1, "mode": "triangular2"}
    theirs = bs_scheduler.CyclicBS(new_loader(), **arguments)
    ours = schedules.CyclicBS(new_loader(), **arguments)
    for _ in range(2047):
        theirs.step()
        ours.step()
        assert ours.batch_size == theirs.batch_size
    with pytest.raises(OverflowError):
        theirs.step()
    for _ in range(2):
        ours.step()
    assert ours.batch_size == 10


def test_7_sequential_inside_sequential():
    """Three constant sizes and a doubling, by hand; bs-scheduler omits the first factor and divides
    by it later."""

    def sizes(package):
        loader = new_loader()
        inner = package.SequentialBS([package.ConstantBS(loader, 4.0, 2),
                                      package.StepBS(loader, 100)], [3])
        schedule = package.SequentialBS([inner, package.StepBS(loader, 2)], [5])
        rows = [schedule.batch_size]
        for _ in range(7):
            schedule.step()
            rows.append(schedule.batch_size)
        return rows

    assert sizes(schedules) == [40, 40, 10, 10, 10, 10, 20, 20]
    assert sizes(bs_scheduler)[:3] == [10, 10, 2]


def test_7_chained_inside_sequential():
    def build(package):
        loader = new_loader()
        inner = package.ChainedBSScheduler([package.ConstantBS(loader, 4.0, 2),
                                            package.StepBS(loader, 1)])
        return package.SequentialBS([inner, package.StepBS(loader, 2)], [3])

    with pytest.raises(AttributeError):
        build(bs_scheduler)
    schedule = build(schedules)
    rows = [schedule.batch_size]
    for _ in range(5):
        schedule.step()
        rows.append(schedule.batch_size)
    assert rows == [40, 80, 40, 40, 80, 80]


def test_8_milestones_are_required():
    loader = new_loader()
    with pytest.raises(TypeError, match="milestones"):
        schedules.SequentialBS([schedules.StepBS(loader, 1), schedules.StepBS(loader, 2)])


def test_names_are_those_of_bs_scheduler():
    assert set(bs_scheduler.__all__) <= set(schedules.__all__)
