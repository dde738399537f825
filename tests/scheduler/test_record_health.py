"""What a loop forgets is reported: zero_grad(), bounds beyond the data set, a scheduler that is
there already; parameters that were unfrozen, or added to the optimizer, after wrap."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from tests.options import grouped
from tests.scripted import regression


def train(zero_grad, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = DataLoader(regression(96, width=3), batch_size=16)
    optimizer, loader, scheduler = adabatch.wrap(model, SGD(model.parameters(), lr=1e-3), loader,
                                                 measure="all", batch_sizes=(16, 16), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs, targets in loader:
            if zero_grad:
                optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
    found = [(str(warning.message), warning.filename) for warning in caught]
    return [(message, file) for message, file in found if "something else" in message]


def test_a_forgotten_zero_grad_is_reported_once_where_step_is_called():
    ((message, file),) = train(zero_grad=False)
    assert "optimizer.zero_grad()" in message
    assert file == __file__
    assert train(zero_grad=True) == []


def test_bounds_beyond_the_data_set():
    model = nn.Linear(3, 1)
    with pytest.warns(UserWarning,
                      match="an epoch has 7 samples, less than the smallest batch of 16"):
        adabatch.wrap(model, SGD(model.parameters(), lr=0.1),
                      DataLoader(regression(7, width=3), batch_size=4))


def test_one_scheduler_at_a_time():
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(regression(64, width=3), batch_size=16)
    first = adabatch.wrap(model, optimizer, loader)[2]
    with pytest.warns(UserWarning, match=r"was wrapped before.*scheduler\.remove\(\)"):
        second = adabatch.wrap(model, optimizer, loader)[2]
    first.remove()  # once more: nothing is left of it
    second.remove()
    adabatch.wrap(model, optimizer, loader)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train_and_change(model, optimizer, change, **options):
    """Messages of the warnings of three steps, before the second of which the model is changed."""
    loader = DataLoader(regression(48, width=3), batch_size=16)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, measure="all",
                                                 batch_sizes=(16, 16), **grouped(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, (inputs, targets) in enumerate(loader):
            if number == 1:
                change()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
    assert scheduler.step_count == 3
    return [(str(warning.message), warning.filename) for warning in caught]


def test_unfrozen_parameters_are_reported_once():
    model = network()
    model[0].requires_grad_(False)
    ((message, where),) = train_and_change(model, SGD(model.parameters(), lr=0.1),
                                lambda: model[0].requires_grad_(True))
    assert message.startswith("2 parameters (of shapes [4, 3], [4]) are trained but not measured")
    assert "adabatch.wrap again" in message
    assert where == __file__


def test_parameters_added_to_the_optimizer_are_reported():
    model = network()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    ((message, _),) = train_and_change(model, optimizer,
                            lambda: optimizer.add_param_group({"params": model[2].parameters()}))
    assert message.startswith("2 parameters (of shapes [1, 4], [1]) are trained but not measured")


@pytest.mark.parametrize("ignore", [[], ["2"]])
def test_what_is_frozen_later_or_left_out_from_the_start_is_not(ignore):
    model = network()
    assert not train_and_change(model, SGD(model.parameters(), lr=0.1),
                     lambda: model[0].weight.requires_grad_(False), ignore=ignore)


def test_what_is_frozen_for_a_while_is_measured_again():
    model = network()

    def freeze_and_unfreeze():
        model[0].requires_grad_(False)
        model[0].requires_grad_(True)

    assert not train_and_change(model, SGD(model.parameters(), lr=0.1), freeze_and_unfreeze)
