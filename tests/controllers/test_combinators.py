"""Combinators: properties that hold whatever the parts proposal."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch.controllers import (
    CABS,
    AdaDamp,
    Annealed,
    AtLeast,
    AtMost,
    Average,
    InnerProductTest,
    Monotone,
    NoiseScale,
    PadaDamp,
    Warmup,
)
from tests.scripted import Proposals

proposal = st.floats(0, 1e9) | st.just(math.inf)
proposals = st.lists(proposal, min_size=1, max_size=12)
positive = st.floats(0.5, 1e9)


def proposals_of(controller, steps, samples=16):
    given_ = []
    for _ in range(steps):
        controller.on_step(samples=samples, epoch=0)
        given_.append(controller.propose(None, loss=1.0, lr=0.1))
    return given_


@given(proposals, proposals, positive)
def test_bounds_are_the_largest_and_the_smallest(one, two, number):
    steps = max(len(one), len(two))
    first, second = (one + one[-1:] * steps)[:steps], (two + two[-1:] * steps)[:steps]
    assert proposals_of(AtLeast(Proposals(*one), number, Proposals(*two)), steps) == [
        max(a, number, b) for a, b in zip(first, second, strict=True)
    ]
    assert proposals_of(AtMost(Proposals(*one), number, Proposals(*two)), steps) == [
        min(a, number, b) for a, b in zip(first, second, strict=True)
    ]


@given(proposal, proposal, positive, positive)
def test_the_average_lies_between_and_is_weighted(one, two, weight_one, weight_two):
    mean = Average(Proposals(one), Proposals(two),
                   weights=(weight_one, weight_two)).propose(None, loss=1.0, lr=0.1)
    assert min(one, two) * (1 - 1e-12) <= mean <= max(one, two) * (1 + 1e-12)
    if one == two:
        assert mean == pytest.approx(one)
    elif math.isfinite(mean):
        assert mean == pytest.approx((weight_one * one + weight_two * two)
                                     / (weight_one + weight_two))


@given(proposals, st.integers(1, 1000))
def test_monotone_never_shrinks_and_never_exceeds_what_was_proposed_or_used(one, samples):
    got = proposals_of(Monotone(Proposals(*one)), len(one), samples)
    assert got == sorted(got)
    assert got == [max(samples, *one[: n + 1]) for n in range(len(one))]


@given(proposals, st.floats(1.01, 4), st.integers(1, 1000), st.integers(1, 1000))
def test_warmup_limits_growth_and_falls_at_once(one, growth, pace, samples):
    got = proposals_of(Warmup(Proposals(*one), growth=growth, samples=pace), len(one), samples)
    before = 0.0
    for now, proposed in zip(got, one, strict=True):
        limit = 10 ** min(300.0,
                          math.log10(max(before, samples)) + samples / pace * math.log10(growth))
        assert now == pytest.approx(min(proposed, limit), rel=1e-9)
        before = now


def test_warmup_over_many_steps_grows_by_its_factor_per_samples():
    rule = Warmup(1e12, growth=2.0, samples=160)
    assert proposals_of(rule, 30, samples=16)[-1] == pytest.approx(16 * 2**3)


@settings(max_examples=20)
@given(st.sampled_from([AtLeast, AtMost, Monotone, Warmup]))
def test_needs_and_first_sizes_are_those_of_the_children(make):
    assert make(InnerProductTest()).requires == {"inner_products"}
    assert make(CABS()).needs_effective_lr
    assert not make(NoiseScale()).needs_effective_lr
    assert make(NoiseScale()).needs_moments
    assert not make(PadaDamp(16, 1.0)).needs_moments
    assert make(AdaDamp(24)).first_batch_size == 24
    assert make(NoiseScale()).first_batch_size is None
    annealed = make(Annealed(100, 16, rule="linear"))
    annealed.on_step(samples=50, epoch=0)
    assert annealed.lr_factor()(16) == 0.5
    assert make(CABS()).lr_factor() is None


def test_nan_is_passed_through():
    for make in (Monotone, Warmup):
        rule = make(Proposals(math.nan, 20.0))
        assert math.isnan(proposals_of(rule, 1)[0])
        assert make is not Monotone or proposals_of(rule, 1) == [20.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (AtLeast, "at least one controller or number"),
        (lambda: AtMost(-3), "size must be a positive number, got -3"),
        (lambda: Average(1, 2, weights=(1,)),
         "weights must have one number for each of the 2 operands, got 1"),
        (lambda: Average(1, 2, weights=(1, 0)), "weight must be a positive number, got 0"),
        (lambda: Warmup(CABS(), growth=1.0), "growth must be a number above 1, got 1.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_children_is_refused():
    with pytest.raises(ValueError, match="has 1 children, not 2"):
        AtLeast(CABS(), NoiseScale()).load_state_dict(AtLeast(CABS()).state_dict())
