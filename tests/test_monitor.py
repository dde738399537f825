"""monitor: reads the variance of any loop and changes nothing."""

import math
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD

import adabatch
from tests import oracle
from tests.scripted import per_sample_loss


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, SGD(model.parameters(), lr=0.05, momentum=0.9)


def batches(n, size=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size + step % 3, 3, generator=generator),
             torch.randn(size + step % 3, 1, generator=generator)) for step in range(n)]


def train(model, optimizer, data, watched=None, reduction="mean", accumulate=1):
    for step, batch in enumerate(data):
        loss = getattr(per_sample_loss(model, batch), reduction)()
        (loss / accumulate if reduction == "mean" else loss).backward()
        if (step + 1) % accumulate == 0:
            if watched is not None:
                watched.record_loss(loss)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_variance_is_the_oracles(reduction):
    model, optimizer = make()
    watched = adabatch.monitor(model, optimizer, measure="all", loss_reduction=reduction)
    for batch in batches(4):
        bare, _ = make()
        bare.load_state_dict(model.state_dict())
        expected = oracle.variance_trace(oracle.per_sample_grads(bare, per_sample_loss, batch))
        train(model, optimizer, [batch], watched, reduction)
        assert watched.latest.variance_trace == pytest.approx(float(expected), rel=1e-4)
        loss = per_sample_loss(bare, batch).mean().item()
        assert watched.latest.loss == pytest.approx(loss, rel=1e-5)
    assert watched.samples_seen == sum(len(inputs) for inputs, _ in batches(4))
    assert watched.latest.lr == 0.05
    assert watched.latest.next_batch_size is None


@pytest.mark.parametrize("measure", ["auto", "all", 0.2, adabatch.Every(3, samples=4)])
def test_the_run_is_the_one_without_it(measure):
    plain, watched = make(), make()
    monitor = adabatch.monitor(*watched, measure=measure)
    train(*plain, batches(9))
    train(*watched, batches(9))
    assert monitor.diagnostics.n_steps == 9
    for one, other in zip(plain[0].parameters(), watched[0].parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
    assert [group["lr"] for group in watched[1].param_groups] == [0.05]


def test_every_third_step_and_without_a_loss():
    model, optimizer = make()
    watched = adabatch.monitor(model, optimizer, measure=adabatch.Every(3, samples=4))
    train(model, optimizer, batches(9))
    history = watched.diagnostics
    assert history.column("measured").tolist() == [True, False, False] * 3
    assert set(history.column("n_measured").tolist()) == {0, 4}
    assert math.isnan(watched.latest.loss)
    assert (watched.measurement_plan.every, watched.measurement_plan.samples) == (3, 4)
    assert re.fullmatch(r"Monitor\(step 9, 4 samples at one step in 3, [\d.]+% of the time\)",
                        repr(watched))
    watched.remove()
    assert repr(watched) == "Monitor(step 9, removed)"


def test_accumulated_passes_make_one_record():
    model, optimizer = make()
    watched = adabatch.monitor(model, optimizer, measure="all", accumulate=3)
    train(model, optimizer, batches(6), accumulate=3)
    sizes = [len(inputs) for inputs, _ in batches(6)]
    assert watched.diagnostics.column("batch_size").tolist() == [sum(sizes[:3]), sum(sizes[3:])]
    with pytest.raises(RuntimeError, match="accumulate=3"):
        train(model, optimizer, batches(1))


def test_a_step_that_the_grad_scaler_skips_is_not_recorded():
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    watched = adabatch.monitor(model, optimizer, measure="all", grad_scaler=scaler)
    traces = []
    for step, batch in enumerate(batches(5)):
        bare, _ = make()
        bare.load_state_dict(model.state_dict())
        grads = oracle.per_sample_grads(bare, per_sample_loss, batch)
        traces.append(float(oracle.variance_trace(grads)))
        loss = per_sample_loss(model, batch).mean() * (math.inf if step == 2 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    found = watched.diagnostics.column("variance_trace").tolist()
    assert found[:2] + found[3:] == pytest.approx(traces[:2] + traces[4:], rel=1e-4)
    assert watched.diagnostics.column("measured").tolist() == [True, True, False, True]


def test_paused_passes_and_evaluation_do_not_count():
    model, optimizer = make()
    watched = adabatch.monitor(model, optimizer, measure="all")
    with watched.paused():
        per_sample_loss(model, batches(1)[0]).sum().backward()
    optimizer.zero_grad()
    with torch.no_grad():
        model(torch.randn(5, 3))
    train(model, optimizer, batches(1))
    assert watched.latest.batch_size == 12


def test_removed_it_leaves_no_trace():
    model, optimizer = make()
    with adabatch.monitor(model, optimizer) as watched:
        train(model, optimizer, batches(2))
    train(model, optimizer, batches(2))
    assert watched.diagnostics.n_steps == 2
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_resumed_it_continues():
    data, options = batches(12), {"measure": adabatch.Every(2, samples=4)}
    model, optimizer = make()
    whole = adabatch.monitor(model, optimizer, **options)
    train(model, optimizer, data, whole)
    model, optimizer = make()
    first = adabatch.monitor(model, optimizer, **options)
    train(model, optimizer, data[:5], first)
    state = first.state_dict()
    first.remove()
    second = adabatch.monitor(model, optimizer, **options)
    second.load_state_dict(state)
    train(model, optimizer, data[5:], second)
    for name in ("step", "samples_seen", "batch_size", "variance_trace", "loss"):
        expected = whole.diagnostics.column(name)[5:]
        assert repr(second.diagnostics.column(name).tolist()) == repr(expected.tolist())


ERRORS = {
    "nothing": ({"measure": None}, ValueError, "measure=None measures nothing"),
    "estimator": ({"estimator": adabatch.MicroBatch()}, ValueError, "need adabatch.wrap"),
    "typo": ({"accumulated": 2}, TypeError, r"^monitor\(\) got .* did you mean accumulate=\?"),
    "reduction": ({"loss_reduction": "none"}, ValueError, "loss_reduction must be one of"),
    "history": ({"diagnostics": 5}, TypeError, "diagnostics must be None"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_leave_everything_as_it_was(options, error, message):
    model, optimizer = make()
    with pytest.raises(error, match=message):
        adabatch.monitor(model, optimizer, **options)
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("passes", [2, 4])
def test_accumulation_that_was_not_passed_is_an_error(passes, scaled):
    """Not a loop in which nothing is ever measured; with accumulate= it is measured."""
    for accumulate in (1, passes):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
        watched = adabatch.monitor(model, optimizer, measure="all", accumulate=accumulate,
                                   grad_scaler=scaler if scaled else None)

        def train(model=model, optimizer=optimizer, scaler=scaler):
            for _ in range(6):
                optimizer.zero_grad()
                for _ in range(passes):
                    loss = model(torch.randn(8, 4)).square().mean() / passes
                    scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        if accumulate == 1:
            with pytest.raises(RuntimeError, match=f"saw {passes} backward.*pass accumulate=k"):
                train()
        else:
            train()
            assert watched.diagnostics.n_measured == 6
        watched.remove()


def test_an_optimizer_hook_added_later_does_not_disturb():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with adabatch.monitor(model, optimizer, measure="all") as watched:
        before = len(optimizer._optimizer_step_pre_hooks)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert len(calls) == watched.diagnostics.n_measured == 6
        assert len(optimizer._optimizer_step_pre_hooks) == before  # the detector's own is gone
