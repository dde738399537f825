"""BatchSizeScheduler where things go wrong: measurements that are dropped while the run continues,
and errors that say what to do."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from adabatch import CABS, AdaptiveDataLoader, GradSampleHooks
from adabatch.controllers import Controller
from tests.options import make_scheduler
from tests.scripted import Proposals, regression, slope_run, squared_error, steps


def train(faults, n_steps=6, batch_size=16, **options):
    """Trains a linear model with CABS; faults = {step: function of (inputs, loss) that returns the
    loss}. Steps with a fault leave out optimizer.step()."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer, loader = SGD(model.parameters(), lr=0.3), AdaptiveDataLoader(regression(4000),
                                                                            batch_size)
    hooks = GradSampleHooks(model, **options)
    scheduler = make_scheduler(optimizer, loader, hooks, CABS(), min_batch_size=2,
                               max_batch_size=64)
    for step, (inputs, targets) in zip(range(n_steps), loader, strict=False):
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        if step in faults:
            loss = faults[step](loss)
        loss.backward()
        if step not in faults:
            optimizer.step()
        scheduler.step(loss)
    return model, scheduler


FAULTS = {
    "nan-loss": (lambda loss: loss * math.nan, "non-finite loss"),
    "inf-loss": (lambda loss: loss + math.inf, "non-finite loss"),
    "minus-inf-loss": (lambda loss: loss - math.inf, "non-finite loss"),
    "nan-gradient": (lambda loss: loss + (loss * math.nan - loss.detach() * math.nan).nan_to_num(),
                     "non-finite gradient"),
    "overflowing-norms": (lambda loss: loss * 1e25, "non-finite gradient"),
}


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_finite_is_dropped_counted_and_forgotten(fault, reason, samples):
    _, scheduler = train({3: fault}, samples=samples)
    history = scheduler.diagnostics
    record = history[3]
    assert (record.dropped, record.measured) == (reason, False)
    assert history.dropped == {reason: 1}
    assert math.isnan(record.proposed_batch_size)
    assert math.isnan(record.variance_trace)
    assert record.next_batch_size == record.batch_size == history[2].next_batch_size
    assert record.variance_trace_ema == history[2].variance_trace_ema
    assert all(other.measured and math.isfinite(other.proposed_batch_size)
               for other in history if other.step != 3)
    # The controller and the averages must be as if the step had not been.
    _, twin = train({}, n_steps=3, samples=samples)
    _, stopped = train({3: fault}, n_steps=4, samples=samples)
    assert stopped.controller.state_dict() == twin.controller.state_dict()
    assert stopped.state_dict()["trace"] == twin.state_dict()["trace"]
    assert (stopped.step_count, stopped.samples_seen) == (4, twin.samples_seen + record.batch_size)


def test_the_first_step_may_be_dropped():
    _, scheduler = train({0: FAULTS["nan-loss"][0]}, n_steps=3)
    assert list(scheduler.diagnostics.column("batch_size"))[:2] == [16, 16]
    assert math.isfinite(scheduler.diagnostics.latest.proposed_batch_size)


def test_a_run_of_nothing_but_faults_continues():
    _, scheduler = train(dict.fromkeys(range(6), FAULTS["nan-gradient"][0]))
    assert scheduler.diagnostics.n_dropped == scheduler.diagnostics.n_steps == 6
    assert scheduler.get_last_batch_size() == 16


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_batch_of_one_has_no_variance(scheduler_first):
    controller = Proposals(16, needs_effective_lr=True)
    run = slope_run(controller, n=17)
    for _ in range(2):
        rows, moved = zip(*steps(*run, scheduler_first=scheduler_first), strict=True)
        assert rows == (16, 1)
        assert moved == pytest.approx((1.0, 1 / 16), rel=1e-5)
    assert [record.dropped for record in run[3].diagnostics] == ["", "batch of one"] * 2
    assert [passed["moments"].batch_size for passed in controller.passed] == [16, 16]
    assert list(run[3].diagnostics.column("samples_seen")) == [16, 17, 33, 34]
    assert run[3].get_last_batch_size() == 16


def test_accumulated_batches_of_one_do_have_one():
    controller = Proposals(2)
    model, _, loader, scheduler = slope_run(controller, accumulate=2, batch_size=1,
                                            max_batch_size=2)
    for _, (inputs,) in zip(range(2), loader, strict=False):
        (model(inputs).mean() / 2).backward()
    scheduler.step(0.0)
    assert controller.passed[0]["moments"].batch_size == 2
    assert controller.passed[0]["moments"].variance_trace == pytest.approx(0.0)


def test_an_empty_batch_is_dropped_where_the_loader_cannot_tell():
    """As after a collate_fn that leaves out every sample, under a bare sampler."""
    model, optimizer, loader, scheduler = slope_run(Proposals(16))
    scheduler.loader = loader.batch_sampler
    model(torch.ones(0, 1)).sum().backward()
    optimizer.step()
    scheduler.step(0.0)
    assert scheduler.diagnostics.latest.dropped == "empty batch"
    model(torch.ones(16, 1)).mean().backward()
    scheduler.step(0.0)
    assert scheduler.diagnostics.latest.measured


def test_a_proposal_of_nan_is_dropped():
    run = slope_run(Proposals(20, math.nan, 30))
    assert [rows for rows, _ in steps(*run, 4)] == [16, 20, 20, 30]
    assert run[3].diagnostics.dropped == {"the controller's proposal is NaN": 1}


def test_before_the_first_proposal_nan_drops_nothing():
    run = slope_run(Proposals(math.nan, math.nan, 30))
    assert [rows for rows, _ in steps(*run, 4)] == [16, 16, 16, 30]
    assert not run[3].diagnostics.dropped
    assert run[3].diagnostics.column("measured").all()


def test_a_step_without_a_backward_pass():
    model, _, loader, scheduler = slope_run(Proposals(16))
    with pytest.raises(RuntimeError, match=r"backward\(\) was not called"):
        scheduler.step(0.0)
    (inputs,) = next(iter(loader))
    loss = model(inputs).mean()
    with pytest.raises(RuntimeError, match=r"backward\(\) was not called"):
        scheduler.step(loss)
    assert scheduler.step_count == len(scheduler.diagnostics) == 0
    loss.backward()
    scheduler.step(loss)
    with pytest.raises(RuntimeError,
                       match=r"since the last collect\(\).*backward\(\) was not called"):
        scheduler.step(loss)
    assert scheduler.step_count == len(scheduler.diagnostics) == 1
    assert scheduler.samples_seen == 16


def test_two_backward_passes_need_accumulate():
    model, _, loader, scheduler = slope_run(Proposals(16))
    (inputs,) = next(iter(loader))
    for _ in range(2):
        model(inputs).mean().backward()
    with pytest.raises(RuntimeError, match=r"saw 2 backward passes .* accumulate=1"):
        scheduler.step(0.0)
    model(inputs).mean().backward()
    scheduler.step(0.0)
    assert scheduler.diagnostics.latest.measured


@pytest.mark.parametrize(("inputs", "rows"), [(torch.ones(5, 16, 1), 5), (torch.ones(32, 1), 32)])
def test_layers_that_see_another_number_of_rows_than_was_delivered(inputs, rows):
    model, _, loader, scheduler = slope_run(Proposals(16))
    next(iter(loader))
    model(inputs).mean().backward()
    with pytest.raises(RuntimeError,
                       match=rf"layers saw {rows} rows in this step, but the loader delivered "
                             r"16 samples.*adabatch\.check\("):
        scheduler.step(0.0)


def test_evaluation_between_steps_disturbs_nothing():
    def run(evaluate):
        model, optimizer, loader, scheduler = slope_run(Proposals(20, 30, 40))

        def look():
            if evaluate:
                with torch.no_grad():
                    model.eval()(torch.ones(99, 1))
                model.train()
                model(torch.ones(7, 1)).mean()

        return list(
            steps(model, optimizer, loader, scheduler, 5, after=look)
        ), scheduler.controller.passed[-1]["moments"].sq_norms

    (plain, norms), (disturbed, same) = run(False), run(True)
    assert disturbed == plain
    assert torch.equal(norms, same)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.ones(3), ValueError,
         r"scalar loss of the step, got a tensor of shape \(3,\): reduce it first"),
        (torch.ones(0), ValueError, r"got a tensor of shape \(0,\)"),
        (None, TypeError, "got None"),
        ("0.5 apples", TypeError, "got '0.5 apples'"),
        ([0.5], TypeError, r"got \[0\.5\]"),
    ],
)
def test_losses_that_are_none(loss, error, message):
    model, _, loader, scheduler = slope_run(Proposals(16))
    (inputs,) = next(iter(loader))
    model(inputs).mean().backward()
    with pytest.raises(error, match=message):
        scheduler.step(loss)
    scheduler.step(1.0)
    assert scheduler.diagnostics.latest.measured


def test_a_loss_that_touches_no_measured_layer_is_no_backward_pass():
    model, _, _, scheduler = slope_run(Proposals(16))
    other = torch.ones((), requires_grad=True)
    other.backward()
    with pytest.raises(RuntimeError, match="no measured backward pass"):
        scheduler.step(other)
    assert model.layer.weight.grad is None


def test_a_data_set_whose_samples_hold_several_rows_is_recognised_at_the_first_step():
    model = nn.Linear(2, 1)
    loader = AdaptiveDataLoader(TensorDataset(torch.ones(64, 5, 2)), 16)
    scheduler = make_scheduler(SGD(model.parameters(), lr=1.0), loader, GradSampleHooks(model))
    (inputs,) = next(iter(loader))
    loss = model(inputs.flatten(0, 1)).mean()
    loss.backward()
    with pytest.raises(RuntimeError,
                       match="layers saw 80 rows in this step, but the loader delivered 16"):
        scheduler.step(loss)


@pytest.mark.parametrize("proposal", ["32", None, [16]], ids=str)
@pytest.mark.parametrize("kind", [Controller, object])
def test_a_proposal_that_is_no_number_is_refused(kind, proposal):
    class Wrong(kind):
        def propose(self, moments, *, loss, lr):
            return proposal

    run = slope_run(Wrong())
    with pytest.raises(TypeError, match=r"propose\(\) of Wrong must return .* as a number"):
        list(steps(*run))


def test_a_loss_that_is_no_number_is_refused():
    run = slope_run(Proposals(16))
    with pytest.raises(TypeError, match=r"as a scalar tensor or a number, got '0\.3'"):
        run[3].step("0.3")


@pytest.mark.parametrize("fault", ["nan-loss", "inf-loss", "minus-inf-loss"])
def test_a_loss_that_is_not_finite_is_warned_of_once(fault):
    with pytest.warns(UserWarning, match="the loss of step 1 is .*: the batch size stays") as seen:
        train(dict.fromkeys((1, 3), FAULTS[fault][0]), n_steps=5)
    assert sum("the batch size stays" in str(each.message) for each in seen) == 1
