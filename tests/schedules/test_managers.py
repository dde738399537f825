"""Changes over real loaders: they hold from the next batch, with drop_last and without, with
workers, over data sets of every kind."""

import bs_scheduler
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from adabatch import schedules
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.data.sampler import ResizableBatchSampler
from tests.schedules.cases import FIXED


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


class MeasuredStream(Stream):
    def __len__(self):
        return 100


class Blocks(Dataset):
    """Makes its own batches: item i is the i-th block."""

    def __init__(self):
        self.size = 10

    def __len__(self):
        return -(-100 // self.size)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return torch.arange(index * self.size, min(100, (index + 1) * self.size))

    def get_batch_size(self):
        return self.size

    def change_batch_size(self, size):
        self.size = size


def epoch(loader):
    return [len(batch) for batch in loader]


def batch_lengths(length, sizes, drop_last):
    """Batch lengths of one epoch from the size of each batch (the last size repeats), by
    subtraction."""
    lengths, left = [], length
    while left:
        size = sizes[min(len(lengths), len(sizes) - 1)]
        if drop_last and left < size:
            break
        lengths.append(min(size, left))
        left -= lengths[-1]
    return lengths


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("name", FIXED)
def test_epoch_lengths(name, drop_last):
    """Stepped once an epoch, over bs-scheduler's loader and ours: the same batches."""
    loaders = [DataLoader(Numbers(130), batch_size=10, shuffle=True, drop_last=drop_last)
               for _ in range(2)]
    ours = getattr(schedules, name)(loaders[0], **FIXED[name])
    theirs = getattr(bs_scheduler, name)(loaders[1], **FIXED[name])
    for _ in range(12):
        assert len(loaders[0]) == len(loaders[1]) == len(epoch(loaders[0]))
        expected = batch_lengths(130, [ours.batch_size], drop_last)
        assert epoch(loaders[0]) == epoch(loaders[1]) == expected
        ours.step(metrics=1.0)
        theirs.step(metrics=1.0)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.booleans(), st.integers(1, 200))
def test_a_change_holds_from_the_next_batch(sizes, drop_last, length):
    loader = DataLoader(Numbers(length), batch_size=10, drop_last=drop_last)
    schedule = schedules.LambdaBS(loader, lambda step: sizes[min(step, len(sizes) - 1)] / 10,
                                  max_batch_size=1000)
    lengths = []
    for batch in loader:
        lengths.append(len(batch))
        schedule.step()
    assert lengths == batch_lengths(length, sizes, drop_last)


def test_bs_scheduler_misses_changes_with_drop_last():
    """The defect that the replacement of the batch sampler fixes."""
    loader = DataLoader(Numbers(100), batch_size=10, drop_last=True)
    schedule = bs_scheduler.StepBS(loader, step_size=1, gamma=2.0)
    lengths = []
    for batch in loader:
        lengths.append(len(batch))
        schedule.step()
    assert lengths == [10] * 10


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers(drop_last, persistent):
    """Every sample comes once an epoch, or is dropped in the last batch; the size of an epoch's end
    is that of the next epoch's start."""
    loader = DataLoader(Numbers(60), batch_size=4, drop_last=drop_last, num_workers=2,
                        prefetch_factor=1, persistent_workers=persistent)
    if persistent:
        assert epoch(loader) == [4] * 15
    schedule = schedules.StepBS(loader, step_size=1, gamma=2.0, max_batch_size=16)
    lengths, seen = [], []
    for batch in loader:
        lengths.append(len(batch))
        seen += batch.tolist()
        schedule.step()
    assert seen == list(range(len(seen)))
    # Two batches are with the workers and a third is drawn when the first one arrives.
    assert lengths[:2] == [4, 4]
    assert set(lengths[4:-1]) == {16}
    assert epoch(loader) == batch_lengths(60, [16], drop_last)


@pytest.mark.parametrize("stream", [Stream(), MeasuredStream()], ids=["unmeasured", "measured"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_iterable_data_sets(stream, drop_last):
    loader = DataLoader(stream, batch_size=10, drop_last=drop_last)
    schedule = schedules.StepBS(loader, step_size=1, gamma=2.0, max_batch_size=40)
    lengths = []
    for batch in loader:
        lengths.append(len(batch))
        schedule.step()
    assert lengths == batch_lengths(100, [10, 20, 40], drop_last)
    if stream.__class__ is MeasuredStream:
        assert len(loader) == (2 if drop_last else 3)


def test_unknown_length_is_no_bound_of_one():
    """bs-scheduler cuts every size to 1 here."""
    theirs = DataLoader(Stream(), batch_size=10)
    assert bs_scheduler.StepBS(theirs, step_size=1).batch_size == 1
    ours = schedules.StepBS(DataLoader(Stream(), batch_size=10), step_size=1)
    ours.step()
    assert ours.batch_size == 20
    with pytest.raises(ValueError, match="needs max_batch_size"):
        schedules.CosineAnnealingBS(DataLoader(Stream(), batch_size=10), total_iters=4)


def test_data_set_that_makes_the_batches():
    loader = DataLoader(Blocks(), batch_size=None)
    schedule = schedules.StepBS(loader, step_size=1, gamma=2.0, max_batch_size=100)
    assert isinstance(schedule.batch_size_manager, schedules.CustomBatchSizeManager)
    schedule.step()
    assert epoch(loader) == [20] * 5
    assert loader.batch_size is None


def test_data_set_without_the_methods():
    for package in (schedules, bs_scheduler):
        with pytest.raises(KeyError, match="change_batch_size"):
            package.StepBS(DataLoader(Numbers(10), batch_size=None), step_size=1)


def test_custom_manager():
    class Elsewhere(schedules.BatchSizeManager):
        size = 8

        def get_current_batch_size(self):
            return self.size

        def set_batch_size(self, new_bs):
            self.size = new_bs

    elsewhere = Elsewhere()
    schedule = schedules.StepBS(None, step_size=1, batch_size_manager=elsewhere)
    schedule.step()
    assert elsewhere.size == schedule.batch_size == 16


def test_loader_or_sampler_with_a_batch_size_that_may_be_set():
    class Loader:
        dataset = Numbers(99)
        _size = 8

        @property
        def batch_size(self):
            return self._size

        @batch_size.setter
        def batch_size(self, size):
            self._size = size

    loader = Loader()
    schedule = schedules.ExponentialBS(loader, gamma=3.0)
    schedule.step()
    assert loader.batch_size == 24
    assert schedule.max_batch_size == 100


@pytest.mark.parametrize("drop_last", [False, True])
def test_adaptive_data_loader(drop_last):
    loader = AdaptiveDataLoader(Numbers(100), batch_size=10, shuffle=True, drop_last=drop_last)
    schedule = schedules.StepBS(loader, step_size=1, gamma=2.0)
    assert schedule.max_batch_size == 101
    lengths = []
    for batch in loader:
        lengths.append(len(batch))
        schedule.step()
    assert lengths == batch_lengths(100, [10, 20, 40, 80], drop_last)
    second = schedules.StepBS(AdaptiveDataLoader(Numbers(100), batch_size=10), step_size=1)
    second.load_state_dict(schedule.state_dict())
    assert second.dataloader.batch_size == schedule.batch_size


def test_a_list_as_the_loaders_sampler():
    loader = DataLoader(Numbers(10), sampler=[7, 1, 5, 3], batch_size=2)
    schedules.StepBS(loader, 1)
    assert [batch.tolist() for batch in loader] == [[7, 1], [5, 3]]


def test_batch_samplers():
    """torch's is replaced over the same sampler; one of the user's is kept; one without a size is
    refused."""

    class Own(BatchSampler):
        pass

    class Sizeless:
        def __iter__(self):
            return iter([[0], [1]])

    sampler = RandomSampler(Numbers(50))
    loader = DataLoader(Numbers(50), sampler=sampler, batch_size=5)
    first, second = schedules.StepBS(loader, 1), schedules.StepBS(loader, 1)
    assert isinstance(loader.batch_sampler, ResizableBatchSampler)
    assert loader.batch_sampler.sampler is loader.sampler is sampler
    first.step()
    assert second.batch_size == 10

    own = Own(sampler, 5, False)
    loader = DataLoader(Numbers(50), batch_sampler=own)
    schedules.StepBS(loader, 1).step()
    assert loader.batch_sampler is own
    assert own.batch_size == 10
    assert loader.batch_size is None
    with pytest.raises(AttributeError, match="Sizeless"):
        schedules.StepBS(DataLoader(Numbers(50), batch_sampler=Sizeless()), 1)


def test_order_is_that_of_the_loader():
    """The same generator gives the same order as torch's loader gives."""
    orders = []
    for scheduled in (False, True):
        loader = DataLoader(Numbers(40), batch_size=8, shuffle=True,
                            generator=torch.Generator().manual_seed(3))
        if scheduled:
            schedules.StepBS(loader, 1)
        orders.append([batch.tolist() for _ in range(2) for batch in loader])
    assert orders[0] == orders[1]


def test_distributed_sampler_keeps_its_epoch():
    sampler = torch.utils.data.DistributedSampler(Numbers(40), num_replicas=2, rank=0, seed=1)
    loader = DataLoader(Numbers(40), sampler=sampler, batch_size=4)
    schedules.StepBS(loader, 1)
    orders = []
    for number in range(2):
        loader.sampler.set_epoch(number)
        orders.append([batch.tolist() for batch in loader])
    assert orders[0] != orders[1]
    assert sum(map(len, orders[0])) == 20


def test_verbose(capsys):
    schedules.StepBS(DataLoader(Numbers(50), batch_size=5), 1, verbose=True).step()
    assert capsys.readouterr().out == "Adjusting batch size to 10.\n"
