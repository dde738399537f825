"""Chunks of several batches are cut as if each batch had been made alone."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from adabatch import AdaptiveDataLoader
from adabatch.data.chunks import ChunkPlan, ChunkSizer, Reply


@pytest.mark.parametrize("size", [1, 5, 16])
def test_batches_cut_from_one_chunk_are_like_those_of_a_plain_loader(size):
    loader = AdaptiveDataLoader(torch.arange(3000.0).view(-1, 3), size, num_workers=2)
    plain = DataLoader(torch.arange(3000.0).view(-1, 3), size)
    for _ in range(2):
        previous = None
        for ours, theirs in zip(loader, plain, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() % 64 == 0
            assert previous is None or bool((previous == -1).all())
            previous = ours.fill_(-1)
        for _ in range(60):  # a fast machine, in the second epoch
            loader.chunk_sizer.observe(Reply(None, 1000, seconds=1e-3))
        assert loader.chunk_sizer.min_samples > size


def test_chunks_grow_only_where_batches_do_not_depend_on_them():
    def sizer(**options):
        return AdaptiveDataLoader(torch.arange(3), **options).chunk_sizer

    assert sizer(num_workers=1) is not None
    assert sizer(num_workers=1, collate_fn=torch.stack, collate_in="consumer") is not None
    assert sizer(num_workers=1, collate_fn=torch.stack) is None
    assert sizer() is None


def test_a_chunk_takes_four_milliseconds_at_least():
    sizer, plan = ChunkSizer(), ChunkPlan(2, lambda: [8])
    assert sizer.min_samples == 1
    sizer.observe(Reply(None, 4, seconds=0.4))
    assert sizer.min_samples == 1
    for _ in range(60):
        sizer.observe(Reply(None, 10, seconds=1e-3))
    assert sizer.min_samples in (39, 40)
    plan = ChunkPlan(2, lambda: [7, 8], sizer)
    plan.request(7, [])
    assert [sum(plan.next_sizes()) for _ in range(3)] == [7, 45, 45]


def test_a_forked_process_leaves_the_workers_alone():
    """A loader that is left in the middle of an epoch is inherited by another one's workers."""
    loader = AdaptiveDataLoader(range(40), 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    forked = multiprocessing.get_context("fork").Process(target=batches.close)
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    assert [len(batch) for batch in batches] == [4] * 9
