"""The largest micro-batch that fits."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import adabatch
from adabatch.data import AdaptiveDataLoader
from adabatch.micro_batches.optimizer import MicroBatching
from adabatch.micro_batches.search import find_micro_batch_size
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


@pytest.mark.parametrize(("loss_fn", "error", "message"), [
    (lambda model, batch: None, TypeError, "got NoneType: return it"),
    (lambda model, batch: 0.5, TypeError, "got float"),
    (lambda model, batch: model(batch), ValueError, "take the mean of losses"),
    (lambda model, batch: model(batch).mean().detach(), ValueError, "requires_grad=False"),
])
def test_what_is_no_scalar_loss_is_refused(loss_fn, error, message):
    model = nn.Linear(2, 1)
    loader = AdaptiveDataLoader(torch.randn(9, 2), batch_size=4)
    parts = model, SGD(model.parameters(), lr=0.1), loader
    with pytest.raises(error, match=rf"loss_fn\(model, batch\) must return.*{message}"):
        find_micro_batch_size(*parts, loss_fn, largest=8)
    assert find_micro_batch_size(*parts, lambda *given: model(given[1]).mean(), largest=8) == 8
