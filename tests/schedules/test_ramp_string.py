"""Ramps: strings, increments, doubling; divisibility when a size is used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from adabatch.schedules import (
    RampBS,
    VirtualBatchSize,
    check_divisible,
    doubling_ramp,
    increment_ramp,
    parse_count,
    parse_ramp,
    stepwise_ramp,
)

MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def test_a_ramp_as_a_string():
    billion = 10**9
    assert parse_ramp("0:768 250B:1536 500B:3072") == [(0, 768), (250 * billion, 1536),
                                                       (500 * billion, 3072)]
    ramp = stepwise_ramp("0:768 250B:1536 500B:3072")
    assert [ramp(n) for n in (
        0, 250 * billion - 1, 250 * billion, 499 * billion, 500 * billion, 10**15
    )] == [768, 768, 1536, 1536, 3072, 3072]


@pytest.mark.parametrize(("text", "count"), [("7", 7), ("3k", 3000), ("1.5M", 1_500_000),
                                             ("0.25B", 250_000_000), ("2T", 2 * 10**12),
                                             (" 5K ", 5000)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-3", "1.5", "1e9", "3 K", "5G", "0.0001K", "1,000"])
def test_counts_refused(text):
    with pytest.raises(ValueError, match="count must be a whole number"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "768", "5:768", "0:768 0:1536", "0:768 2K:1 1K:2", "0:0",
                                  "0:768:3", "0:big", "0:1.5"])
def test_ramps_refused(text):
    with pytest.raises(ValueError, match=r"got"):
        parse_ramp(text)


def test_ramps_of_another_type_are_refused():
    with pytest.raises(TypeError, match="768"):
        parse_ramp(768)
    with pytest.raises(TypeError, match="768"):
        RampBS(None, 768, batch_size_manager=VirtualBatchSize(1))


@MANY
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=5),
       st.integers(0, 300))
def test_the_last_size_reached_holds(gaps, seen):
    starts = [sum(gap for gap, _ in gaps[:i]) for i in range(len(gaps))]
    text = ", ".join(f"{start}:{size}" for start, (_, size) in zip(starts, gaps, strict=True))
    expected = next(size for start, (_, size) in reversed(list(zip(starts, gaps, strict=True)))
                    if start <= seen)
    assert stepwise_ramp(text)(seen) == expected


@MANY
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 12), st.integers(1, 500))
def test_increments_come_at_even_distances(start, increment, steps, samples):
    """The k-th of n increments comes at the first count of at least k · samples / n."""
    ramp = increment_ramp(start, increment, samples, start + steps * increment)
    assert ramp(0) == start
    for k in range(1, steps + 1):
        due = -(-k * samples // steps)
        assert ramp(due) >= start + k * increment
        assert ramp(due - 1) < start + k * increment
    assert ramp(samples) == ramp(10 * samples) == start + steps * increment


def test_doubling():
    ramp = doubling_ramp(8, [30, 10], factor=4)
    assert [ramp(n) for n in (0, 9, 10, 29, 30, 99)] == [8, 8, 32, 32, 128, 128]


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: increment_ramp(32, 15, 1000, 64), ValueError, "64 - 32 = 32"),
        (lambda: increment_ramp(32, 16, 1000, 16), ValueError, ">= 32, got 16"),
        (lambda: increment_ramp(32, 0, 1000, 64), ValueError, "increment"),
        (lambda: increment_ramp(32.0, 16, 1000, 64), TypeError, "32.0"),
        (lambda: doubling_ramp(0, [5]), ValueError, "start"),
        (lambda: doubling_ramp(4, [0]), ValueError, "got 0"),
        (lambda: doubling_ramp(4, 5), TypeError, "5"),
        (lambda: check_divisible(100, 8, 4), ValueError, "not a multiple of 32.*96, 128"),
        (lambda: check_divisible(20, 8, 4), ValueError, "nearest are: 32"),
    ],
)
def test_bad_arguments(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_divisibility_is_checked_when_a_size_is_used():
    """The middle size fits no eight processes: a run that never uses it there continues."""
    held = VirtualBatchSize(64)
    schedule = RampBS(None, "0:64 1K:100 2K:128", world_size=8, batch_size_manager=held)
    schedule.step(samples=999)
    with pytest.raises(ValueError, match="100 is not a multiple of 8"):
        schedule.step(samples=1)
    schedule.step(samples=1000)
    assert held.get_current_batch_size() == 128

    on_four = RampBS(None, "0:64 1K:100 2K:128", world_size=4,
                     batch_size_manager=VirtualBatchSize(64))
    on_four.step(samples=1500)
    on_eight = RampBS(None, "0:64 1K:100 2K:128", world_size=8,
                      batch_size_manager=VirtualBatchSize(64))
    with pytest.raises(ValueError, match="100 is not a multiple of 8"):
        on_eight.load_state_dict(on_four.state_dict())
    on_four.step(samples=500)
    on_eight.load_state_dict(on_four.state_dict())
    assert (on_eight.batch_size, on_eight.world_size, on_eight.samples_seen) == (128, 8, 2000)


def test_a_clipped_size_is_the_one_checked():
    with pytest.raises(ValueError, match="90 is not a multiple of 8"):
        RampBS(None, "0:96", world_size=8, batch_size_manager=VirtualBatchSize(64),
               max_batch_size=90)


def test_over_a_loader_in_tokens():
    """Samples of 10 tokens: the ramp's 1K tokens are 100 samples."""
    loader = DataLoader(range(1000), batch_size=5, drop_last=True)
    schedule = RampBS(loader, "0:20 1K:50", tokens_per_sample=10)
    lengths = []
    for batch in loader:
        lengths.append(len(batch))
        schedule.step(samples=len(batch))
    assert lengths == [20] * 5 + [50] * 18
    with pytest.raises(TypeError, match="samples"):
        schedule.step()
    with pytest.raises(ValueError, match="-1"):
        schedule.step(samples=-1)
