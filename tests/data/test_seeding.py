"""Random augmentation repeats: it depends on seed, epoch and position, not on workers, batch sizes or where a run was resumed."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from adabatch import AdaptiveDataLoader
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
