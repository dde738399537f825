"""confidence= in a whole run: the size moves only where the interval says so, and the history shows why."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

import adabatch
from adabatch import CABS
from adabatch.controllers import Goodput, InnerProductTest, NoiseScale, NormTest, PadaDamp
from adabatch.diagnostics import Diagnostics
from tests.diagnostics.synthetic import same_records
from tests.scripted import regression, squared_error


def trained(steps=150, controller=None, lr=0.02, **options):
    """A scheduler after so many steps of linear regression."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"batch_sizes": (4, 256), "measure": "all", **options}
    controller = NoiseScale(smoothing=0.9) if controller is None else controller
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, DataLoader(regression(4000), batch_size=16, shuffle=True), controller=controller, **options)
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


@pytest.mark.parametrize("inner_products", [False, True])
def test_the_size_moves_only_out_of_the_interval(inner_products):
    free, held = (moves(trained(confidence=confidence, inner_products=inner_products).diagnostics) for confidence in (None, 0.9))
    assert all(before == after for before, after, low, high in held if low <= before <= high)
    assert any(before != after for before, after, *_ in held)
    assert sum(before != after for before, after, *_ in held) < 0.5 * sum(before != after for before, after, *_ in free)
    assert held[0] == (16, 16, 0.0, math.inf)  # after one step nothing is known


@pytest.mark.parametrize("make", [lambda: NormTest(theta=0.5, signal="raw"), lambda: InnerProductTest(theta=0.1, nu=0.1, signal="raw")], ids=["norm", "inner"])
def test_raw_signals_are_as_sure_as_their_one_step(make):
    held = moves(trained(40, controller=make(), confidence=0.9, inner_products=True).diagnostics)
    assert all(before == after for before, after, low, high in held if low <= before <= high)
    assert any(before != after for before, after, *_ in held)
    assert all(0 <= low <= high for *_, low, high in held)


def test_goodput_has_an_interval_once_it_knows_two_sizes():
    """The clock of a run is not to be foretold, but that its interval holds the proposal is."""
    history = trained(80, controller=Goodput(16), coupling="adascale").diagnostics
    known = [record for record in history if not math.isnan(record.proposed_low)]
    assert known
    assert all(record.proposed_low <= record.proposed_batch_size <= record.proposed_high for record in known)


def test_a_higher_level_moves_less_often_and_has_longer_intervals():
    counts, lengths = [], []
    for confidence in (0.5, 0.99):
        history = trained(confidence=confidence).diagnostics
        counts.append(sum(before != after for before, after, *_ in moves(history)))
        lengths.append([record.proposed_high - record.proposed_low for record in history][5])
    assert counts[0] > counts[1]
    assert lengths[0] < lengths[1]


def test_a_rule_without_errors_moves_as_ever():
    history = trained(20, controller=PadaDamp(16, rate=2.0), confidence=0.9).diagnostics
    assert history.column("next_batch_size").tolist() == [18 + 2 * step for step in range(20)]
    assert all(math.isnan(value) for value in history.column("proposed_low"))


@pytest.mark.parametrize("confidence", [0, 1, 90, math.nan, -0.1])
def test_levels_are_checked(confidence):
    with pytest.raises(ValueError, match="confidence must be None, or a level between 0 and 1"):
        trained(1, confidence=confidence)


def test_the_history_shows_what_the_controller_knows(tmp_path):
    scheduler = trained(controller=CABS(f_star="auto", smoothing=0.9), lr=0.05)
    history, rule = scheduler.diagnostics, scheduler.controller
    latest = history.latest
    assert (latest.proposed_low, latest.proposed_high) == rule.proposal_interval(0.9)
    assert (latest.f_star, latest.f_star_std_error) == (rule.floor.bounded, rule.floor.std_error)
    assert latest.f_star > 0
    assert math.isnan(history[0].f_star)
    assert latest.n_measured == latest.batch_size
    assert "f_star" in history.summary().splitlines()[2]
    history.to_jsonl(tmp_path / "run.jsonl")
    assert same_records(Diagnostics.from_jsonl(tmp_path / "run.jsonl"), history)


def test_spill_does_not_follow_a_wish_that_is_in_doubt():
    """Held by doubt, a size meets the proposal as far as is known: the lr stays."""
    scheduler = trained(3, confidence=0.9999, spill="lr", controller=NoiseScale(scale=100.0))
    assert scheduler.get_last_lr() == [0.02]
    assert trained(40, spill="lr", max_batch_size=32, controller=NoiseScale(scale=100.0)).get_last_lr()[0] < 0.02
