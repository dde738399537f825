"""What torch's DataLoader delivers in unusual cases, ours delivers too, or says why not."""

import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.datapipes.iter import IterableWrapper

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from tests.data.streams import Numbers, drawn, flat


class OwnIterator(IterableDataset):
    """Begins again at each iter()."""

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == 7:
            raise StopIteration
        self.at += 1
        return self.at - 1


class Shuffled(IterableDataset):
    """iter() of its iterator begins again."""

    class Iterator:
        def __init__(self):
            self.left = list(range(7))

        def __iter__(self):
            return type(self)()

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    def __iter__(self):
        return self.Iterator()


class Generated(IterableDataset):
    def __iter__(self):
        yield from range(7)


STREAMS = {"own-iterator": OwnIterator, "other-iterator": Shuffled, "generator": Generated}


@pytest.mark.parametrize("options", [
    {}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}], ids=str)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_iterable_data_sets_of_every_kind(stream, options):
    theirs, ours = (kind(stream(), batch_size=2, **options) for kind in (
        DataLoader, AdaptiveDataLoader))
    for _ in range(2):
        # Where workers' last batches are short, ours are joined to the requested size.
        assert sorted(flat(drawn(ours))) == sorted(flat(batch.tolist() for batch in theirs))


def pipe(shuffled):
    source = IterableWrapper(range(12))
    return (source.shuffle() if shuffled else source).sharding_filter()


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_sharded_data_pipe_delivers_each_sample_once(shuffled, workers):
    loader = AdaptiveDataLoader(pipe(shuffled), 3, num_workers=workers)
    for _ in range(2):
        assert sorted(flat(drawn(loader))) == list(range(12))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("shuffle", [False, True, None])
def test_each_epoch_has_the_samples_there_when_it_begins(shuffle, sampler, workers):
    data = Numbers(10)
    loader = (ResizableBatchSampler(data, 4, shuffle=shuffle) if sampler
              else AdaptiveDataLoader(data, 4, shuffle, num_workers=workers))
    for n in (10, 17, 3, 8):
        data.n = n
        assert len(loader) == loader.batches_left == -(-n // 4)
        assert sorted(flat([list(batch) for batch in loader])) == list(range(n))
    iterator = iter(loader)
    next(iterator)
    data.n = 30  # within an epoch: holds from the next one
    assert loader.num_samples == 8
    assert len(list(iterator)) == 1
    resumed = AdaptiveDataLoader(data, 4, shuffle)
    assert loader.num_samples == resumed.num_samples == 30


def test_i_equals_len_minus_one_at_the_last_batch_only_however_sizes_change():
    loader = AdaptiveDataLoader(Numbers(50), 4)
    last = []
    for i, _ in enumerate(loader):
        last.append(i == len(loader) - 1)
        loader.batch_size = 3 + 5 * i % 7
    assert last == [False] * (len(last) - 1) + [True]


def counted_to(loader, n):
    for i, _ in enumerate(loader):
        loader.batch_size = 4
        if i == n - 1:
            break


def test_epochs_left_at_the_len_first_read_are_warned_of_and_whole_ones_are_not():
    loader = AdaptiveDataLoader(Numbers(40), 8)
    n = len(loader)
    counted_to(loader, n)
    counted_to(loader, n)
    with pytest.warns(UserWarning, match=r"left after 5 batches.*20 samples to come.*Iterate"):
        next(iter(loader))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            drawn(loader)
        for stop in (1, 2, 3, 1):
            len(loader)
            drawn(loader, stop=stop)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_sampler": [[0, 1], [2]]}, "batch_sampler= decides the size.*pass batch_size="),
    ({"batch_size": None}, "batch_size=None .*single samples.*>= 1"),
])
def test_arguments_of_a_data_loader_that_leave_nothing_to_adapt(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveDataLoader(Numbers(3), **options)


class Promising:
    """A sampler, or an iterable data set, of n samples whose len() says more or fewer."""

    def __init__(self, n, said):
        self.n, self.said = n, said

    def __len__(self):
        return self.said

    def __iter__(self):
        return iter(range(self.n))


class PromisingStream(Promising, IterableDataset):
    pass


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [5, 9, 13])
def test_an_epoch_has_the_samples_that_come_whatever_len_said(said, stream, workers):
    source = (PromisingStream if stream else Promising)(9, said)
    options = {"num_workers": workers, **({} if stream else {"sampler": source})}
    data = source if stream else Numbers(20)
    theirs, ours = (kind(data, batch_size=2, **options) for kind in (
        DataLoader, AdaptiveDataLoader))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert drawn(ours) == [batch.tolist() for batch in theirs]
    messages = [str(each.message) for each in caught if "Promising" in str(each.message)]
    assert len(messages) == (said != 9)  # once
    assert all(f"gave 9 samples in an epoch, but its len() says {said}" in m for m in messages)


@pytest.mark.parametrize(("said", "message"), [
    (5, "more than the 5 indices"), (13, "9 instead of the 13 indices")])
def test_processes_that_share_a_sampler_need_its_true_length(said, message):
    for rank in range(2):
        loader = AdaptiveDataLoader(
            Numbers(20), 4, sampler=Promising(9, said), rank=rank, world_size=2)
        with pytest.raises(RuntimeError, match=message):
            drawn(loader)


class Unreadable(Numbers):
    """The samples `bad` raise, and make the chunk that holds them the slower for it."""

    def __init__(self, n, bad, error=OSError):
        super().__init__(n)
        self.bad, self.error = bad, error

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error(f"sample {index} is damaged")
        return index


class Listed(Unreadable):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class UnreadableStream(IterableDataset):
    def __iter__(self):
        return map(Unreadable(30, {3, 11, 12}).__getitem__, range(30))


def picky(samples):
    if 5 in samples:
        raise ValueError("no 5, please")
    return torch.tensor(samples)


def outcomes(loader):
    """Batches and the types of errors, in their order, by who catches errors and continues."""
    iterator, found = iter(loader), []
    while True:
        try:
            found.append(next(iterator).tolist())
        except StopIteration:
            return found
        except Exception as error:
            found.append(type(error))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("dataset", "options"), [
    (Unreadable(40, {13}), {}), (Unreadable(40, {0, 1, 20, 39}, IndexError), {}),
    (Unreadable(40, range(8, 16), KeyError), {}), (Listed(40, {13, 30}), {}),
    (Numbers(40), {"collate_fn": picky}), (UnreadableStream(), {}),
], ids=["one", "several", "whole-batches", "lists", "collate", "stream"])
def test_a_loop_that_catches_an_error_continues_with_the_next_batch(dataset, options, workers):
    if isinstance(dataset, IterableDataset) and workers == 2:
        pytest.skip("each worker would give every sample")
    for size in (1, 4, 7):
        theirs, ours = (kind(dataset, batch_size=size, num_workers=workers, **options)
                        for kind in (DataLoader, AdaptiveDataLoader))
        for _ in range(2):  # chunks hold several batches once their speed is known
            assert outcomes(ours) == outcomes(theirs)
    consumer = AdaptiveDataLoader(dataset, 7, num_workers=workers, collate_in="consumer", **options)
    assert outcomes(consumer) == outcomes(theirs)


def test_a_batch_that_was_not_read_is_passed_over_and_not_counted():
    loader = AdaptiveDataLoader(Unreadable(20, {5}), 4, num_workers=1)
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="sample 5 is damaged"):
        next(iterator)
    assert (loader.position, loader.n_batches, loader.last_size, len(loader)) == (8, 1, 4, 4)
    resumed = AdaptiveDataLoader(Unreadable(20, {5}), 1)
    resumed.load_state_dict(loader.state_dict())
    loader.batch_size = resumed.batch_size = 6
    rest = [[*range(8, 14)], [*range(14, 20)]]
    assert [batch.tolist() for batch in iterator] == drawn(resumed) == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises_stop_iteration_does_not_end_the_epoch(workers):
    loader = AdaptiveDataLoader(Unreadable(12, {5}, StopIteration), 4, num_workers=workers)
    assert outcomes(loader) == [[0, 1, 2, 3], RuntimeError, [8, 9, 10, 11]]


class FromNumPy:
    def __len__(self):
        return 40

    def __iter__(self):
        return iter(np.random.permutation(40))  # noqa: NPY002 as users' samplers do


@pytest.mark.parametrize("seed", [1, 2])
def test_a_sampler_that_does_not_repeat_its_order_is_refused_on_resuming(seed):
    np.random.seed(1)  # noqa: NPY002
    first = AdaptiveDataLoader(Numbers(40), 4, sampler=FromNumPy())
    head, state = drawn(first, stop=3), first.state_dict()
    resumed = AdaptiveDataLoader(Numbers(40), 4, sampler=FromNumPy())
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    np.random.seed(seed)  # noqa: NPY002
    if seed == 1:
        assert sorted(flat(head + drawn(resumed))) == list(range(40))
        return
    with pytest.raises(RuntimeError, match=r"FromNumPy does not repeat.*generator"):
        drawn(resumed)


def with_lock(at):
    return threading.Lock(), torch.full((2,), float(at))


NOT_COPIED = {  # nor can torch say whether some of them are equal
    "nested": lambda at: torch.nested.nested_tensor([torch.full((2,), float(at))]),
    "jagged": lambda at: torch.nested.nested_tensor(
        [torch.full((2,), float(at))], layout=torch.jagged),
    "csr": lambda at: (at * torch.eye(3)).to_sparse_csr(),
    "coo": lambda at: (at * torch.eye(3)).to_sparse(),
    "a lock": with_lock,
    "a generator": lambda at: ((x for x in range(at)), torch.full((2,), float(at))),
}


def listed(samples):
    return [sample if isinstance(sample, torch.Tensor) else sample[1] for sample in samples]


@pytest.mark.filterwarnings("ignore:Sparse C", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", NOT_COPIED.values(), ids=NOT_COPIED)
def test_samples_that_cannot_be_copied_or_compared(make, workers):
    samples = [make(at) for at in range(8)]
    loader = AdaptiveDataLoader(samples, 3, num_workers=workers, collate_fn=listed)
    sums = []
    for batch in loader:
        sums += [float(dense(tensor).sum()) for tensor in batch]
        loader.batch_size = 2
    assert sums == [float(dense(tensor).sum()) for tensor in listed(samples)]


def dense(tensor):
    if tensor.is_nested:
        return tensor.unbind()[0]
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def as_csr(samples):
    return torch.stack(samples).to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse C", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("collate_fn", [torch.nested.nested_tensor, as_csr], ids=["nested", "csr"])
def test_batches_that_torch_does_not_cut_are_refused_with_the_fix(collate_fn):
    samples = [torch.ones(2) for _ in range(8)]
    loader = AdaptiveDataLoader(samples, 3, num_workers=2, collate_fn=collate_fn)
    batches = iter(loader)
    next(batches)
    loader.batch_size = 2
    with pytest.raises(ValueError, match=r"does not cut nested.*collate_in='consumer'"):
        list(batches)
    loader = AdaptiveDataLoader(
        samples, 3, num_workers=2, collate_fn=collate_fn, collate_in="consumer")
    assert [batch.size(0) for batch in loader] == [3, 3, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_sparse_batches_are_cut_and_joined(workers):
    samples = [at * torch.eye(3) for at in range(9)]
    loader = AdaptiveDataLoader(samples, 3, num_workers=workers, collate_fn=as_coo)
    drawn = []
    for batch in loader:
        drawn += [each.to_dense() for each in batch]
        loader.batch_size = 2 if loader.batch_size == 3 else 4
    torch.testing.assert_close(torch.stack(drawn), torch.stack(samples))


def as_coo(samples):
    return torch.stack(samples).to_sparse()


SAMPLES = {
    "numbers": lambda i: i,
    "pairs": lambda i: (torch.full((3,), float(i)), i),
    "dtypes": lambda i: torch.tensor(i) if i > 30 else torch.tensor(float(i)),
    "optional-keys": lambda i: {"x": i, **({"y": i} if i >= 32 else {})},
    "shapes": lambda i: torch.zeros(1 + i // 8) + i,
}
COLLATES = {"default": None, "count": lambda rows: (len(rows), rows), "first": lambda rows: rows[0]}


class Made(Numbers):
    def __init__(self, n, make):
        super().__init__(n)
        self.make = make

    def __getitem__(self, index):
        return self.make(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collate_fn", COLLATES.values(), ids=COLLATES)
@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_batches_of_a_constant_size_are_those_of_a_data_loader(make, collate_fn, workers):
    if workers and collate_fn is None and make is SAMPLES["optional-keys"]:
        pytest.skip("refused where chunks of unlike keys are joined")
    order = random.Random(0).choices(range(64), k=72) if make is SAMPLES["numbers"] else None
    theirs, ours = (
        kind(Made(64, make), batch_size=8, num_workers=workers, collate_fn=collate_fn,
             sampler=order) for kind in (DataLoader, AdaptiveDataLoader))
    for _ in range(2):
        mine, plain = list(ours), list(theirs)
        assert repr(mine) == repr(plain)
        dtypes = [[leaf.dtype for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
                  for batch in (mine, plain)]
        assert dtypes[0] == dtypes[1]
