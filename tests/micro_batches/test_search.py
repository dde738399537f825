"""The largest micro-batch that fits."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Adam

import adabatch
from adabatch.data import AdaptiveDataLoader
from adabatch.micro_batches.optimizer import MicroBatching
from tests.micro_batches.runs import LOSSES, make


def test_auto_finds_the_largest_that_fits_and_restores_everything():
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1)
    model = nn.Sequential(*layers).double()
    tried = []

    def loss_fn(model, batch):
        tried.append(len(batch[1]))
        if len(batch[1]) > 21:
            raise torch.OutOfMemoryError("a fake")
        return LOSSES["mean"](model(batch[1]), batch[2])

    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"estimator": "micro_batch", "max_batch_size": 200, "loss_fn": loss_fn}
        _, optimizer, loader, _ = make("auto", model=model, optimizer=Adam, **options)
    assert loader.micro_batches.limit == int(21 * 0.9)
    assert tried[:5] == [2, 4, 8, 16, 32]
    assert max(tried) == 32
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auto_with_room_for_the_largest_batch():
    def loss_fn(model, batch):
        return model(batch[1]).mean()

    loader = make("auto", loss_fn=loss_fn, max_batch_size=50)[2]
    assert loader.micro_batches.limit == 50


@pytest.mark.parametrize("sharded", [False, True])
def test_the_largest_micro_batch_of_one_in_many(sharded, monkeypatch):
    loader = AdaptiveDataLoader(torch.ones(40, 1), 12, rank=1, world_size=3)
    model, tried = nn.Linear(1, 1), []
    monkeypatch.setattr("adabatch.micro_batches.optimizer.is_sharded", lambda parameter: sharded)

    def loss_fn(model, batch):
        tried.append(len(batch))
        return model(batch).mean()

    micro = MicroBatching(loader, "auto", 1, "per_sample", loss_fn)
    optimizer, hooks = torch.optim.SGD(model.parameters(), lr=0.1), adabatch.GradSampleHooks(model)
    if sharded:
        with pytest.raises(ValueError, match="on a sharded model"):
            micro.find_limit(model, optimizer, hooks, 32)
        return
    micro.find_limit(model, optimizer, hooks, 32)
    assert max(tried) == loader.micro_batches.limit == 11
