"""ResizableBatchSampler: every index once, in the sizes requested, resumable anywhere."""

import copy
import math
from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from adabatch import ResizableBatchSampler
from adabatch.data import KeyedPermutation
from tests.data.streams import flat, through_a_file

LENGTHS = st.integers(0, 200)
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=20)
SEEDS = st.integers(0, 2**64 - 1)
PROPERTY = settings(max_examples=100, deadline=None)


def draw(sampler, sizes):
    """One epoch with batch k of size sizes[k mod len(sizes)].

    Returns a list of (size requested, batch, batches left before the draw).
    """
    asked = 0
    sampler.batch_size = sizes[0]
    drawn, iterator = [], iter(sampler)
    while True:
        sampler.batch_size = size = sizes[asked % len(sizes)]
        before = sampler.batches_left
        batch = next(iterator, None)
        if batch is None:
            return drawn
        drawn.append((size, batch, before))
        asked += 1


def expected_order(n, shuffle, seed, epoch):
    return KeyedPermutation(n, seed, epoch)(slice(None)).tolist() if shuffle else list(range(n))


@PROPERTY
@given(n=LENGTHS, sizes=SIZES, shuffle=st.booleans(), seed=SEEDS, drop_last=st.booleans())
def test_every_index_once_in_batches_of_the_size_asked_for(n, sizes, shuffle, seed, drop_last):
    sampler = ResizableBatchSampler(n, 1, shuffle=shuffle, seed=seed, drop_last=drop_last)
    for epoch in range(2):
        drawn = draw(sampler, sizes)
        batches = [batch for _, batch, _ in drawn]
        whole = expected_order(n, shuffle, seed, epoch)
        assert flat(batches) == whole[: len(flat(batches))]
        for size, batch, _ in drawn[:-1]:
            assert len(batch) == size
        if drop_last:
            assert all(len(batch) == size for size, batch, _ in drawn)
            # Only a tail shorter than the next batch is left out.
            assert n - len(flat(batches)) < sizes[len(batches) % len(sizes)]
        else:
            assert len(flat(batches)) == n
            assert all(0 < len(batch) <= size for size, batch, _ in drawn)


@PROPERTY
@given(n=LENGTHS, sizes=SIZES, drop_last=st.booleans())
def test_batches_left_is_what_is_to_come_at_the_present_size(n, sizes, drop_last):
    sampler = ResizableBatchSampler(n, sizes[0], shuffle=True, drop_last=drop_last)
    rounded = math.floor if drop_last else math.ceil
    assert len(sampler) == rounded(n / sizes[0])
    seen = 0
    for size, batch, before in draw(sampler, sizes):
        assert before == rounded((n - seen) / size)
        seen += len(batch)
    assert sampler.position == 0
    assert len(sampler) == rounded(n / sampler.batch_size)


@pytest.mark.parametrize("drop_last", [False, True])
def test_len_is_that_of_the_epoch_and_batches_left_counts_down(drop_last):
    sampler = ResizableBatchSampler(23, 5, drop_last=drop_last)
    whole = 4 if drop_last else 5
    assert [len(sampler) for _ in sampler] == [whole] * whole
    assert [sampler.batches_left for _ in sampler] == list(range(whole - 1, -1, -1))
    assert len(sampler) == whole == len(list(sampler))


@PROPERTY
@given(
    data=st.data(), n=LENGTHS, sizes=SIZES, shuffle=st.booleans(), seed=SEEDS,
    drop_last=st.booleans(), epoch=st.integers(0, 3),
)
def test_resuming_at_any_batch_gives_the_same_remainder(
    data, n, sizes, shuffle, seed, drop_last, epoch
):
    whole = ResizableBatchSampler(n, 1, shuffle=shuffle, seed=seed, drop_last=drop_last)
    whole.set_epoch(epoch)
    batches = [batch for _, batch, _ in draw(whole, sizes)]
    killed = data.draw(st.integers(0, len(batches)))

    first = ResizableBatchSampler(n, 1, shuffle=shuffle, seed=seed, drop_last=drop_last)
    first.set_epoch(epoch)
    iterator = iter(first)
    for k in range(killed):
        first.batch_size = sizes[k % len(sizes)]
        assert next(iterator) == batches[k]
    state = through_a_file(first.state_dict())

    resumed = ResizableBatchSampler(n, 3, shuffle=shuffle, seed=0, drop_last=drop_last)
    resumed.load_state_dict(state)
    place = (epoch, len(flat(batches[:killed])), first.batch_size)
    assert (resumed.epoch, resumed.position, resumed.batch_size) == place
    rotated = [sizes[(killed + k) % len(sizes)] for k in range(len(sizes))]
    rest = [batch for _, batch, _ in draw(resumed, rotated)]
    assert rest == batches[killed:]
    later = [[batch for _, batch, _ in draw(sampler, sizes)] for sampler in (resumed, whole)]
    assert later[0] == later[1]


def test_k_batches_resume_k_batches_are_2k_batches_across_epochs():
    through = ResizableBatchSampler(10, 4, shuffle=True, seed=3)
    expected = flat([list(through) for _ in range(4)])
    for k in range(1, len(expected)):
        sampler = ResizableBatchSampler(10, 4, shuffle=True, seed=3)
        head = list(islice(chain.from_iterable(iter(sampler) for _ in range(4)), k))
        resumed = ResizableBatchSampler(10, 4, shuffle=True, seed=3)
        resumed.load_state_dict(sampler.state_dict())
        tail = flat([list(resumed) for _ in range(4 - resumed.epoch)])
        assert head + tail == expected


def test_the_shuffled_order_is_the_keyed_permutation_of_seed_and_epoch():
    sampler = ResizableBatchSampler(5000, 700, shuffle=True, seed=9)
    for epoch in range(2):
        assert sampler.epoch == epoch
        assert flat(sampler) == KeyedPermutation(5000, 9, epoch)(slice(None)).tolist()


def test_the_first_batch_of_ten_billion_samples_comes_at_once():
    batch = next(iter(ResizableBatchSampler(10**10, 64, shuffle=True)))
    assert batch == KeyedPermutation(10**10, 0, 0)(range(64)).tolist()
    assert all(type(index) is int for index in batch)


# Epochs and iterators


def test_each_iter_starts_the_next_epoch_from_its_beginning():
    sampler = ResizableBatchSampler(100, 8, shuffle=True)
    orders = [KeyedPermutation(100, 0, epoch)(range(8)).tolist() for epoch in range(3)]
    assert [next(iter(sampler)) for _ in range(3)] == orders
    assert (sampler.epoch, sampler.position) == (2, 8)


def test_an_iterator_that_drew_nothing_leaves_its_epoch_to_the_next():
    sampler = ResizableBatchSampler(10, 4)
    unused = iter(sampler)
    assert next(iter(sampler)) == [0, 1, 2, 3]
    assert sampler.epoch == 0
    with pytest.raises(RuntimeError, match="out of date"):
        next(unused)


def test_set_epoch_chooses_the_order_of_the_next_iter():
    sampler = ResizableBatchSampler(100, 100, shuffle=True, seed=1)
    sampler.set_epoch(7)
    assert next(iter(sampler)) == KeyedPermutation(100, 1, 7)(slice(None)).tolist()
    sampler.set_epoch(7)
    assert (sampler.epoch, sampler.position) == (7, 0)
    assert list(sampler) == [KeyedPermutation(100, 1, 7)(slice(None)).tolist()]
    assert sampler.epoch == 8


def test_set_epoch_keeps_the_position_of_a_loaded_state_in_that_epoch_only():
    sampler = ResizableBatchSampler(10, 4)
    sampler.set_epoch(2)
    next(iter(sampler))
    state = sampler.state_dict()
    resumed = ResizableBatchSampler(10, 4)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert next(iter(resumed)) == [4, 5, 6, 7]
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert next(iter(resumed)) == [0, 1, 2, 3]


INTERRUPTS = [
    lambda s: next(iter(s)), iter, lambda s: s.set_epoch(5),
    lambda s: s.load_state_dict(s.state_dict()),
]


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_an_iterator_that_is_not_the_newest_raises_instead_of_mixing_positions(interrupt):
    sampler = ResizableBatchSampler(10, 4, shuffle=True)
    older = iter(sampler)
    next(older)
    kept = interrupt(sampler)
    before = sampler.state_dict()
    with pytest.raises(RuntimeError, match="two samplers"):
        next(older)
    assert sampler.state_dict() == before
    del kept


def test_a_copy_has_a_life_of_its_own():
    sampler = ResizableBatchSampler(10, 4)
    next(iter(sampler))
    twin = copy.deepcopy(sampler)
    twin.batch_size = 9
    assert len(list(twin)) == 2
    assert (sampler.batch_size, sampler.position) == (4, 4)


# Inside torch's DataLoader


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_new_size_holds_on_the_very_next_batch_of_a_plain_loader(drop_last):
    sampler = ResizableBatchSampler(50, 8, shuffle=True, drop_last=drop_last)
    loader = DataLoader(torch.arange(50), batch_sampler=sampler)
    for epoch in range(2):
        sampler.batch_size = 8
        sizes, order = [], []
        for batch, after in zip(loader, [3, 11, 20, 20, 20], strict=False):
            sampler.batch_size = after
            order += batch.tolist()
            sizes.append(len(batch))
        assert sizes == ([8, 3, 11, 20] if drop_last else [8, 3, 11, 20, 8])
        assert order == KeyedPermutation(50, 0, epoch)(range(len(order))).tolist()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_a_new_size_after_what_they_prefetched_and_lose_nothing(persistent):
    sampler = ResizableBatchSampler(60, 4, shuffle=True)
    loader = DataLoader(
        torch.arange(60), batch_sampler=sampler, num_workers=2, prefetch_factor=2,
        persistent_workers=persistent,
    )
    for epoch in range(2):
        sampler.batch_size = 4
        order, sizes = [], []
        for batch in loader:
            sampler.batch_size = 10
            order += batch.tolist()
            sizes.append(len(batch))
        assert order == KeyedPermutation(60, 0, epoch)(slice(None)).tolist()
        # 2 workers · 2 batches were drawn ahead, and one more when the first was handed over.
        assert sizes == [4] * 5 + [10] * 4


def test_two_loops_over_one_loader_raise():
    loader = DataLoader(torch.arange(20), batch_sampler=ResizableBatchSampler(20, 4))
    with pytest.raises(RuntimeError, match="out of date"):
        list(zip(loader, loader, strict=True))
