"""What ResizableBatchSampler accepts as arguments and as states, and what it says of the rest."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

from adabatch import ResizableBatchSampler


@pytest.mark.parametrize(
    ("value", "error"),
    [*((value, ValueError) for value in (0, -1)),
     *((value, TypeError) for value in (2.5, math.nan, True, None, "8"))],
)
def test_a_wrong_batch_size_is_named_and_changes_nothing(value, error):
    with pytest.raises(error, match=f"batch_size must be an integer >= 1, got {value!r}"):
        ResizableBatchSampler(10, value)
    sampler = ResizableBatchSampler(10, 4)
    with pytest.raises(error, match=f"batch_size must be an integer >= 1, got {value!r}"):
        sampler.batch_size = value
    assert sampler.batch_size == 4


def test_numpys_and_torchs_integers_are_batch_sizes():
    sampler = ResizableBatchSampler(np.int64(10), np.int32(4))
    assert type(sampler.batch_size) is int
    sampler.batch_size = torch.tensor(5)
    assert [type(sampler.batch_size), sampler.batch_size] == [int, 5]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"data_source": -1}, ValueError, "data_source .* got -1"),
        ({"data_source": 2.5}, TypeError, "data_source must have a length"),
        ({"data_source": None}, TypeError, "data_source must have a length"),
        ({"data_source": Endless()}, TypeError, "iterable-style"),
        ({"data_source": iter([1, 2])}, TypeError, "used up"),
        ({"sampler": iter([1, 2])}, TypeError, "used up"),
        ({"sampler": 5}, TypeError, "got 5 of type int"),
        ({"sampler": BatchSampler(SequentialSampler(range(4)), 2, False)}, TypeError, "batch sam"),
        ({"sampler": [1, 2], "shuffle": True}, ValueError, "decides the order: omit it or shuffle"),
        ({"seed": -3}, ValueError, "seed .* got -3"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False, got 1"),
        ({"drop_last": "no"}, TypeError, "drop_last must be True or False, got 'no'"),
    ],
)
def test_a_wrong_argument_is_explained(arguments, error, text):
    with pytest.raises(error, match=text):
        ResizableBatchSampler(**{"data_source": 10, "batch_size": 4, **arguments})


@pytest.mark.parametrize("epoch", [-1, 1.0, True])
def test_a_wrong_epoch_is_explained(epoch):
    with pytest.raises((TypeError, ValueError), match="epoch must be an integer"):
        ResizableBatchSampler(10, 4).set_epoch(epoch)


def test_the_state_is_plain_numbers():
    sampler = ResizableBatchSampler(10, 4, shuffle=True, seed=2**64 - 1)
    next(iter(sampler))
    assert sampler.state_dict() == {
        "version": 1,
        "epoch": 0,
        "position": 4,
        "batch_size": 4,
        "num_samples": 10,
        "shuffle": True,
        "seed": 2**64 - 1,
        "sampler": None,
        "generator": None,
        "batches": 1,
            "order": 0,
    }


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"version": 2}, ValueError, "has version 2.*reads version 1"),
        ({"num_samples": 11}, ValueError, "num_samples: saved 11, here 10"),
        ({"shuffle": True}, ValueError, "shuffle: saved True, here False"),
        ({"sampler": {}}, ValueError, "sampler with a state_dict: saved True"),
        ({"generator": torch.zeros(1)}, ValueError, "sampler with a generator: saved True"),
        ({"extra": 1}, ValueError, "extra"),
        ({"position": -1}, ValueError, "position"),
        ({"epoch": 0.5}, TypeError, "epoch"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(change, error, text):
    sampler = ResizableBatchSampler(10, 4)
    next(iter(sampler))
    before = sampler.state_dict()
    with pytest.raises(error, match=text):
        sampler.load_state_dict({**ResizableBatchSampler(10, 7, seed=5).state_dict(), **change})
    assert sampler.state_dict() == before


def test_a_state_without_version_or_with_entries_missing_is_refused():
    sampler = ResizableBatchSampler(10, 4)
    with pytest.raises(ValueError, match="has version None"):
        sampler.load_state_dict({})
    with pytest.raises(ValueError, match="must have the entries"):
        sampler.load_state_dict({"version": 1})
