"""Runs with and without micro-batches, of the same loop."""

import torch
from torch import nn
from torch.optim import SGD

import adabatch
from adabatch.data import AdaptiveDataLoader
from tests.options import grouped
from tests.scripted import Indexed, Proposals

SIZES = (20, 7, 33, 12, 1, 40, 5, 23)
LOSSES = {
    "mean": lambda outputs, targets: (outputs - targets).square().mean(),
    "sum": lambda outputs, targets: (outputs - targets).square().sum() / 100,
}


def make(
    limit=None, *, proposals=SIZES, optimizer=SGD, lr=0.05, model=None, loss_reduction="mean",
    loader_options=None, n=240, **options,
):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    inner = optimizer(model.parameters(), lr=lr)
    data = Indexed(n)
    data.inputs, data.targets = data.inputs.double(), data.targets.double()
    loader = AdaptiveDataLoader(data, 16, **(loader_options or {}))
    if callable(options.get("lr_scheduler")):
        options["lr_scheduler"] = options["lr_scheduler"](inner)
    options = {
        "min_batch_size": 1, "max_batch_size": 64, "max_micro_batch_size": limit, **options,
    }
    parts = adabatch.wrap(
        model, inner, loader, controller=Proposals(*proposals), loss_reduction=loss_reduction,
        **grouped(**options),
    )
    return model, *parts


def train(
    model, optimizer, loader, scheduler, reduction="mean", zero="first", epochs=1, scaler=None
):
    """The loop as it is without micro-batches; (indices of each piece, the weights after each)."""
    pieces, weights = [], []
    for _ in range(epochs):
        for indices, inputs, targets in loader:
            if zero == "first":
                optimizer.zero_grad()
            loss = LOSSES[reduction](model(inputs), targets)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            scheduler.step(loss)
            if zero == "last":
                optimizer.zero_grad()
            pieces.append(indices.tolist())
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return pieces, weights
