"""A controller with a given list of proposals, and models on which every quantity is known."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset, TensorDataset

import adabatch
from adabatch import AdaptiveDataLoader, GradSampleHooks
from tests.options import grouped, make_scheduler


class Proposals(adabatch.controllers.Controller):
    """Returns the proposals in turn, then the last one; `passed`: the arguments of each call."""

    needs_effective_lr, needs_moments, effective_lr = False, True, None

    def __init__(self, *proposals, needs_effective_lr=False, effective_lr=None):
        self.proposals = list(proposals)
        self.needs_effective_lr, self.effective_lr = needs_effective_lr, effective_lr
        self.passed: list[dict] = []

    def propose(self, moments, *, loss, lr):
        self.passed.append({"moments": moments, "loss": loss, "lr": lr})
        return self.proposals[min(len(self.passed), len(self.proposals)) - 1]

    def state_dict(self):
        return {"version": 1, "n_calls": len(self.passed)}

    def load_state_dict(self, state):
        self.passed = [{}] * state["n_calls"]


class Slope(nn.Module):
    """The mean output has gradient 1 in its one weight, whatever the batch: each step of SGD moves
    the weight by exactly the lr."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, inputs):
        return self.layer(inputs)

    @property
    def weight(self) -> float:
        return self.layer.weight.item()


def ones(n: int) -> TensorDataset:
    """Inputs of 1."""
    return TensorDataset(torch.ones(n, 1))


def regression(n: int, seed: int = 0, width: int = 3) -> TensorDataset:
    """Inputs [n, width] and noisy linear targets [n, 1]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, width, generator=generator)
    return TensorDataset(
        inputs, inputs.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator))


def slope_run(
    controller, n=400, batch_size=16, lr=1.0, accumulate=1, optimizer=SGD, loader_options=None,
    **options,
):
    """(model, optimizer, loader, scheduler) for the slope model."""
    model = Slope()
    stepping = optimizer(model.parameters(), lr=lr)
    loader = AdaptiveDataLoader(ones(n), batch_size, **(loader_options or {}))
    options = {"min_batch_size": 2, "max_batch_size": 64, **options}
    hooks = GradSampleHooks(
        model, accumulate=accumulate, loss_reduction=options.pop("loss_reduction", "mean"))
    return model, stepping, loader, make_scheduler(stepping, loader, hooks, controller, **options)


def steps(
    model, optimizer, loader, scheduler, n_steps=None, scheduler_first=False,
    loss_of=lambda outputs: outputs.mean(), after=lambda: None,
):
    """Trains for n_steps (None: one epoch); yields (samples, how far the weight moved) of each."""
    done = count(1)
    while True:
        for (inputs,) in loader:
            before = model.weight
            optimizer.zero_grad()
            loss = loss_of(model(inputs))
            loss.backward()
            if scheduler_first:
                scheduler.step(loss)
            optimizer.step()
            if not scheduler_first:
                scheduler.step(loss)
            after()
            yield len(inputs), before - model.weight
            if next(done) == n_steps:
                return
        if n_steps is None:
            return


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the batch of half the squared error."""
    return (outputs - targets).square().mean() / 2


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of each sample, [N], as the oracle takes it."""
    inputs, targets = batch
    return (model(inputs) - targets).square()[:, 0] / 2


class Indexed(Dataset):
    """Samples that carry their index: (index, inputs, target)."""

    def __init__(self, n=240):
        self.inputs, self.targets = regression(n).tensors

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return index, self.inputs[index], self.targets[index]


def wrapped(loader, controller=None, **options):
    """(model, optimizer, loader, scheduler) of a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    every_step = {} if {"samples", "every", "measure"} & options.keys() else {"measure": "all"}
    options = grouped(**{"min_batch_size": 4, "max_batch_size": 64, **every_step, **options})
    optimizer, controller = SGD(model.parameters(), lr=0.05), controller or Proposals(20, 7, 33, 12)
    return model, *adabatch.wrap(model, optimizer, loader, controller=controller, **options)


def train_epoch(model, optimizer, loader, scheduler):
    """One epoch; the indices of each batch."""
    batches = []
    for indices, inputs, targets in loader:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        batches.append(indices.tolist())
    return batches
