"""From proposals to sizes: properties that must hold for every proposal and every bound."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import adabatch
from adabatch.config import BatchSizes
from adabatch.controllers import CABS, AtMost, NoiseScale, NormTest
from adabatch.estimators.moments import GradientMoments
from adabatch.scheduler.decision import SizeRule, call_controller
from adabatch.scheduler.record import StepRecord

proposals = st.floats(allow_nan=False)
counts = st.integers(1, 5000)


@st.composite
def rules(draw, **options):
    minimum, span, multiple_of = draw(counts), draw(st.integers(0, 5000)), draw(st.integers(1, 70))
    assume(-(-minimum // multiple_of) * multiple_of <= minimum + span)
    return SizeRule(minimum, minimum + span, multiple_of=multiple_of, **options)


@given(rules(), proposals)
def test_sizes_are_multiples_within_the_bounds(rule, proposal):
    size = rule.size_for(proposal)
    assert type(size) is int
    assert rule.minimum <= size <= rule.maximum
    assert size % rule.multiple_of == 0


@given(rules(), st.floats(-1e4, 2e4))
def test_no_allowed_size_is_nearer_to_the_proposal(rule, proposal):
    allowed = range(rule.lowest, rule.highest + 1, rule.multiple_of)
    # proposal / multiple is a float: where it rounds to a tie, the tie's even side may lie farther
    # away by that rounding.
    slack = Fraction(proposal) * Fraction(2) ** -52
    assert abs(rule.size_for(proposal) - Fraction(proposal)) <= min(
        abs(size - Fraction(proposal)) for size in allowed
    ) + abs(slack)


@given(st.floats(-100, 3000))
def test_rounds_half_to_even_then_clips(proposal):
    assert SizeRule(16, 2048).size_for(proposal) == int(np.clip(np.rint(proposal), 16, 2048))


@given(st.integers(0, 4000), st.integers(1, 64))
def test_ties_go_to_even_multiples(k, multiple_of):
    tie = (k + 0.5) * multiple_of
    nearest = k + k % 2
    assert SizeRule(1, 10**6, multiple_of=multiple_of).size_for(tie) == max(nearest,
                                                                            1) * multiple_of


@given(rules(), proposals, proposals)
def test_a_larger_proposal_never_gets_a_smaller_size(rule, one, other):
    low, high = sorted((one, other))
    assert rule.size_for(low) <= rule.size_for(high)


@given(rules())
def test_an_allowed_size_is_kept_as_it_is(rule):
    for size in (rule.lowest, rule.highest):
        assert rule.size_for(size) == size
    assert rule.size_for(math.inf) == rule.highest
    assert rule.size_for(-math.inf) == rule.lowest


def test_a_nan_proposal_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        SizeRule(1, 2).size_for(math.nan)


@given(rules(), proposals, proposals)
def test_a_proposal_is_met_by_its_own_size_unless_the_maximum_lies_below(rule, proposal, other):
    assert rule.is_met(proposal, rule.size_for(proposal)) == (proposal <= rule.highest)
    held = rule.size_for(other)
    assert rule.is_met(proposal, held) == (
        proposal <= rule.highest and held >= rule.size_for(proposal)
    )


@given(rules(cooldown=3), proposals, st.integers(0, 10))
def test_cooldown_holds_the_size(rule, proposal, waited):
    expected = rule.lowest if waited < 3 else rule.size_for(proposal)
    assert rule.next_size(proposal, rule.lowest, waited) == expected


@given(st.integers(16, 2048), st.floats(1, 4000), st.floats(0, 1, exclude_max=True))
def test_hysteresis_keeps_the_size_within_the_relative_change(present, proposal, hysteresis):
    rule = SizeRule(16, 2048, hysteresis=hysteresis)
    size, plain = rule.next_size(proposal, present, 0), SizeRule(16, 2048).size_for(proposal)
    assert size == (
        present if Fraction(abs(plain - present), present) <= Fraction(hysteresis) else plain
    ) or math.isclose(
        abs(plain - present), hysteresis * present
    )


@pytest.mark.parametrize(("proposal", "size"),
                         [(100, 100), (109, 100), (110, 100), (111, 111), (90, 100), (89, 89)])
def test_hysteresis_by_hand(proposal, size):
    assert SizeRule(1, 1000, hysteresis=0.1).next_size(proposal, 100, 0) == size


@given(rules(hysteresis=0.5), counts, proposals)
def test_a_present_size_that_is_not_allowed_is_left_at_once(rule, present, proposal):
    size = rule.next_size(proposal, present, 0)
    assert rule.size_for(size) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minimum": 0}, "minimum must be a positive integer, got 0"),
        ({"minimum": 2.0}, "minimum must be a positive integer, got 2.0"),
        ({"maximum": True}, "maximum must be a positive integer, got True"),
        ({"minimum": 32, "maximum": 16}, r"minimum \(32\) must not exceed maximum \(16\)"),
        ({"multiple_of": 0}, "multiple_of must be a positive integer, got 0"),
        ({"minimum": 17, "maximum": 31, "multiple_of": 16},
         r"no multiple of 16 lies between minimum \(17\) and maximum \(31\)"),
        ({"cooldown": -1}, "cooldown must be an integer >= 0, got -1"),
        ({"cooldown": 1.5}, "cooldown must be an integer >= 0, got 1.5"),
        ({"cooldown": math.nan}, "cooldown must be an integer >= 0, got nan"),
        ({"cooldown": "2"}, "cooldown must be an integer >= 0, got '2'"),
        ({"hysteresis": -0.1}, "hysteresis must be a number >= 0 and < 1, .* got -0.1"),
        ({"hysteresis": math.nan}, "hysteresis must be a number >= 0 and < 1, .* got nan"),
        ({"hysteresis": math.inf}, "hysteresis must be a number >= 0 and < 1, .* got inf"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SizeRule(**{"minimum": 16, "maximum": 2048, **arguments})


@given(rules(), st.integers(1, 6), st.integers(1, 6000))
def test_steps_of_equal_batches_no_larger_than_an_epoch(rule, accumulate, epoch):
    try:
        plain = SizeRule.for_steps(rule, accumulate, None, drop_last=False)
    except ValueError:  # no common multiple within the bounds
        return
    assert (plain.minimum, plain.maximum) == (rule.minimum, rule.maximum)
    assert plain.multiple_of % rule.multiple_of == plain.multiple_of % accumulate == 0
    bounded = SizeRule.for_steps(plain, 1, epoch * accumulate, drop_last=False)
    assert bounded == SizeRule.for_steps(rule, accumulate, epoch, drop_last=False)
    assert bounded.highest <= max(epoch * accumulate, plain.lowest)
    if plain.lowest > epoch * accumulate:
        with pytest.raises(ValueError, match="no batch would ever be drawn"):
            SizeRule.for_steps(rule, accumulate, epoch, drop_last=True)
    else:
        assert SizeRule.for_steps(rule, accumulate, epoch, drop_last=True) == bounded


# A series of sizes


@st.composite
def rules_of_series(draw):
    return draw(rules(size_ratio=draw(st.floats(1.01, 4.0)), hysteresis=draw(st.floats(0, 0.5))))


@given(rules_of_series(), proposals)
def test_sizes_are_those_of_the_series(rule, proposal):
    sizes = rule.series
    assert (sizes[0], sizes[-1]) == (rule.lowest, rule.highest)
    assert all(low < high for low, high in pairwise(sizes))
    assert all(size % rule.multiple_of == 0 for size in sizes)
    assert rule.size_for(proposal) in sizes
    assert all(rule.size_for(size) == size for size in sizes)


@given(rules_of_series(), st.floats(1, 2e4))
def test_no_size_is_nearer_by_ratio(rule, proposal):
    chosen = abs(math.log(rule.size_for(proposal) / proposal))
    assert chosen <= min(abs(math.log(size / proposal)) for size in rule.series) + 1e-9


def test_a_series_has_few_sizes():
    rule = SizeRule(16, 2048, size_ratio=1.25)
    assert len(rule.series) == 23
    assert max(high / low for low, high in pairwise(rule.series)) < 1.29
    assert SizeRule(1, 8, size_ratio=1.25).series == (1, 2, 3, 4, 5, 6, 8)
    assert SizeRule(10, 100, multiple_of=8, size_ratio=1.5).series == (16, 24, 32, 56, 80, 96)


def test_hysteresis_keeps_a_ladder_from_fluttering():
    rule = SizeRule(16, 2048, size_ratio=1.25, hysteresis=0.05)
    low, high = rule.series[8:10]
    middle = math.sqrt(low * high)
    sizes, size = [], low
    for step in range(40):
        size = rule.next_size(middle * (1.04 if step % 2 else 0.96), size, step)
        sizes.append(size)
    assert set(sizes) == {low}
    assert rule.next_size(1.2 * middle, low, 1) == high
    assert rule.next_size(0.8 * middle, high, 1) == low


@pytest.mark.parametrize("size_ratio", [1.0, 0.5, math.inf, math.nan])
def test_a_wrong_ladder(size_ratio):
    with pytest.raises(ValueError, match="size_ratio must be a number > 1"):
        SizeRule(16, 2048, size_ratio=size_ratio)


@pytest.mark.parametrize("controller", [adabatch.CABS, adabatch.controllers.NoiseScale])
@pytest.mark.parametrize("first", [1, 16])
def test_a_measured_size_never_becomes_one(controller, first):
    """A batch of one has no variance, from which nothing would lead to a larger one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=first)
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, controller=controller(), batch_sizes=(1, 32), measure="all")
    sizes = []
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            sizes.append(scheduler.get_last_batch_size())
    assert min(sizes) >= 2
    scheduler.remove()
    with pytest.raises(ValueError, match="at least 2"):
        adabatch.wrap(model, torch.optim.SGD(model.parameters(), lr=1e-4),
                      torch.utils.data.DataLoader(data), batch_sizes=(1, 1))


def test_a_size_that_is_not_measured_may_be_one():
    model = torch.nn.Linear(4, 1)
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=1)
    scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1e-4), loader, batch_sizes=(1, 1),
        controller=adabatch.controllers.Scheduled("0:1"))[2]
    assert scheduler.size_rule.bounds == (1, 1)


@pytest.mark.parametrize(("sizes", "accumulate", "lower"), [
    (BatchSizes(1, 8000, multiple_of=2000), 1, "multiple_of=2000"),
    (BatchSizes(2000, 8000), 1, "the minimum of batch_sizes"),
    (BatchSizes(2000, 8000, multiple_of=2000), 1, "the minimum of batch_sizes and multiple_of="),
    (BatchSizes(1, 8000, multiple_of=4000), 2, "multiple_of=4000"),
])
def test_what_makes_the_smallest_batch_larger_than_an_epoch_is_named(sizes, accumulate, lower):
    with pytest.raises(ValueError, match=f"ever be drawn: lower {lower}"):
        SizeRule.for_steps(sizes, accumulate, 1797, drop_last=True)
    with pytest.warns(UserWarning, match=f"Lower {lower}"):
        SizeRule.for_steps(sizes, accumulate, 1797, drop_last=False)


@pytest.mark.parametrize(("sizes", "accumulate", "named"), [
    (BatchSizes(16, 17), 7, r"multiple of 7 \(accumulate=7\)"),
    (BatchSizes(16, 19, multiple_of=4), 3, r"of 12 \(multiple_of=4 and accumulate=3\)"),
])
def test_what_leaves_no_size_is_named(sizes, accumulate, named):
    with pytest.raises(ValueError, match=named):
        SizeRule.for_steps(sizes, accumulate, None, drop_last=False)


def moments_of(trace, m=16):
    """T = trace exactly, and Ĝ² = 1."""
    square = 1.0 + trace / m
    norms = torch.full((m,), trace * (1 - 1 / m) + square, dtype=torch.float64)
    return GradientMoments(m, norms, square)


@pytest.mark.parametrize(("every", "decay"), [(1, 0.95), (2, 0.95**2), (10, 0.9), (50, 0.9)])
@pytest.mark.parametrize("make", [CABS, NoiseScale, NormTest, lambda: AtMost(CABS(), 1e9)],
                         ids=["CABS", "NoiseScale", "NormTest", "inside another"])
def test_sparse_measuring_keeps_the_horizon_in_steps(make, every, decay):
    """After a jump of the noise from T = 1 to 4 half the way is gone after ln 2/ln(1/μ) values."""
    rule, jump, proposals, reached = make(), 400 * every, [], None
    for step in range(jump + 100 * every):
        trace = 1.0 if step < jump else 4.0
        seen = StepRecord(step, 1.0, None, delivered=16, batch_size=16, lrs=[0.1], base_lr=0.1,
                          epoch=0, seconds=1.0)
        found = moments_of(trace) if step % every == 0 else None
        proposal = call_controller(rule, seen, found, samples=16, loss=1.0, lr=0.1,
                                   spacing=every)
        if found is not None:
            proposals.append(proposal)
            if reached is None and proposal >= 2.5 * proposals[0] * (1 - 1e-9):
                reached = step - jump
    values = math.ceil(math.log(2) / -math.log(decay) - 1e-9)
    assert reached == (values - 1) * every
    assert proposals[-1] == pytest.approx(4 * proposals[0], rel=0.01)


def test_a_run_tells_its_controller_the_spacing():
    told = []

    class Listening(NoiseScale):
        def on_measurement(self, *, steps):
            told.append(steps)

    model = torch.nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.randn(256, 2))
    optimizer, loader, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.01),
        torch.utils.data.DataLoader(data, batch_size=16), controller=Listening(),
        batch_sizes=(16, 16), measure=adabatch.Every(5))
    for (inputs,) in loader:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert told == [1, 5, 5, 5]
