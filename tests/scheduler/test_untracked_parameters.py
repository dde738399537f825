"""Parameters unfrozen, or added to the optimizer, after wrap are told of: they are trained, but nothing measures them."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import adabatch
from tests.options import grouped
from tests.scripted import regression


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train(model, optimizer, change, **options):
    """Messages of the warnings of three steps, before the second of which the model is changed."""
    loader = DataLoader(regression(48, width=3), batch_size=16)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, measure="all", batch_sizes=(16, 16), **grouped(**options))
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


def test_unfrozen_parameters_are_told_of_once():
    model = network()
    model[0].requires_grad_(False)
    ((message, where),) = train(model, SGD(model.parameters(), lr=0.1), lambda: model[0].requires_grad_(True))
    assert message.startswith("2 parameters (of shapes [4, 3], [4]) are trained but not measured")
    assert "adabatch.wrap again" in message
    assert where == __file__


def test_parameters_added_to_the_optimizer_are_told_of():
    model = network()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    ((message, _),) = train(model, optimizer, lambda: optimizer.add_param_group({"params": model[2].parameters()}))
    assert message.startswith("2 parameters (of shapes [1, 4], [1]) are trained but not measured")


@pytest.mark.parametrize("ignore", [[], ["2"]])
def test_what_is_frozen_later_or_left_out_from_the_start_is_not(ignore):
    model = network()
    assert not train(model, SGD(model.parameters(), lr=0.1), lambda: model[0].weight.requires_grad_(False), ignore=ignore)


def test_what_is_frozen_for_a_while_is_measured_again():
    model = network()

    def freeze_and_unfreeze():
        model[0].requires_grad_(False)
        model[0].requires_grad_(True)

    assert not train(model, SGD(model.parameters(), lr=0.1), freeze_and_unfreeze)
