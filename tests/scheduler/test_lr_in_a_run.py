"""BatchSizeScheduler and the learning rate: what the controller gets, and with what lr each
batch is stepped."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from adabatch import CABS, AdaptiveDataLoader, GradientMoments, GradSampleHooks
from adabatch.interfaces import Estimator
from tests import oracle
from tests.options import make_scheduler
from tests.scripted import (
    Proposals,
    Slope,
    ones,
    per_sample_loss,
    regression,
    slope_run,
    squared_error,
    steps,
)

both_orders = pytest.mark.parametrize("scheduler_first", [False, True],
                                      ids=["step-then-measure", "measure-then-step"])


def moves(run, n_steps=None, **options):
    return [move for _, move in steps(*run, n_steps, **options)]


@both_orders
@pytest.mark.parametrize(("short_batch", "last"),
                         [("scale", 8 / 20), ("keep", 1.0), ("drop", None)])
def test_the_short_last_batch(short_batch, last, scheduler_first):
    run = slope_run(Proposals(20), n=64, short_batch=short_batch)
    for epoch in range(2):  # of 16 + 20 + 20 + 8 samples, then of 20 + 20 + 20 + 4
        expected = [1.0] * 3 + (
            [] if last is None else [last if epoch == 0 or last == 1 else 4 / 20]
        )
        assert moves(run, scheduler_first=scheduler_first) == pytest.approx(expected, rel=1e-5)
        assert run[3].get_last_lr() == pytest.approx(expected[-1:])
        assert run[1].param_groups[0]["lr"] == 1.0


def test_short_last_batches_of_accumulated_passes():
    model, optimizer, loader, scheduler = slope_run(
        Proposals(32), n=76, batch_size=16, accumulate=2)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        for count, (inputs,) in enumerate(loader):
            (model(inputs).mean() / 2).backward()
            if count % 2:
                before = model.weight
                optimizer.step()
                moved.append((before - model.weight) / 1.0)
                scheduler.step(1.0)
                optimizer.zero_grad()
        scheduler.estimator.reset()
    # 16 16 | 16 16 | 12, left over and thrown away
    assert moved == pytest.approx([1.0] * 4, rel=1e-5)
    assert list(scheduler.diagnostics.column("batch_size")) == [32] * 4
    model, optimizer, loader, scheduler = slope_run(
        Proposals(32), n=60, batch_size=16, accumulate=2)
    for count, (inputs,) in enumerate(loader):
        (model(inputs).mean() / 2).backward()
        if count % 2:
            optimizer.step()
            scheduler.step(1.0)
            optimizer.zero_grad()
    assert scheduler.get_last_lr() == [28 / 32]


@pytest.mark.parametrize("short_batch", ["scale", "keep"])
def test_a_summed_loss_is_smaller_for_a_short_batch_by_itself(short_batch):
    run = slope_run(Proposals(16), n=24, loss_reduction="sum", short_batch=short_batch, lr=0.125)
    assert moves(run, loss_of=torch.sum) == [2.0, 1.0]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_workers_drew_ahead_are_scaled_by_what_was_asked_for_them(workers):
    run = slope_run(Proposals(40, 30, 20, 50), n=200, batch_size=16,
                    loader_options={"num_workers": workers})
    moved = list(steps(*run))
    delivered = [rows for rows, _ in moved]
    assert sum(delivered) == 200
    assert [move for _, move in moved[:-1]] == pytest.approx([1.0] * (len(moved) - 1), rel=1e-5)
    assert moved[-1][1] == pytest.approx(delivered[-1] / 50, rel=1e-5)
    assert run[3].loader.recent[-1] == (50, delivered[-1])


PROPOSED = (10, 128, 256, 64, 65, math.inf, 32, math.inf, 128, math.nan, -5.0)
LOWERED = (1, 1, 64 / 128, 64 / 256, 1, 64 / 65, 64 / 65, 1, 1, 64 / 128, 64 / 128, 1)
SIZES = (16, 10, 64, 64, 64, 64, 64, 32, 64, 64, 64, 2)


@both_orders
@pytest.mark.parametrize("lr", [lambda: 1.0, lambda: torch.tensor(1.0)], ids=["float", "tensor"])
def test_lower_lr_meets_exactly_the_batches_drawn_after_the_decision(lr, scheduler_first):
    run = slope_run(Proposals(*PROPOSED), n=5000, on_limit="lower_lr", lr=lr())
    moved = list(steps(*run, len(LOWERED), scheduler_first=scheduler_first))
    assert [rows for rows, _ in moved] == list(SIZES)
    assert [move for _, move in moved] == pytest.approx(LOWERED, rel=1e-5)
    assert {passed["lr"] for passed in run[3].controller.passed} == {1.0}
    assert float(run[1].param_groups[0]["lr"]) == 1.0
    assert run[3].get_last_lr() == [1.0]


def test_without_lower_lr_the_lr_stays():
    assert moves(slope_run(Proposals(*PROPOSED), n=5000), 12) == pytest.approx([1.0] * 12, rel=1e-5)


@both_orders
def test_lower_lr_and_the_short_last_batch_multiply(scheduler_first):
    run = slope_run(Proposals(128), n=16 + 64 + 32, on_limit="lower_lr")
    assert moves(run, scheduler_first=scheduler_first) == pytest.approx([1.0, 0.5, 0.25], rel=1e-5)


@both_orders
def test_lower_lr_with_accumulated_passes(scheduler_first):
    model, optimizer, loader, scheduler = slope_run(Proposals(64, 128, 32), n=400, accumulate=2,
                                                    on_limit="lower_lr")
    lrs, rows = [], []
    for count, (inputs,) in enumerate(loader):
        (model(inputs).mean() / 2).backward()
        if count % 2:
            if scheduler_first:
                scheduler.step(1.0)
            optimizer.step()
            if not scheduler_first:
                scheduler.step(1.0)
            rows.append(scheduler.diagnostics.latest.batch_size)
            lrs += scheduler.get_last_lr()
            optimizer.zero_grad()
        if len(lrs) == 4:
            break
    assert rows == [32, 64, 64, 32]
    assert lrs == [1.0, 1.0, 0.5, 1.0]


class ConstantMoments(Estimator):
    """Stands in for the hooks: T = 320 at every step."""

    lags = False

    def __init__(self, loader):
        self.loader, self.on_backward_end = loader, []

    def observe(self, **options):
        return self

    def moments(self):
        size = self.loader.recent[-1][1]
        norms = torch.full((size,), 320.0 * (1 - 1 / size) + 1)
        return GradientMoments(batch_size=size, sq_norms=norms, grad_sq_norm=1.0)


@both_orders
def test_the_proposal_is_computed_from_the_base_lr_so_it_cannot_run_away(scheduler_first):
    model = Slope()
    optimizer, loader = SGD(model.parameters(), lr=0.5), AdaptiveDataLoader(ones(5000), 16)
    scheduler = make_scheduler(optimizer, loader, ConstantMoments(loader), CABS(), min_batch_size=2,
                               max_batch_size=64, on_limit="lower_lr")
    warm_up = LinearLR(optimizer, 0.25, total_iters=4)
    expected, moved = [], []
    for _, move in steps(model, optimizer, loader, scheduler, 8, scheduler_first,
                         lambda out: out.mean() - out.mean().detach() + 1, warm_up.step):
        base = 0.5 * min(1.0, 0.25 + 0.75 * len(moved) / 4)
        assert scheduler.diagnostics.latest.lr == pytest.approx(base)
        assert scheduler.diagnostics.latest.proposed_batch_size == pytest.approx(320 * base,
                                                                                 rel=1e-5)
        moved.append(move)
        expected.append(base)
    proposals = [0.0, *(320 * base for base in expected)]
    assert moved == pytest.approx([base * min(1.0, 64 / max(proposal, 1))
        for base, proposal in zip(expected, proposals, strict=False)], rel=1e-4)


def test_momentum_counts_in_full_and_is_read_at_every_step():
    controller = Proposals(16, needs_effective_lr=True)
    model = Slope()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = AdaptiveDataLoader(ones(5000), 16)
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model), controller)
    schedule = OneCycleLR(optimizer, 1.0, total_steps=20)
    group, expected = optimizer.param_groups[0], []

    def next_lr():
        expected.append(group["lr"] / (1 - group["momentum"]))
        schedule.step()

    list(steps(model, optimizer, loader, scheduler, 15, after=next_lr))
    assert [passed["lr"] for passed in controller.passed] == pytest.approx(expected, rel=1e-12)
    assert len({round(lr, 6) for lr in expected}) == 15


@pytest.mark.parametrize("every", [1, 2])
def test_groups_are_weighted_by_their_variance_trace(every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    names = (("0.weight", "0.bias"), ("1.weight", "1.bias"))
    groups = [{"params": list(model[0].parameters()), "lr": 0.01},
              {"params": list(model[1].parameters()), "lr": 0.03, "momentum": 0.5}]
    optimizer = SGD(groups, lr=1.0)
    hooks = GradSampleHooks(model, param_groups=[group["params"] for group in groups])
    controller = Proposals(16, needs_effective_lr=True)
    loader = AdaptiveDataLoader(regression(64), 16)
    scheduler = make_scheduler(optimizer, loader, hooks, controller, every=every)
    expected = []
    for inputs, targets in loader:
        with hooks.paused():
            grads = oracle.per_sample_grads(model, per_sample_loss, (inputs, targets))
        traces = [
            float(oracle.variance_trace({name: grads[name] for name in group})) for group in names
        ]
        expected.append((0.01 * traces[0] + 0.06 * traces[1]) / sum(traces))
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    lrs = [passed["lr"] for passed in controller.passed]
    assert lrs == pytest.approx(expected[::every], rel=1e-5)
    assert list(scheduler.diagnostics.column("lr")) == pytest.approx(
        [expected[step - step % every] for step in range(4)], rel=1e-5
    )


def test_a_group_that_is_not_measured_does_not_count():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for measured in (0, 1):
        optimizer = SGD([{"params": model[0].parameters(), "lr": 0.25},
                         {"params": model[1].parameters(), "lr": 8.0}], lr=1.0)
        hooks = GradSampleHooks(model, ignore=[str(1 - measured)],
                                param_groups=[group["params"] for group in optimizer.param_groups])
        controller = Proposals(16)
        loader = AdaptiveDataLoader(ones(32), 16)
        scheduler = make_scheduler(optimizer, loader, hooks, controller)
        for (inputs,) in loader:
            loss = model(inputs).mean()
            loss.backward()
            scheduler.step(loss)
        assert {passed["lr"] for passed in controller.passed} == {(0.25, 8.0)[measured]}
        scheduler.remove()


def test_adam():
    plain = Proposals(20)
    run = slope_run(plain, optimizer=Adam, lr=0.01)
    assert [rows for rows, _ in steps(*run, 2)] == [16, 20]
    assert [passed["lr"] for passed in plain.passed] == [0.01] * 2
    coupled = Proposals(20, needs_effective_lr=True)
    with pytest.raises(ValueError, match=r"Adam.*effective_lr=, a callable of a param group"):
        slope_run(coupled, optimizer=Adam)
    run = slope_run(coupled, optimizer=Adam, lr=0.01,
                    effective_lr=lambda group: group["lr"] / group["eps"])
    list(steps(*run, 1))
    assert coupled.passed[0]["lr"] == pytest.approx(0.01 / 1e-8)
    with pytest.raises(TypeError, match="callable of a param group"):
        slope_run(coupled, effective_lr=0.1)


def test_a_step_that_raised_does_not_leak_its_factor_to_the_controller():
    class Failing(SGD):
        def step(self, closure=None):
            raise FloatingPointError("out of range")

    controller = Proposals(128, needs_effective_lr=True)
    model, optimizer, loader, scheduler = slope_run(controller, optimizer=Failing,
                                                    on_limit="lower_lr")
    for (inputs,), _ in zip(loader, range(3), strict=False):
        loss = model(inputs).mean()
        loss.backward()
        with pytest.raises(FloatingPointError):
            optimizer.step()
        scheduler.step(loss)
    assert [passed["lr"] for passed in controller.passed] == [1.0] * 3


def test_removed_it_leaves_no_trace():
    model, optimizer, _, scheduler = slope_run(Proposals(16))
    scheduler.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not model.layer._forward_hooks


def rows_and_moves(run, n_steps, **options):
    rows, moves = zip(*steps(*run, n_steps, **options), strict=True)
    return list(rows), list(moves)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_size_held_by_cooldown_lowers_the_lr(scheduler_first):
    """Noise level ~ lr/size: it is 1/proposal from the step after the proposal, at the cap, below
    it, and while the size is held."""
    run = slope_run(Proposals(20, 40, 128, 128, 50), n=5000, on_limit="lower_lr", cooldown=3)
    rows, moves = rows_and_moves(run, 8, scheduler_first=scheduler_first)
    assert rows == [16, 20, 20, 20, 20, 50, 50, 50]
    assert moves == pytest.approx([1, 1, 20 / 40, 20 / 128, 20 / 128, 1, 1, 1], rel=1e-5)


def test_a_size_held_by_hysteresis_lowers_the_lr():
    run = slope_run(Proposals(18, 20, 22, 17, 66, 70), n=5000, on_limit="lower_lr", hysteresis=0.25)
    rows, moves = rows_and_moves(run, 7)
    assert rows == [16, 16, 16, 22, 22, 64, 64]
    assert moves == pytest.approx([1, 16 / 18, 16 / 20, 1, 1, 64 / 66, 64 / 70], rel=1e-5)


def test_rounding_does_not_lower_the_lr():
    run = slope_run(Proposals(11.4, 11.6, 20.0), n=5000, on_limit="lower_lr", multiple_of=8)
    rows, moves = rows_and_moves(run, 4)
    assert rows == [16, 8, 8, 16]
    assert moves == pytest.approx([1.0] * 4, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_beyond_the_cap_has_the_noise_level_of_the_proposal(workers):
    run = slope_run(Proposals(256), n=1000, on_limit="lower_lr",
                    loader_options={"num_workers": workers}, short_batch="keep")
    moved = list(steps(*run, 6))
    requested = [size for size, _ in list(run[2].recent)[:6]]
    assert [
        move / size for (_, move), size in list(zip(moved, requested, strict=True))[1:]
    ] == pytest.approx([1 / 256] * 5, rel=1e-5)


def test_an_infinite_proposal_holds_the_last_unmet_proposal():
    run = slope_run(Proposals(128, math.inf, math.inf, 64), n=5000, on_limit="lower_lr")
    assert rows_and_moves(run, 5)[1] == pytest.approx([1, 0.5, 0.5, 0.5, 1], rel=1e-5)
