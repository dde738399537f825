"""Resumed from any position, a run ends as if it had never stopped: the same samples, sizes, rates
and weights, bit for bit."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import Dataset

import adabatch
from tests.data.streams import through_a_file


class Noisy(Dataset):
    """Rows of 20 bytes, so that batches cut out of others do not begin where those begin that are
    made on their own."""

    def __init__(self, n=150):
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(n, 5, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return index, self.points[index] + 0.1 * torch.randn(5), self.labels[index]


class Growing(adabatch.controllers.Controller):
    """Sizes that go up and down, from the number of steps alone."""

    def __init__(self):
        self.steps = 0

    def propose(self, moments, *, loss, lr):
        self.steps += 1
        return 4 + 14 * (math.sin(self.steps) + 1)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def build(workers, limit, collate_in):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = adabatch.AdaptiveDataLoader(Noisy(), 16, True, num_workers=workers,
                                         collate_in=collate_in,
        seed_samples=True)
    schedule = ExponentialLR(optimizer, 0.97)
    micro_batches = adabatch.MicroBatches(limit, lr_scheduler=schedule)
    options = {"batch_sizes": (4, 32), "micro_batches": micro_batches, "coupling": "sqrt"}
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, controller=Growing(),
                                                 **options)
    return {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "loader": loader,
            "scheduler": scheduler}


def run(parts, seen, states=None):
    """Two epochs; states is given the state before the first step, after each step, and after each
    epoch."""
    model, optimizer, loader, scheduler = (parts[name] for name in ("model", "optimizer", "loader",
                                                                    "scheduler"))

    def keep():
        if states is not None:
            states.append(through_a_file({"run": adabatch.state_dict(**parts), "seen": seen}))

    keep()
    batch = []
    while loader.batch_sampler.epoch < 2:
        for indices, inputs, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            batch += indices.tolist()
            if loader.is_last_micro_batch:
                seen.append((batch, scheduler.get_last_lr()))
                batch = []
                keep()
        keep()
    return {"seen": seen, "run": through_a_file(adabatch.state_dict(**parts))}


def differences(one, other, path=""):
    if isinstance(one, dict) and one.keys() == other.keys():
        return [found for key in one if key != "seconds"
                for found in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [found for index, pair in enumerate(zip(one, other, strict=True))
                for found in differences(*pair, f"{path}[{index}]")]
    if isinstance(one, Tensor):
        return [] if torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) else [path]
    return [] if one == other or (one != one and other != other) else [path]


def check(workers, limit, collate_in, every):
    states = []
    expected = run(build(0, limit, collate_in), [], states)
    assert sorted(
        index for batch, _ in expected["seen"] for index in batch
    ) == sorted([*range(150)] * 2)
    assert len({len(batch) for batch, _ in expected["seen"]}) > 5
    for position in range(0, len(states), every):
        parts, state = build(workers, limit, collate_in), copy.deepcopy(states[position])
        adabatch.load_state_dict(state["run"], **parts)
        assert differences(expected, run(parts, state["seen"])) == [], position


@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
@pytest.mark.parametrize("limit", [None, 7])
def test_from_every_position(limit, collate_in):
    check(0, limit, collate_in, 1)


@pytest.mark.parametrize("limit", [None, 7])
def test_with_workers(limit):
    check(2, limit, "worker", 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("workers", [1, 2])
def test_from_every_position_with_workers(workers, limit, collate_in):
    check(workers, limit, collate_in, 1)
