"""Sums, concatenations and products of traced parameters with samples, differentiated without
running them again: exact, and else run again as before."""

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.grad_sample.functional import traced_op as recipes
from tests import oracle
from tests.grad_sample.measuring import TOLERANCE, agrees, backward

N, T, D = 5, 3, 4
SHAPES = {"token": (1, 1, D), "table": (1, T, D), "long": (T + 2, D), "scale": (D,), "number": (1,)}
DIRECT = {
    "added": lambda p, x: x + p["table"],
    "added on the left": lambda p, x: p["table"] + x,
    "a vector": lambda p, x: x + p["scale"],
    "a number": lambda p, x: torch.add(x, p["number"]),
    "in place": lambda p, x: (2 * x).add_(p["table"]),
    "subtracted": lambda p, x: x - p["table"],
    "subtracted from": lambda p, x: p["scale"] - x,
    "rsub": lambda p, x: torch.rsub(x, p["table"]),
    "broadcasting the samples": lambda p, x: x[:, :1] + p["table"],
    "sliced": lambda p, x: x + p["long"][:T],
    "sliced and expanded": lambda p, x: x + p["long"][None, 1 : T + 1].expand(1, -1, -1),
    "one row": lambda p, x: x + p["long"][2],
    "concatenated": lambda p, x: torch.cat([
        p["token"].expand(len(x), -1, -1), x, p["long"].expand(len(x), -1, -1)], 1),
    "concatenated on the last dimension": lambda p,
    x: torch.cat((x, p["table"].expand(len(x), -1, -1)), dim=-1),
    "a token twice": lambda p, x: torch.cat([
        p["token"].expand(len(x), -1, -1), x, p["token"].expand(len(x), 2, -1)], 1),
    "expanded, then added": lambda p, x: x + p["scale"].expand(len(x), T, D),
    "multiplied": lambda p, x: x * p["scale"],
    "multiplied on the left": lambda p, x: p["table"] * x,
    "multiplied by a number": lambda p, x: x * p["number"],
    "used again": lambda p, x: (x + p["table"]) * p["scale"] + p["table"],
}
RUN_AGAIN = {
    "with a factor": lambda p, x: torch.add(x, p["table"], alpha=2),
    "doubled": lambda p, x: x + 2 * p["table"],
    "turned": lambda p, x: x + p["long"][:T].flip(0),
    "picked": lambda p, x: x + p["long"][torch.tensor([0, 0, 2])],
    "stacked": lambda p, x: torch.stack([x, p["token"].expand(len(x), T, D)], 1),
    "divided": lambda p, x: x / (p["scale"] + 9),
}


class Uses(nn.Module):
    """An operation between two layers, and no parameter that the operation does not use."""

    def __init__(self, operation):
        super().__init__()
        used = set(SHAPES)
        for name in SHAPES:
            shapes = {other: torch.ones(shape) for other, shape in SHAPES.items() if other != name}
            try:
                operation(shapes, torch.ones(N, T, D))
                used.remove(name)
            except KeyError:
                pass
        self.layer, self.operation = nn.Linear(D, D), operation
        self.own = nn.ParameterDict({name: nn.Parameter(torch.randn(SHAPES[name]))
                                     for name in sorted(used)})

    def forward(self, inputs):
        return self.operation(dict(self.own.items()), self.layer(inputs)).sin()


def losses(model, inputs):
    return (model(inputs).flatten(1) + 0.3).square().sum(1)


def is_exact(operation, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model, inputs = Uses(operation).to(dtype), torch.randn(N, T, D, dtype=dtype)
    grads = oracle.per_sample_grads(model, losses, inputs)
    hooks = GradSampleHooks(model, **options)
    for _ in range(2):
        model.zero_grad()
        backward(model, inputs, losses)
        agrees(hooks.collect(), grads, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"samples": 3}], ids=str)
@pytest.mark.parametrize("how", DIRECT)
def test_exact_and_nothing_is_run_again(how, options, dtype, monkeypatch):
    monkeypatch.setattr(recipes, "per_sample_grads", None)
    is_exact(DIRECT[how], dtype, **options)


@pytest.mark.parametrize("how", RUN_AGAIN)
def test_what_is_not_so_simple_is_run_again(how):
    is_exact(RUN_AGAIN[how])
