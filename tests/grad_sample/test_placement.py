"""Tracing that ends after the last use it has to find: exact as before, later uses are noticed.

Legend: N samples in a batch, T positions.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adabatch import GradSampleHooks
from adabatch.grad_sample.functional import ParameterTracer
from adabatch.interfaces import NotMeasured
from tests import oracle
from tests.grad_sample.measuring import agrees


class Model(nn.Module):
    """A table and a scale, then layers; `late` is applied after them, `between` before."""

    def __init__(self):
        super().__init__()
        self.positions, self.table = nn.Parameter(torch.randn(4, 3)), nn.Embedding(4, 3)
        self.scale = nn.Parameter(torch.randn(3))
        self.body, self.head = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
        self.extra = nn.Parameter(torch.randn(5))
        self.late = self.between = None
        self.traced = []

    def forward(self, x):
        x = x + self.positions + self.table(torch.arange(4))
        x = x if self.between is None else self.between(self, x)
        x = self.body(x * self.scale)
        self.traced[:] = [any(isinstance(mode, ParameterTracer) for mode in modes())]
        x = x if self.late is None else self.late(self, x)
        return self.head(x)


def modes():
    return torch.overrides._get_current_function_mode_stack()


def losses(model, x):
    return model(x).square().mean((1, 2))


def run(model, hooks, steps, before=lambda model, step: None):
    """(step, whether the end of the forward pass was traced, moments or NotMeasured, expected)."""
    for step in range(steps):
        before(model, step)
        x = torch.randn(6 + step % 3, 4, 3, dtype=torch.float64)
        model.zero_grad()
        losses(model, x).mean().backward()
        traced, = model.traced
        try:
            moments = hooks.collect()
        except NotMeasured as error:
            moments = error
        hooks.enabled = False
        expected = oracle.per_sample_grads(model, losses, x)
        hooks.enabled = True
        yield step, traced, moments, expected


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


def test_tracing_ends_after_the_last_use_of_passes_that_are_not_compared(model):
    hooks = GradSampleHooks(model, ignore=["extra"])
    seen = []
    for _, traced, moments, expected in run(model, hooks, 9):
        seen.append(traced)
        agrees(moments, {name: each for name, each in expected.items() if name != "extra"})
    assert seen == [True, True, False, True, False, False, False, True, False]


LATE = {
    "another parameter": lambda model, x: x * model.extra,
    "one of those before": lambda model, x: x + model.scale.sum(),
    "a layer's weight": lambda model, x: x * model.head.weight.sum(0),
}


@pytest.mark.parametrize("start", [2, 4, 5])
@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_use_that_begins_after_tracing_has_ended_leaves_out_a_step(model, late, start):
    hooks = GradSampleHooks(model)

    def before(model, step):
        if step == start:
            model.late = late

    for step, _, moments, expected in run(model, hooks, 9, before):
        if step == start and isinstance(moments, NotMeasured):
            assert "do not add up" in str(moments)
            continue
        used = {name: expected.get(name, torch.zeros(len(moments.sq_norms), 5))
                for name in ("extra",)} | expected
        agrees(moments, used)


def test_uses_that_come_and_go_are_followed_in_every_pass(model):
    hooks = GradSampleHooks(model)

    def before(model, step):
        model.late = LATE["another parameter"] if step % 2 else None
        model.between = (lambda model, x: x * model.scale) if step % 3 == 0 else None

    measured = 0
    for _, _, moments, expected in run(model, hooks, 24, before):
        if not isinstance(moments, NotMeasured):
            measured += 1
            agrees(moments, expected)
    assert measured >= 20


class Positions(nn.Module):
    """Tokens and positions, each looked up once for each sample; notes whether it was traced."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, 3), nn.Embedding(4, 3)
        self.head, self.traced = nn.Linear(3, 2), []

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        x = self.tokens(ids) + self.places(places)
        self.traced.append(any(isinstance(mode, ParameterTracer) for mode in modes()))
        return self.head(x.tanh())


def test_positions_repeated_for_each_sample_are_measured_by_their_layer():
    torch.manual_seed(0)
    model = Positions().double()
    hooks = GradSampleHooks(model)
    for n_samples in (4, 6, 5):  # 4: as many as positions
        ids = torch.randint(9, (n_samples, 4))
        model.zero_grad()
        losses(model, ids).mean().backward()
        moments = hooks.collect()
        with hooks.paused():
            agrees(moments, oracle.per_sample_grads(model, losses, ids))
    assert model.traced == [True, True, False]
