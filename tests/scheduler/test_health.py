"""What a loop forgets is told of: zero_grad(), bounds beyond the data set, a scheduler that is there already."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from tests.scripted import regression


def train(zero_grad, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = DataLoader(regression(96, width=3), batch_size=16)
    optimizer, loader, scheduler = adabatch.wrap(model, SGD(model.parameters(), lr=1e-3), loader, measure="all", batch_sizes=(16, 16), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs, targets in loader:
            if zero_grad:
                optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
    return [(str(warning.message), warning.filename) for warning in caught if "something else" in str(warning.message)]


def test_a_forgotten_zero_grad_is_told_of_once_where_step_is_called():
    (told,) = train(zero_grad=False)
    assert "optimizer.zero_grad()" in told[0]
    assert told[1] == __file__
    assert train(zero_grad=True) == []


def test_bounds_beyond_the_data_set():
    model = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match="an epoch has 7 samples, less than the smallest batch of 16"):
        adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(regression(7, width=3), batch_size=4))


def test_one_scheduler_at_a_time():
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(regression(64, width=3), batch_size=16)
    first = adabatch.wrap(model, optimizer, loader)[2]
    with pytest.raises(ValueError, match=r"measured already: call remove\(\)"):
        adabatch.wrap(model, optimizer, loader)
    first.remove()
    adabatch.wrap(model, optimizer, loader)
