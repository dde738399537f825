"""Faster collating gives what torch's default_collate gives, its errors included; chunks of several batches are cut as if each had been made on its own."""

from collections import namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import collate

from adabatch import AdaptiveDataLoader
from adabatch.data.chunks import Pace, Reply
from adabatch.data.collating import Stacked, fast_collate_for, quick_collate
from tests.data.test_joining import same

Pair = namedtuple("Pair", "first second")


class Marked(torch.Tensor):
    pass


def samples_of(make, n=7):
    return [make(torch.arange(6.0).view(2, 3) + 10 * index, index) for index in range(n)]


ALIKE = {
    "tensor": lambda x, i: x,
    "scalar": lambda x, i: torch.tensor(i),
    "tuple": lambda x, i: (x, torch.tensor(i)),
    "tuple-of-one": lambda x, i: (x,),
    "empty-tuple": lambda x, i: (),
    "no-elements": lambda x, i: torch.empty(0, 3),
    "transposed": lambda x, i: (x.t(), torch.tensor(i, dtype=torch.uint8)),
    "with-number": lambda x, i: (x, i),
    "list": lambda x, i: [x, torch.tensor(i)],
    "namedtuple": lambda x, i: Pair(x, torch.tensor(i)),
    "dict": lambda x, i: {"x": x, "i": i},
    "numpy": lambda x, i: x.numpy(),
    "nested": lambda x, i: (x, (x, i)),
    "subclass": lambda x, i: x.as_subclass(Marked),
    "dtypes": lambda x, i: x if i < 5 else x.double(),
    "bool": lambda x, i: (x > 12, x.half()),
    "parameter": lambda x, i: torch.nn.Parameter(x),
    "requires-grad": lambda x, i: (x.requires_grad_(),),
}


def stacked(samples, sizes=(3, 1, 3)):
    batch = Stacked(len(samples))
    for start, stop in pairwise([0, *np.cumsum(sizes).tolist()]):
        batch.add(samples[start:stop])
    return batch.result()


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("ours", [quick_collate, stacked])
def test_as_default_collate(make, ours):
    same(ours(samples_of(make)), default_collate(samples_of(make)))


UNLIKE = {
    "shapes": lambda x, i: x[:, : 3 - i // 4],
    "lengths": lambda x, i: (x,) * (1 + i // 4),
    "types": lambda x, i: (x, x) if i < 4 else (x, "a"),
    "tuple-or-not": lambda x, i: (x, x) if i < 4 else 7,
    "unknown": lambda x, i: object(),
}


@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("ours", [quick_collate, stacked])
def test_as_default_collates_errors(make, ours):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 whatever it is
        default_collate(samples_of(make))
    with pytest.raises(theirs.type):
        ours(samples_of(make))


def test_what_a_user_registers_with_torch_holds(monkeypatch):
    assert fast_collate_for(default_collate) is quick_collate
    monkeypatch.setitem(collate.default_collate_fn_map, torch.Tensor, lambda batch, *, collate_fn_map=None: list(batch))
    assert fast_collate_for(default_collate) is default_collate
    loader = AdaptiveDataLoader(torch.arange(4), 2)
    assert [type(batch) for batch in loader] == [list, list]


class Pictures(Dataset):
    """12 kB each, one of another shape if asked for."""

    def __init__(self, n, odd=None):
        self.n, self.odd = n, odd

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        picture = torch.full((3, 32, 32 + (index == self.odd)), float(index)) + torch.rand(())
        return picture, torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_are_those_of_small_ones(workers):
    def epoch(size, workers=0):
        return [torch.cat(column) for column in zip(*AdaptiveDataLoader(Pictures(900), size, seed=2, num_workers=workers), strict=True)]

    small = epoch(10)
    assert torch.equal(small[0][:, 0, 0, 0].long(), torch.arange(900))
    # The first chunk shows how large samples are, the second is stacked some at a time.
    for columns in zip(small, epoch(400, workers), strict=True):
        assert torch.equal(*columns)


def test_a_picture_of_another_shape_in_a_large_batch():
    loader = AdaptiveDataLoader(Pictures(900, odd=700), 400)
    with pytest.raises(RuntimeError, match="equal size"):
        list(loader)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_batches_cut_from_one_chunk_are_like_those_of_a_plain_loader(size):
    loader = AdaptiveDataLoader(torch.arange(3000.0).view(-1, 3), size, num_workers=2)
    plain = DataLoader(torch.arange(3000.0).view(-1, 3), size)
    for _ in range(2):  # the pace is known in the second epoch
        previous = None
        for ours, theirs in zip(loader, plain, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() % 64 == 0
            assert previous is None or bool((previous == -1).all())
            previous = ours.fill_(-1)
    assert loader._pace.least > size


def test_chunks_grow_only_where_batches_do_not_depend_on_them():
    assert AdaptiveDataLoader(torch.arange(3), num_workers=1)._pace is not None
    assert AdaptiveDataLoader(torch.arange(3), num_workers=1, collate_fn=torch.stack, collate_in="consumer")._pace is not None
    assert AdaptiveDataLoader(torch.arange(3), num_workers=1, collate_fn=torch.stack)._pace is None
    assert AdaptiveDataLoader(torch.arange(3))._pace is None


def test_the_pace_is_bound_by_time_and_by_memory():
    slow, large, varied = Pace(), Pace(), Pace()
    assert slow.least == 1
    slow.measure(Reply(None, 4, seconds=0.4, nbytes=40))
    large.measure(Reply(None, 4, seconds=4e-6, nbytes=2**23))
    assert (slow.least, large.least) == (1, 4)
    varied.measure(Reply(None, 10, seconds=1e-3, nbytes=100))
    for size in [100, 101] * 4:
        varied.asked(size)
    assert varied.least == 320
    for _ in range(20):
        varied.asked(101)
    assert varied.least == 40
