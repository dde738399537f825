"""The count of epochs."""


import pytest
from torch.utils.data import DataLoader

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from adabatch.scheduler.record import EpochCount
from tests.scripted import ones

LOADERS = {
    "loader": lambda n, **options: AdaptiveDataLoader(ones(n), 16, **options),
    "workers": lambda n, **options: AdaptiveDataLoader(ones(n), 16, num_workers=1, **options),
    "sampler": lambda n, **options: ResizableBatchSampler(n, 16, **options),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(("n", "drop_last", "per_epoch"), [
    (40, False, 3), (48, True, 3), (40, True, 2), (16, False, 1), (9, False, 1)
])
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
    assert [
        count.after_step() for _ in range(2) for _ in DataLoader(ones(40), batch_sampler=sampler)
    ] == [0, 0, 1, 1, 1, 2]
