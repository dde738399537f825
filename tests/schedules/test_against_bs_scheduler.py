"""Sizes, flags and kinds of errors against bs-scheduler, over random arguments and random
interference with the batch size."""

import warnings

import bs_scheduler
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from adabatch import schedules
from tests.schedules.cases import BOUNDS, SOUND, UNSOUND

COMPARE = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ALLOWED = {AssertionError: (ValueError, TypeError)}


@st.composite
def histories(draw):
    """What happens to a schedule: steps with a metric, and sizes set by others in between."""
    metric = st.floats(-2.0, 2.0)
    return draw(st.lists(st.tuples(st.just("step"), metric) | st.tuples(st.just("step"), metric)
                         | st.tuples(st.just("set"), st.integers(1, 80)), max_size=40))


REQUIRED = {
    "LambdaBS": ["bs_lambda"],
    "MultiplicativeBS": ["bs_lambda"],
    "StepBS": ["step_size"],
    "MultiStepBS": ["milestones"],
    "ConstantBS": ["factor"],
    "ExponentialBS": ["gamma"],
    "PolynomialBS": ["total_iters"],
    "CosineAnnealingBS": ["total_iters"],
    "CosineAnnealingBSWithWarmRestarts": ["t_0"],
    "OneCycleBS": ["total_steps"],
}


def keyword_arguments(name):
    strategies = SOUND[name] | BOUNDS
    required = {key: strategies.pop(key) for key in REQUIRED.get(name, [])}
    return st.fixed_dictionaries(required, optional=strategies)


@st.composite
def with_one_unsound(draw, name):
    """One argument at a time: of two wrong ones either may be reported first."""
    # bs-scheduler checks a power only in the first step that uses it, and accepts a minimum of 0.
    key = draw(st.sampled_from([key for key in [*SOUND[name], *BOUNDS] if key != "power"]))
    unsound = UNSOUND.filter(lambda value: value != 0) if key == "min_batch_size" else UNSOUND
    arguments = draw(keyword_arguments(name))
    if (arguments.get("max_batch_size") or 300) < arguments.get("min_batch_size", 1):
        del arguments["min_batch_size"]
    return arguments | {key: draw(unsound)}


def record(schedule, loader, history):
    """(loader's size, schedule's size, last_bs, finished) after the construction and after each
    event."""
    rows = [(loader.batch_size, schedule.batch_size, schedule.last_bs, schedule.finished)]
    for event, value in history:
        if event == "step":
            schedule.step(metrics=value)
        else:
            schedule.set_batch_size(value)
        rows.append((loader.batch_size, schedule.batch_size, schedule.last_bs, schedule.finished))
    return rows


def outcome(build, history, length, batch_size):
    """The record, or the error."""
    loader = DataLoader(range(length), batch_size=batch_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return record(build(loader), loader, history)
    except Exception as error:  # the kind of any error is what is compared
        return error


def assert_same(build_theirs, build_ours, history, length, batch_size):
    theirs = outcome(build_theirs, history, length, batch_size)
    ours = outcome(build_ours, history, length, batch_size)
    if isinstance(theirs, Exception):
        assert isinstance(ours, ALLOWED.get(type(theirs), type(theirs))), (theirs, ours)
        assert str(ours)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", SOUND)
def test_sizes_and_flags_are_those_of_bs_scheduler(name):
    @COMPARE
    @given(keyword_arguments(name), histories(), st.integers(20, 300), st.integers(1, 60))
    def compare(arguments, history, length, batch_size):
        assert_same(lambda x: getattr(bs_scheduler, name)(x, **arguments),
                    lambda x: getattr(schedules, name)(x, **arguments), history, length, batch_size)

    compare()


@pytest.mark.parametrize("name", SOUND)
def test_unsound_arguments_are_refused_where_bs_scheduler_refuses_them(name):
    @COMPARE
    @given(with_one_unsound(name), histories())
    def compare(arguments, history):
        assert_same(lambda x: getattr(bs_scheduler, name)(x, **arguments),
                    lambda x: getattr(schedules, name)(x, **arguments), history, 200, 10)

    compare()


members = st.lists(
    st.sampled_from(sorted(SOUND)).flatmap(
        lambda name: st.tuples(st.just(name), keyword_arguments(name))
    ), min_size=1, max_size=3
)


def build_all(package, specifications, loader):
    return [getattr(package, name)(loader, **arguments) for name, arguments in specifications]


@COMPARE
@given(members, histories(), st.integers(1, 60))
def test_chained_sizes_and_flags_are_those_of_bs_scheduler(specifications, history, batch_size):
    assert_same(
        lambda loader: bs_scheduler.ChainedBSScheduler(
            build_all(bs_scheduler, specifications, loader)
        ),
        lambda loader: schedules.ChainedBSScheduler(build_all(schedules, specifications, loader)),
        history,
        300,
        batch_size,
    )


@COMPARE
@given(members, st.lists(st.integers(0, 15), max_size=3), st.booleans(), histories(),
       st.integers(1, 60))
def test_sequential_sizes_and_flags_are_those_of_bs_scheduler(specifications, milestones, in_order,
                                                              history, batch_size):
    milestones = sorted(milestones) if in_order else milestones
    assert_same(
        lambda loader: bs_scheduler.SequentialBS(build_all(bs_scheduler, specifications, loader),
                                                 milestones),
        lambda loader: schedules.SequentialBS(build_all(schedules, specifications, loader),
                                              milestones),
        history,
        300,
        batch_size,
    )


@COMPARE
@given(members.filter(lambda chosen: len(chosen) > 1),
       st.lists(st.integers(1, 15), min_size=2, max_size=2), histories(), st.integers(1, 60))
def test_sequential_of_matching_length(specifications, milestones, history, batch_size):
    milestones = sorted(milestones)[: len(specifications) - 1]
    assert_same(
        lambda loader: bs_scheduler.SequentialBS(build_all(bs_scheduler, specifications, loader),
                                                 milestones),
        lambda loader: schedules.SequentialBS(build_all(schedules, specifications, loader),
                                              milestones),
        history,
        300,
        batch_size,
    )
