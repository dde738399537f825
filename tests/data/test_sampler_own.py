"""ResizableBatchSampler over a user's sampler: its order is kept, resumed as far as possible."""

import math
from itertools import chain, islice

import pytest
import torch
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from adabatch import ResizableBatchSampler
from tests.data.streams import Restartable, flat, through_a_file


class Unsized(Sampler):
    def __iter__(self):
        return iter([4, 2, 0, 1])


def weighted(source, generator):
    return WeightedRandomSampler([1.0] * len(source), 20, generator=generator)


def test_an_own_sampler_is_taken_as_it_is():
    torch.manual_seed(0)
    weights = torch.rand(40)
    makers = [
        lambda g: RandomSampler(range(40), generator=g),
        lambda g: RandomSampler(range(40), replacement=True, num_samples=55, generator=g),
        lambda g: WeightedRandomSampler(weights, 33, generator=g),
        lambda g: SubsetRandomSampler(range(0, 40, 3), generator=g),
        lambda _: SequentialSampler(range(40)),
        lambda _: [3, 1, 2],
    ]
    for make in makers:
        expected, own = (make(torch.Generator().manual_seed(5)) for _ in range(2))
        expected = list(expected)
        sampler = ResizableBatchSampler(range(40), 4, sampler=own)
        assert len(sampler) == math.ceil(len(expected) / 4)
        order = []
        for batch in sampler:
            sampler.batch_size = 11 - sampler.batch_size
            order += batch
        assert order == expected


def test_a_sampler_may_be_the_first_argument_as_in_torchs_batch_sampler():
    own = SubsetRandomSampler([5, 3, 8])
    sampler = ResizableBatchSampler(own, 2)
    assert sampler.sampler is own
    assert sorted(flat(sampler)) == [3, 5, 8]
    assert list(ResizableBatchSampler(Unsized(), 3)) == [[4, 2, 0], [1]]
    # A list can be indexed, so it is a data set.
    assert list(ResizableBatchSampler([5, 3, 8], 3)) == [[0, 1, 2]]


def test_len_of_a_sampler_without_length_is_explained():
    sampler = ResizableBatchSampler(Unsized(), 3, drop_last=True)
    assert list(sampler) == [[4, 2, 0]]
    with pytest.raises(TypeError, match=r"has no __len__"):
        len(sampler)


@pytest.mark.parametrize("drawn", range(9))
@pytest.mark.parametrize("make", [RandomSampler, SubsetRandomSampler, weighted])
def test_an_own_sampler_with_a_generator_resumes_exactly(make, drawn):
    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        return ResizableBatchSampler(None, 6, sampler=make(range(20), generator=generator))

    through = build(1)
    batches = flat([list(through) for _ in range(3)])
    killed = build(1)
    head = list(islice(chain.from_iterable(iter(killed) for _ in range(3)), drawn))
    resumed = build(2)
    resumed.load_state_dict(through_a_file(killed.state_dict()))
    # Saved again before anything is drawn, the state is still the same.
    again = build(3)
    again.load_state_dict(resumed.state_dict())
    for sampler in (resumed, again):
        assert head + flat([list(sampler) for _ in range(3 - sampler.epoch)]) == batches


def test_an_own_sampler_with_a_state_goes_on_by_itself():
    killed = ResizableBatchSampler(Restartable(10), 4)
    assert next(iter(killed)) == [7, 8, 9, 0]
    state = through_a_file(killed.state_dict())
    assert state["sampler"] == {"at": 4}
    resumed = ResizableBatchSampler(Restartable(10), 1)
    resumed.load_state_dict(state)
    assert (resumed.batches_left, len(resumed)) == (2, 3)
    assert list(resumed) == [[1, 2, 3, 4], [5, 6]]
    assert next(iter(resumed)) == [7, 8, 9, 0]


def test_a_repeatable_own_sampler_is_fast_forwarded():
    killed = ResizableBatchSampler(Unsized(), 3)
    next(iter(killed))
    resumed = ResizableBatchSampler(Unsized(), 3)
    resumed.load_state_dict(killed.state_dict())
    assert list(resumed) == [[1]]


def test_resuming_an_order_that_cannot_be_repeated_warns():
    sampler = ResizableBatchSampler(RandomSampler(range(10)), 4)
    sampler.load_state_dict(sampler.state_dict())
    next(iter(sampler))
    with pytest.warns(UserWarning, match="RandomSampler has no generator"):
        sampler.load_state_dict(sampler.state_dict())
    assert sum(map(len, sampler)) == 6


def test_set_epoch_reaches_an_own_sampler():
    own = DistributedSampler(range(12), num_replicas=2, rank=1, seed=4)
    sampler = ResizableBatchSampler(own, 3)
    sampler.set_epoch(5)
    assert own.epoch == 5
    assert flat(sampler) == list(own)
