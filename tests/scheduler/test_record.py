"""Spill wherever sizes fall short of the proposal, and the count of epochs."""

import math

import pytest
from torch.utils.data import DataLoader

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from adabatch.scheduler.record import EpochCount
from tests.scripted import Wishes, ones, slope_run, steps


def rows_and_moves(run, n_steps, **options):
    rows, moves = zip(*steps(*run, n_steps, **options), strict=True)
    return list(rows), list(moves)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_size_held_by_dwell_spills_what_it_lacks(scheduler_first):
    """Noise level ~ lr/size: it is 1/proposal from the step after the proposal, at the cap, below it, and while the size is held."""
    run = slope_run(Wishes(20, 40, 128, 128, 50), n=5000, on_limit="lower_lr", cooldown=3)
    rows, moves = rows_and_moves(run, 8, scheduler_first=scheduler_first)
    assert rows == [16, 20, 20, 20, 20, 50, 50, 50]
    assert moves == pytest.approx([1, 1, 20 / 40, 20 / 128, 20 / 128, 1, 1, 1], rel=1e-5)


def test_a_size_held_by_hysteresis_spills_what_it_lacks():
    run = slope_run(Wishes(18, 20, 22, 17, 66, 70), n=5000, on_limit="lower_lr", hysteresis=0.25)
    rows, moves = rows_and_moves(run, 7)
    assert rows == [16, 16, 16, 22, 22, 64, 64]
    assert moves == pytest.approx([1, 16 / 18, 16 / 20, 1, 1, 64 / 66, 64 / 70], rel=1e-5)


def test_rounding_is_no_spill():
    run = slope_run(Wishes(11.4, 11.6, 20.0), n=5000, on_limit="lower_lr", multiple_of=8)
    rows, moves = rows_and_moves(run, 4)
    assert rows == [16, 8, 8, 16]
    assert moves == pytest.approx([1.0] * 4, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_beyond_the_cap_has_the_noise_level_of_the_wish(workers):
    run = slope_run(Wishes(256), n=1000, on_limit="lower_lr", loader_options={"num_workers": workers}, short_batch="keep")
    moved = list(steps(*run, 6))
    asked = [size for size, _ in list(run[2].recent)[:6]]
    assert [move / size for (_, move), size in list(zip(moved, asked, strict=True))[1:]] == pytest.approx([1 / 256] * 5, rel=1e-5)


def test_an_infinite_wish_holds_the_last_spill():
    run = slope_run(Wishes(128, math.inf, math.inf, 64), n=5000, on_limit="lower_lr")
    assert rows_and_moves(run, 5)[1] == pytest.approx([1, 0.5, 0.5, 0.5, 1], rel=1e-5)


LOADERS = {
    "loader": lambda n, **options: AdaptiveDataLoader(ones(n), 16, **options),
    "workers": lambda n, **options: AdaptiveDataLoader(ones(n), 16, num_workers=1, **options),
    "sampler": lambda n, **options: ResizableBatchSampler(n, 16, **options),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(("n", "drop_last", "per_epoch"), [(40, False, 3), (48, True, 3), (40, True, 2), (16, False, 1), (9, False, 1)])
def test_an_epoch_ends_with_its_last_step(make, n, drop_last, per_epoch):
    loader = make(n, drop_last=drop_last)
    count = EpochCount(loader)
    counted = [count.after_step() for _ in range(3) for _ in loader]
    assert counted == [step // per_epoch for step in range(1, 3 * per_epoch + 1)]


def test_an_epoch_that_was_broken_off_ends_one_step_late():
    loader = AdaptiveDataLoader(ones(64), 16)
    count = EpochCount(loader)
    for _, _ in zip(range(1), loader, strict=False):
        assert count.after_step() == 0
    assert [count.after_step() for _ in loader] == [1, 1, 1, 2]


def test_leftovers_drawn_at_a_smaller_size_do_not_end_the_epoch_twice():
    loader = AdaptiveDataLoader(ones(40), 16, drop_last=True)
    count = EpochCount(loader)
    counted = []
    for _ in range(2):
        for _ in loader:
            counted.append(count.after_step())
            loader.batch_size = 4 if len(counted) == 2 else loader.batch_size
    assert counted == [0, 1, 1, 1] + [1] * 9 + [2]


def test_an_epoch_of_unknown_length_ends_one_step_late():
    class Endless:
        def __iter__(self):
            return iter(range(40))

    loader = AdaptiveDataLoader(ones(40), 16, sampler=Endless())
    count = EpochCount(loader)
    assert [count.after_step() for _ in range(2) for _ in loader] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_resumed_within_and_between_epochs(k):
    loader = AdaptiveDataLoader(ones(40), 16)
    count = EpochCount(loader)
    for _, _ in zip(range(k), loader, strict=False):
        count.after_step()
    state, position = count.state_dict(), loader.batch_sampler.state_dict()
    resumed = AdaptiveDataLoader(ones(40), 16)
    resumed.batch_sampler.load_state_dict(position)
    again = EpochCount(resumed)
    again.load_state_dict(state)
    counted = [again.after_step() for _ in range(2) for _ in resumed]
    assert counted[: 6 - k] == [step // 3 for step in range(k + 1, 7)]


def test_a_plain_loader_over_a_bare_sampler():
    sampler = ResizableBatchSampler(40, 16)
    count = EpochCount(sampler)
    assert [count.after_step() for _ in range(2) for _ in DataLoader(ones(40), batch_sampler=sampler)] == [0, 0, 1, 1, 1, 2]
