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
    "tied head in the loss function": (
        lambda model, outputs: linear(outputs, model[0].weight).square().mean(), ["0.weight"]),
    "penalty": (
        lambda model, outputs: outputs.square().mean()
        + sum(p.square().sum() for p in model[1].parameters()), ["1.weight", "1.bias"]),
    "plain": (lambda model, outputs: outputs.square().mean(), []),
    "penalty on the activations": (
        lambda model, outputs: outputs.square().mean() + outputs.abs().sum(), []),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("dims", [(5,), (5, 3)])
def test_parameters_used_between_the_taps_and_the_loss_are_named(case, dims):
    loss_of, unseen = LOSSES[case]
    model = embedding_model()
    hooks = GradSampleHooks(model)
    ids = torch.randint(0, 7, dims)
    loss = loss_of(model, model(ids))
    if not unseen:
        loss.backward()
        hooks.check_loss(loss)
        return
    message = rf"no tap sees them: {', '.join(unseen)}\. .*weight_decay"
    with pytest.raises(RuntimeError, match=message):
        hooks.check_loss(loss)
    with pytest.raises(RuntimeError, match=rf"parameters: {', '.join(unseen)}\. .*weight_decay"):
        loss.backward()  # a training loop that gives the loss as a number


def test_a_compiled_model_raises_no_false_alarm():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    hooks = GradSampleHooks(model)
    loss = torch.compile(model, backend="aot_eager")(torch.randn(6, 4)).square().mean()
    loss.backward()
    hooks.check_loss(loss)
    assert hooks.collect().batch_size == 6


def test_the_walk_finds_each_parameter_once_and_in_order():
    weights = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
    loss = (weights["b"] * weights["a"] + weights["a"]).sum()
    assert unseen_uses(loss, weights) == ["a", "b"]


def test_the_scheduler_looks_at_the_loss():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaptiveDataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=16)
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model))
    (inputs,) = next(iter(loader))
    loss = model(inputs).square().mean() + model.weight.square().sum()
    model.weight.grad = torch.ones_like(model.weight)  # so that it is not compared
    loss.backward()
    with pytest.raises(RuntimeError, match="the loss uses these parameters"):
        scheduler.step(loss)


# -- contributions add up to the gradient


class Scaled(nn.Module):
    """A layer without a rule: weight * f(x)."""

    def __init__(self, function, width=6):
        super().__init__()
        self.weight, self._function = nn.Parameter(torch.rand(width) + 0.5), function

    def forward(self, x):
        return self.weight * self._function(x)


MIXING = {
    "30 % of the mean": lambda x: 0.7 * x + 0.3 * x.mean(0, keepdim=True),
    "30 % of the neighbour": lambda x: 0.7 * x + 0.3 * x.roll(1, 0),
    "centred": lambda x: x - x.mean(0, keepdim=True),
    "by the batch's length": lambda x: x / x.norm() * x.shape[0] ** 0.5,
}
SEPARATE = {
    "itself": lambda x: x,
    "a hand-written norm": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    "tanh of exp": lambda x: torch.tanh(torch.exp(x) - 1),
    "softmax": lambda x: x.softmax(-1) * x.shape[-1],
}
# {type: passes within which mixing shows}: bfloat16's rounding may hide it in single ones.
PRECISIONS = {torch.float32: 1, torch.bfloat16: 16}


def stepped(function, dtype, samples, positions, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), Scaled(function), nn.Linear(6, 3)).to(dtype)
    hooks = GradSampleHooks(model)
    shape = (samples, 6) if positions is None else (samples, positions, 6)
    for _ in range(PRECISIONS[dtype]):
        model.zero_grad()
        (model(torch.randn(shape, dtype=dtype)).float() - 1).square().mean().backward()
        moments = hooks.collect()
    return moments


@pytest.mark.parametrize("positions", [None, 9])
@pytest.mark.parametrize("samples", [4, 8, 64])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("function", MIXING.values(), ids=MIXING)
def test_a_layer_that_mixes_samples_is_refused_in_every_precision(
    function, dtype, samples, positions
):
    for seed in range(5):
        with pytest.raises(RuntimeError, match=r"do not add up to the gradient.*2\.weight"
                           "|2 gives other values when it is run again"):
            stepped(function, dtype, samples, positions, seed)


@pytest.mark.parametrize("positions", [None, 9])
@pytest.mark.parametrize("samples", [2, 8, 256])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("function", SEPARATE.values(), ids=SEPARATE)
def test_rounding_is_no_false_alarm(function, dtype, samples, positions):
    for seed in range(5):
        assert stepped(function, dtype, samples, positions, seed).batch_size == samples


@pytest.mark.parametrize("function", SEPARATE.values(), ids=SEPARATE)
def test_autocast_is_no_false_alarm(function):
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6), Scaled(function), nn.Linear(6, 3))
        hooks = GradSampleHooks(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(torch.randn(32, 5, 6)).float() - 1).square().mean()
        loss.backward()
        assert hooks.collect().batch_size == 32
