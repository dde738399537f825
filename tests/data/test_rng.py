"""Random augmentation depends on seed, epoch and position, not on workers, sizes, resuming."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from adabatch import AdaptiveDataLoader
from adabatch.data.rng import mix, sample_keys, splitmix64, words
from tests.data.streams import Augmented, Counting, Numbers


def draws(workers=0, sizes=(4,), seed=1, epochs=2, stop=None, state=None, dataset=None, **options):
    options = {"seed_samples": True, **options}
    dataset = dataset or Augmented(30)
    loader = AdaptiveDataLoader(dataset, sizes[0], True, seed=seed, num_workers=workers, **options)
    if state is not None:
        loader.load_state_dict(state)
    rows = []
    while loader.batch_sampler.epoch < epochs:
        for index, batch in enumerate(loader, start=1):
            rows += list(zip(*(column.tolist() for column in batch), strict=True))
            loader.batch_size = sizes[min(index, len(sizes) - 1)]
            if stop == index:
                return rows, loader.state_dict()
    return rows


def test_workers_and_sizes_do_not_matter_and_seed_and_epoch_do():
    expected = draws()
    assert len(set(expected)) == 60
    for workers, sizes in ((0, (7, 1, 20)), (1, (4,)), (2, (5, 2, 9, 30))):
        assert draws(workers, sizes) == expected
    assert not {row[1:] for row in draws(seed=2)} & {row[1:] for row in expected}
    assert [len(set(column)) for column in zip(*expected, strict=True)] == [30, 60, 60, 60]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_repeats_it(workers):
    head, state = draws(workers, (4, 6), stop=3)
    assert head + draws(2 - workers, (5,), state=state) == draws()


def test_data_sets_that_fetch_a_list_at_once():
    subset = Subset(Augmented(60), range(0, 60, 2))
    assert hasattr(subset, "__getitems__")
    assert draws(dataset=subset) == draws(2, (7, 3), dataset=subset)


SOURCES = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": lambda: random.random(),
    "gauss": lambda: random.gauss(0, 1),
    "normal": lambda: float(torch.randn(())),
}


def seed_all(seed):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002


def all_draws():
    return [source() for source in SOURCES.values()]


@pytest.mark.parametrize("dataset", [Augmented(30), Counting(30)])
def test_the_generators_of_the_training_process_stay_as_they_are(dataset):
    seed_all(3)
    expected = all_draws() + all_draws()
    seed_all(3)
    seen = all_draws()
    for _ in AdaptiveDataLoader(dataset, 4, seed_samples=True):
        pass
    assert seen + all_draws() == expected


def test_without_seeding_samples_draw_as_in_a_plain_loader():
    seed_all(0)
    rows = draws(epochs=1, seed_samples=False)
    seed_all(0)
    expected = [[SOURCES[name]() for name in ("torch", "numpy", "python")] for _ in rows]
    assert np.array([row[1:] for row in rows]) == pytest.approx(np.array(expected))
    assert [row[0] for row in rows] == [row[0] for row in draws(epochs=1)]


class Lists(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_seeded_by_default_and_lists_are_fetched_as_in_a_plain_loader(workers):
    class OnlyLists(Lists):
        def __getitem__(self, index):
            raise AssertionError("fetched one by one")

        def __getitems__(self, indices):
            return [Augmented.__getitem__(self, index) for index in indices]

    rows = list(AdaptiveDataLoader(OnlyLists(30), 4, True, seed=1, num_workers=workers))
    assert torch.cat([row[0] for row in rows]).tolist() == [row[0] for row in draws()][:30]
    assert draws(dataset=Lists(30)) == draws()


class Late(Augmented):
    """Draws for one class of samples only, which comes late."""

    def __getitem__(self, index):
        return index, torch.rand(()) if index % 11 == 7 else torch.zeros(()), 0.0, 0.0


def test_a_data_set_that_draws_now_and_then():
    assert draws(dataset=Late(30)) == draws(1, (3,), dataset=Late(30))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("draw", SOURCES.values(), ids=SOURCES)
def test_each_generator_is_seeded_for_each_sample(draw, workers):
    class Draws(Numbers):
        def __getitem__(self, index):
            return index, draw()

    seed_all(workers)
    expected = draws(workers, (16,), epochs=1, dataset=Draws(40))
    seed_all(5)
    assert draws(0, (7, 64, 3), epochs=1, dataset=Draws(40)) == expected
    assert len({value for _, value in expected}) == 40


def reference(*values):
    """splitmix64's finalizer after each word, in unbounded integers."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def test_words_are_mixed_as_splitmix64_does():
    # The first numbers of the published generator with seed 0.
    states = words(*(0x9E3779B97F4A7C15 * (k + 1) for k in range(2)))
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert mix() == 0
    for values in ((0,), (1, 2), (2**64 - 1, 2**63, 5)):
        assert mix(*values) == reference(*values)
    for case in ((7, 0, 5, 1), (7, 3, 20, 4), (8, 2**62, 4, 3), (2**64 - 1, 2**62 + 6, 2, 3)):
        stream, start, count, stride = case
        positions = [start + row * stride for row in range(count)]
        assert sample_keys(*case) == [reference(stream, position) for position in positions]
