"""Confident in a whole run: the size moves only out of the interval, and the history shows why."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

import adabatch
from adabatch import CABS
from adabatch.controllers import Confident, Goodput, NoiseScale, PadaDamp
from adabatch.diagnostics import Diagnostics
from adabatch.interfaces import RunContext
from tests.diagnostics.synthetic import same_records
from tests.scripted import Proposals, regression, squared_error


def trained(steps=150, controller=None, lr=0.02, **options):
    """A scheduler after `steps` steps of linear regression."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"batch_sizes": (4, 256), "measure": "all", **options}
    controller = NoiseScale(smoothing=0.9) if controller is None else controller
    loader = DataLoader(regression(4000), batch_size=16, shuffle=True)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, controller=controller,
                                                 **options)
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = squared_error(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            if scheduler.step_count == steps:
                return scheduler


def moves(history):
    """(size before, size after, low, high) of each step with a proposal."""
    sizes = [16, *history.column("next_batch_size")]
    return [
        (before, after, record.proposed_low, record.proposed_high)
        for before, after, record in zip(sizes, sizes[1:], history, strict=False)
        if not math.isnan(record.proposed_batch_size)
    ]


def noise_scale(level=None, **options):
    rule = NoiseScale(smoothing=0.9, **options)
    return rule if level is None else Confident(rule, level)


@pytest.mark.parametrize("inner_products", [False, True])
def test_the_size_moves_only_out_of_the_interval(inner_products):
    runs = [trained(controller=noise_scale(level),
                    estimator=adabatch.PerSample(inner_products=inner_products))
            for level in (None, 0.9)]
    free, held = (moves(scheduler.diagnostics) for scheduler in runs)
    assert all(before == after for before, after, low, high in held if low <= before <= high)
    assert any(before != after for before, after, *_ in held)
    kept_moves, free_moves = (sum(before != after for before, after, *_ in rows)
                              for rows in (held, free))
    assert kept_moves < 0.5 * free_moves
    assert held[0] == (16, 16, 0.0, math.inf)  # after one step nothing is known


@pytest.mark.parametrize(
    ("interval", "proposal", "given"),
    [
        ((40.0, 60.0), 50.0, 50.0),
        ((30.0, 60.0), 50.0, 32.0),
        ((0.0, math.inf), 50.0, 32.0),
        ((math.nan, math.nan), 50.0, 50.0),
        ((math.inf, math.inf), math.inf, math.inf),
        ((32.0, 32.0), math.nan, math.nan),
    ],
)
def test_it_gives_the_size_in_force_while_the_interval_holds_it(interval, proposal, given):
    class Known(Proposals):
        def interval(self, level=0.9):
            return interval

    rule = Confident(Known(proposal))
    unbound = rule.propose(None, loss=1.0, lr=0.1)  # the size in force is not known
    assert unbound == pytest.approx(proposal, nan_ok=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    rule.bind(RunContext(optimizer, batch_size=lambda: 32))
    assert rule.propose(None, loss=1.0, lr=0.1) == pytest.approx(given, nan_ok=True)
    rule.bind(RunContext(optimizer))
    assert rule.propose(None, loss=1.0, lr=0.1) == pytest.approx(given, nan_ok=True)


def test_a_size_at_the_bound_is_held_like_any_other():
    """The size in force is compared, not what was last proposed."""
    history = trained(controller=noise_scale(0.9, scale=1e3), batch_sizes=(4, 64)).diagnostics
    late = list(history)[60:]
    assert {record.next_batch_size for record in late} == {64}
    assert any(record.proposed_batch_size > 64 for record in late)


def test_goodput_has_an_interval_once_it_knows_two_sizes():
    """The times of a run vary, but its interval holds the proposal."""
    history = trained(80, controller=Goodput(16), coupling="adascale").diagnostics
    known = [record for record in history if not math.isnan(record.proposed_low)]
    assert known
    assert all(record.proposed_low <= record.proposed_batch_size <= record.proposed_high
               for record in known)


def test_a_higher_level_moves_less_often():
    counts = [
        sum(before != after
            for before, after, *_ in moves(trained(controller=noise_scale(level)).diagnostics))
        for level in (0.5, 0.99)
    ]
    assert counts[0] > counts[1]


def test_a_rule_without_errors_moves_as_before():
    history = trained(20, controller=Confident(PadaDamp(16, rate=2.0))).diagnostics
    assert history.column("next_batch_size").tolist() == [18 + 2 * step for step in range(20)]
    assert all(math.isnan(value) for value in history.column("proposed_low"))


@pytest.mark.parametrize("level", [0, 1, 90, math.nan, -0.1, "0.9"])
def test_levels_are_checked(level):
    with pytest.raises(ValueError, match="level must be a number between 0 and 1, both excluded"):
        Confident(NoiseScale(), level)


def test_the_history_holds_the_interval(tmp_path):
    scheduler = trained(controller=CABS(f_star="auto", smoothing=0.9), lr=0.05)
    history, rule = scheduler.diagnostics, scheduler.controller
    latest = history.latest
    assert (latest.proposed_low, latest.proposed_high) == rule.interval(0.9)
    assert (latest.f_star, latest.f_star_std_error) == (rule.floor.bounded, rule.floor.std_error)
    assert latest.f_star > 0
    assert math.isnan(history[0].f_star)
    assert latest.n_measured == latest.batch_size
    assert "f_star" in history.summary().splitlines()[2]
    history.to_jsonl(tmp_path / "run.jsonl")
    assert same_records(Diagnostics.from_jsonl(tmp_path / "run.jsonl"), history)


def test_lower_lr_does_not_follow_an_uncertain_proposal():
    """Held by doubt, a size meets the proposal as far as is known: the lr stays."""
    coupling = adabatch.Coupling(on_limit="lower_lr")
    scheduler = trained(3, coupling=coupling,
                        controller=Confident(NoiseScale(scale=100.0), 0.9999))
    assert scheduler.get_last_lr() == [0.02]
    followed = trained(40, coupling=coupling, batch_sizes=(4, 32),
                       controller=NoiseScale(scale=100.0))
    assert followed.get_last_lr()[0] < 0.02
