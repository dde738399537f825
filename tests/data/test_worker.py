"""What goes wrong ends in a clear error, soon, and leaves no process behind."""

import gc
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import IterableDataset

from adabatch import AdaptiveDataLoader
from tests.data.streams import Counting, Numbers, Plain, drawn

pytestmark = pytest.mark.timeout(60)


class Broken(Numbers):
    """Sample 13 cannot be read, or kills whoever reads it."""

    def __init__(self, n, kills=False):
        super().__init__(n)
        self.kills = kills

    def __getitem__(self, index):
        if index == 13:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("sample 13 is damaged")
        return index


class BrokenStream(IterableDataset):
    def __iter__(self):
        yield from range(13)
        raise OSError("the stream broke")


def no_child_is_left():
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Broken(40), BrokenStream()], ids=["map", "stream"])
def test_a_sample_that_raises(workers, dataset):
    loader = AdaptiveDataLoader(dataset, 4, num_workers=workers)
    with pytest.raises(OSError, match=r"sample 13 is damaged|the stream broke"):
        drawn(loader)
    gc.collect()  # the error's traceback holds the iterator, which may be continued
    assert no_child_is_left()


def test_a_worker_that_is_killed():
    loader = AdaptiveDataLoader(Broken(40, kills=True), 4, num_workers=2)
    with pytest.raises(RuntimeError, match=r"worker .*(exited unexpectedly|killed by signal)"):
        drawn(loader)
    del loader
    assert no_child_is_left()


@pytest.mark.parametrize("persistent", [False, True])
def test_loops_that_are_left_leave_no_process(persistent):
    loader = AdaptiveDataLoader(Numbers(400), 4, num_workers=2, persistent_workers=persistent)
    for _ in loader:
        break
    assert persistent or no_child_is_left()
    del loader
    assert no_child_is_left()


def test_a_slow_worker_runs_into_the_timeout():
    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(20 if index == 5 else 0)
            return index

    loader = AdaptiveDataLoader(Slow(20), 4, num_workers=1, timeout=1)
    with pytest.raises(RuntimeError, match="timed out"):
        drawn(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, Counting, Plain])
@pytest.mark.parametrize("drop_last", [False, True])
def test_data_sets_shorter_than_a_batch_and_empty_ones(workers, kind, drop_last):
    for n in (0, 3):
        loader = AdaptiveDataLoader(kind(n), 8, num_workers=workers, drop_last=drop_last)
        for _ in range(2):
            batches = [sorted(batch) for batch in drawn(loader)]
            assert batches == ([] if drop_last or n == 0 else [list(range(n))])
    assert no_child_is_left()


@pytest.mark.parametrize("size", [0, -1, 2.5, math.nan, None, True])
def test_a_size_that_is_none_is_refused_in_the_middle_too(size):
    loader = AdaptiveDataLoader(Numbers(20), 4, num_workers=1)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises((ValueError, TypeError), match="batch_size must be an integer >= 1"):
        loader.batch_size = size
    assert loader.batch_size == 4
    assert len(next(iterator)) == 4


def test_lengths():
    loader = AdaptiveDataLoader(Numbers(20), 6)
    assert (len(loader), loader.samples_left, loader.num_samples) == (4, 20, 20)
    for batch in loader:
        assert len(batch) in (6, 2)
        assert loader.samples_left == 20 - loader.position
    assert (len(loader), loader.samples_left) == (4, 20)
    loader.drop_last = True
    assert len(loader) == 3
    stream = AdaptiveDataLoader(Plain(9), 4)
    with pytest.raises(TypeError, match=r"no len|__len__"):
        len(stream)
    assert stream.samples_left is stream.num_samples is None
    with pytest.raises(TypeError):
        iter(AdaptiveDataLoader(Numbers(5), 2, prefetch=3))


def test_a_stream_without_a_state_says_so():
    loader = AdaptiveDataLoader(Plain(20), 4)
    assert loader.state_dict()["progress"] is None
    drawn(loader, stop=2)
    with pytest.raises(TypeError, match=r"Plain cannot be resumed.*state_dict and load_state_dict"):
        loader.state_dict()


def test_a_stream_resumes_with_the_same_number_of_workers_only():
    loader = AdaptiveDataLoader(Counting(20), 4, num_workers=1)
    drawn(loader, stop=2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"saved with 1, here 0. Resume with the same num_workers"):
        AdaptiveDataLoader(Counting(20), 4).load_state_dict(state)


def test_two_loops_at_once_are_refused():
    for workers in (0, 1):
        loader = AdaptiveDataLoader(Numbers(20), 4, num_workers=workers)
        with pytest.raises(RuntimeError, match="out of date"):
            list(zip(loader, loader, strict=True))


def test_worker_init_fn_sees_the_callers_data_set():
    seen = []

    def look(worker):
        info = torch.utils.data.get_worker_info()
        assert isinstance(info.dataset, Numbers)
        info.dataset.n = 1000 + worker

    class Own(Numbers):
        def __getitem__(self, index):
            return self.n

    for batch in AdaptiveDataLoader(Own(20), 4, num_workers=2, worker_init_fn=look):
        seen += batch.tolist()
    assert set(seen) == {1000, 1001}
