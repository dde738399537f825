"""Random augmentation repeats: it depends on seed, epoch and position, not on workers, batch sizes or where a run was resumed."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

from adabatch import AdaptiveDataLoader
from adabatch.data.seeding import Keys, mix
from tests.data.streams import Augmented, Counting


def draws(workers=0, sizes=(4,), seed=1, epochs=2, stop=None, state=None, dataset=None, **options):
    loader = AdaptiveDataLoader(dataset or Augmented(30), sizes[0], True, seed=seed, num_workers=workers, **options)
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
    assert len({row[1] for row in expected}) == len({row[2] for row in expected}) == len({row[3] for row in expected}) == 60


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_repeats_it(workers):
    head, state = draws(workers, (4, 6), stop=3)
    assert head + draws(2 - workers, (5,), state=state) == draws()


def test_data_sets_that_fetch_a_list_at_once():
    subset = Subset(Augmented(60), range(0, 60, 2))
    assert hasattr(subset, "__getitems__")
    assert draws(dataset=subset) == draws(2, (7, 3), dataset=subset)


def test_the_training_processs_own_generators_are_left_alone():
    def next_draws(loader):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
        for _ in loader:
            pass
        return float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002

    for dataset in (Augmented(30), Counting(30)):
        assert next_draws(AdaptiveDataLoader(dataset, 4)) == next_draws([])


def test_it_can_be_switched_off():
    torch.manual_seed(0)
    first = draws(seed_samples=False)
    assert [row[0] for row in first] == [row[0] for row in draws()]
    assert not {row[1] for row in first} & {row[1] for row in draws()}


class Late(Augmented):
    """Draws for one class of samples only, which comes late."""

    def __getitem__(self, index):
        return index, torch.rand(()) if index % 11 == 7 else torch.zeros(()), 0.0, 0.0


def test_a_data_set_that_draws_now_and_then():
    assert draws(dataset=Late(30)) == draws(1, (3,), dataset=Late(30))


SOURCES = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": lambda: random.random(),
    "gauss": lambda: random.gauss(0, 1),
    "normal": lambda: float(torch.randn(())),
}


class Once(Dataset):
    """Draws for one sample of 3,000, and counts how often it was asked for each."""

    def __init__(self, draw, at):
        self.draw, self.at, self.fetched = draw, at, Counter()

    def __len__(self):
        return 3000

    def __getitem__(self, index):
        self.fetched[index] += 1
        return index, self.draw() if index == self.at else 0.0


@pytest.mark.parametrize("draw", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_very_first_sample_that_draws_is_seeded(draw, workers):
    torch.manual_seed(workers), np.random.seed(workers), random.seed(workers)  # noqa: NPY002
    late = dict(draws(workers, (16,), epochs=1, dataset=Once(draw, 2900)))[2900]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    assert dict(draws(0, (7, 64, 3), epochs=1, dataset=Once(draw, 2900)))[2900] == late != 0.0


@pytest.mark.parametrize("draw", SOURCES.values(), ids=SOURCES)
def test_a_late_draw_leaves_the_training_processs_generators_alone(draw):
    def all_draws():
        return [source() for source in SOURCES.values()]

    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = all_draws() + all_draws()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    # Not NumPy's cached normal number, which changing its bit generator drops.
    seen = all_draws()
    dataset = Once(draw, 1500)
    for _ in AdaptiveDataLoader(dataset, 100):
        pass
    assert seen + all_draws() == expected
    assert dataset.fetched.total() == 3100
    assert dataset.fetched[1500] == dataset.fetched[1599] == 2


def test_keys_are_those_of_mix():
    keys = Keys()
    for stream, start, stride, count in ((7, 0, 1, 5), (7, 1000, 1, 40), (7, 3, 4, 2000), (7, 11, 4, 10), (8, 2**62, 3, 4), (2**64 - 1, 2**62 + 6, 3, 2)):
        assert keys.at(stream, start, stride, count) == [mix(stream, start + row * stride) for row in range(count)]
