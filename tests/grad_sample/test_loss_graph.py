"""Parameters that the loss uses where no tap sees it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from adabatch import AdaptiveDataLoader, GradSampleHooks
from adabatch.grad_sample.backward.verify import unseen_uses
from tests.options import make_scheduler


def embedding_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.ReLU(inplace=True))


LOSSES = {
    "tied head in the loss function": (lambda model, outputs: linear(outputs, model[0].weight).square().mean(), ["0.weight"]),
    "penalty": (lambda model, outputs: outputs.square().mean() + sum(p.square().sum() for p in model[1].parameters()), ["1.weight", "1.bias"]),
    "plain": (lambda model, outputs: outputs.square().mean(), []),
    "penalty on the activations": (lambda model, outputs: outputs.square().mean() + outputs.abs().sum(), []),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("dims", [(5,), (5, 3)])
def test_parameters_used_between_the_taps_and_the_loss_are_named(case, dims):
    loss_of, unseen = LOSSES[case]
    model = embedding_model()
    hooks = GradSampleHooks(model)
    ids = torch.randint(0, 7, dims)
    loss = loss_of(model, model(ids))
    loss.backward()
    if not unseen:
        hooks.check_loss(loss)
        return
    with pytest.raises(RuntimeError, match=rf"no tap sees them: {', '.join(unseen)}\. .*weight_decay"):
        hooks.check_loss(loss)


def test_a_compiled_model_raises_no_false_alarm():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    hooks = GradSampleHooks(model)
    loss = torch.compile(model, backend="aot_eager")(torch.randn(6, 4)).square().mean()
    loss.backward()
    hooks.check_loss(loss)
    assert hooks.collect().batch_size == 6


def test_the_walk_finds_each_parameter_once_and_in_order():
    weights = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2)), "c": nn.Parameter(torch.ones(2))}
    loss = (weights["b"] * weights["a"] + weights["a"]).sum()
    assert unseen_uses(loss, weights) == ["a", "b"]


def test_the_scheduler_looks_at_the_loss():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaptiveDataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=16)
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model))
    (inputs,) = next(iter(loader))
    loss = model(inputs).square().mean() + model.weight.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="the loss uses these parameters"):
        scheduler.step(loss)
