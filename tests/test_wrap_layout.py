"""wrap with the layout that adabatch.check found: samples not along dimension 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from tests import oracle


class TimeFirst(nn.Module):
    """Runs its layers over [T, N, ...]."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 1)

    def forward(self, inputs):
        return self.outer(torch.tanh(self.inner(inputs.transpose(0, 1)))).mean(0)


def losses(model, batch):
    return model(batch[0]).square().sum(1)


def test_a_time_first_model_is_measured_exactly_with_the_layout_that_check_found():
    torch.manual_seed(0)
    model, inputs = TimeFirst(), torch.randn(48, 5, 3)
    truth = oracle.variance_trace(oracle.per_sample_grads(model, losses, (inputs[:16],)))
    layout = adabatch.check(model, (inputs[:6],), losses, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, loader, scheduler = adabatch.wrap(
        model, optimizer, DataLoader(TensorDataset(inputs), 16),
        estimator=adabatch.PerSample(layout=layout))
    batch = next(iter(loader))
    loss = losses(model, batch).mean()
    loss.backward()
    scheduler.step(loss)
    assert scheduler.diagnostics.latest.variance_trace == pytest.approx(float(truth), rel=1e-5)


def test_without_the_layout_the_step_is_refused():
    model, inputs = TimeFirst(), torch.randn(48, 5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, loader, _ = adabatch.wrap(model, optimizer, DataLoader(TensorDataset(inputs), 16))
    with pytest.raises(RuntimeError, match=r"adabatch\.check"):
        losses(model, next(iter(loader)))


class Mixing(nn.Module):
    """Its second layer sees a mean over the samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, inputs):
        hidden = self.inner(inputs)
        return self.outer((hidden - hidden.roll(1, 0)).flip(0))


def test_layers_that_check_refused_are_refused_unless_ignored():
    torch.manual_seed(0)
    model, inputs = Mixing(), torch.randn(48, 3)
    layout = adabatch.check(model, (inputs[:6],), losses, verbose=False)
    assert layout.refused
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=rf"leave them out with ignore=.*{next(iter(layout.refused))}"
    ):
        adabatch.wrap(
            model, optimizer, DataLoader(TensorDataset(inputs), 16),
            estimator=adabatch.PerSample(layout=layout))
