"""Loops that do not do what scheduler.step(loss) assumes are named; right loops are left alone."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch.controllers import Scheduled

NOTHING = {"controller": Scheduled("0:8")}


def make(n=512, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = TensorDataset(torch.randn(n, 4), torch.randint(0, 3, (n,)))
    plain = DataLoader(data, batch_size=8)
    options = {"batch_sizes": (8, 8), **options}
    return model, *adabatch.wrap(model, SGD(model.parameters(), lr=0.05), plain, **options), plain


def messages_of(loop, parts, *names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(*parts)
    ours = [str(each.message) for each in caught if "scheduler.step" in str(each.message)
            or "accumulate" in str(each.message)]
    assert all(each.filename == __file__ for each in caught), [each.filename for each in caught]
    return ours


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plain_loop(model, optimizer, loader, scheduler, _, epochs=1):
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)


def scheduler_first(model, optimizer, loader, scheduler, _):
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        scheduler.step(loss)
        optimizer.step()


def accumulated(model, optimizer, loader, scheduler, _, k=4, every_pass=False, at_end=False):
    n = 0
    for _ in range(2):
        for batch in loader:
            loss = loss_of(model, batch)
            (loss / k).backward()
            n += 1
            whole = n % k == 0 or (at_end and loader.samples_left == 0)
            if whole:
                n = 0
                optimizer.step()
                optimizer.zero_grad()
            if whole or every_pass:
                scheduler.step(loss)


def validated(model, optimizer, loader, scheduler, _):
    for _ in range(3):
        plain_loop(model, optimizer, loader, scheduler, _)
        with torch.no_grad():
            for batch in loader:
                loss_of(model, batch)


def closure_loop(model, optimizer, loader, scheduler, _):
    for batch in loader:
        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        scheduler.step(optimizer.step(closure))


def batch_twice(model, optimizer, loader, scheduler, _):
    for batch in loader:
        for _ in range(2):
            plain_loop(model, optimizer, [batch], scheduler, _)


def skipping(model, optimizer, loader, scheduler, _):
    """Three steps of four at the start have a gradient that is not finite, as under float16."""
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if step < 12 and step % 4:
            model.weight.grad[0, 0] = torch.inf
        else:
            optimizer.step()
        scheduler.step(loss)


def resumed(model, optimizer, loader, scheduler, plain):
    for _ in range(12):
        plain_loop(model, optimizer, [next(iter(loader))], scheduler, plain)
        scheduler.load_state_dict(scheduler.state_dict())


RIGHT = {
    "plain": (plain_loop, {}), "three epochs": (lambda *parts: plain_loop(*parts, epochs=3), {}),
    "scheduler first": (scheduler_first, {}),
    "accumulate": (accumulated, {"accumulate": 4, "batch_sizes": (32, 32)}),
    "carried over epochs": (lambda *parts: accumulated(*parts, k=3),
                            {"accumulate": 3, "batch_sizes": (24, 24)}),
    "micro-batches": (plain_loop, {"micro_batches": 3}), "validation": (validated, {}),
    "closure": (closure_loop, {}), "a batch twice": (batch_twice, {}),
    "skipped steps": (skipping, {}), "resumed": (resumed, {}),
}


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "Scheduled"])
@pytest.mark.parametrize(("loop", "options"), RIGHT.values(), ids=RIGHT)
def test_right_loops_are_left_alone(loop, options, measured):
    size = options.get("batch_sizes", (8, 8))[0]
    how = {"measure": "all"} if measured else {"controller": Scheduled(f"0:{size}")}
    assert messages_of(loop, make(**how, **options)) == []


@pytest.mark.parametrize("growth", [1.0, 2.0])
def test_a_grad_scaler_that_skips_steps_is_left_alone(growth):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def loop(model, optimizer, loader, scheduler, _):
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if scaler.get_scale() > 2.0**16:
                model.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step(loss)

    parts = make(grad_scaler=scaler, controller=Scheduled("0:8"))
    assert messages_of(loop, parts) == []
    assert scaler.get_scale() == 2.0**16


def not_passed(k):
    return lambda *parts: accumulated(*parts, k=k, every_pass=True)


def another_loader(model, optimizer, loader, scheduler, plain):
    plain_loop(model, optimizer, plain, scheduler, plain)


def all_at_once(model, optimizer, loader, scheduler, plain):
    plain_loop(model, optimizer, list(loader), scheduler, plain)


def looked_at_first(model, optimizer, loader, scheduler, plain):
    next(iter(loader))
    plain_loop(model, optimizer, plain, scheduler, plain)


def no_step(model, optimizer, loader, scheduler, plain):
    other = SGD(model.parameters(), lr=0.1)  # as of a framework that made its own
    plain_loop(model, other, loader, scheduler, plain)


def late_scheduler(model, optimizer, loader, scheduler, plain):
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            scheduler.step(loss)


WRONG = {
    "accumulate=2 not passed": (not_passed(2), "pass accumulate=k"),
    "accumulate=4 not passed": (not_passed(4), "pass accumulate=k"),
    "accumulate=8 not passed": (not_passed(8), "pass accumulate=k"),
    "another optimizer": (no_step, "no step of the optimizer that was wrapped"),
    "another loader": (another_loader, "Hugging Face's Trainer, Accelerate's prepare"),
    "a list of batches": (all_at_once, "no batch of the loader that adabatch.wrap returned"),
    "a look, then another loader": (looked_at_first, "iterate over that loader"),
    "several steps a call": (late_scheduler, "after each optimizer.step()"),
}


@pytest.mark.parametrize(("loop", "message"), WRONG.values(), ids=WRONG)
def test_wrong_loops_are_named_once(loop, message):
    found = messages_of(loop, make(**NOTHING))
    assert len(found) == 1
    assert message in found[0]


def test_the_named_cure_for_accumulation_is_right():
    wrong = messages_of(not_passed(4), make(measure="all"))
    assert any("pass accumulate=k" in each for each in wrong)
    assert messages_of(accumulated, make(accumulate=4, batch_sizes=(32, 32))) == []


@pytest.mark.parametrize("measure", ["all", adabatch.Every(2), None])
@pytest.mark.parametrize("n", [136, 8, 16, 40])
def test_a_short_last_group_is_a_counted_skip(n, measure):
    """Groups of 4 batches of 8, stepped at an epoch's end too."""
    how = NOTHING | {"controller": Scheduled("0:32")} if measure is None else {"measure": measure}
    parts = make(n=n, accumulate=4, batch_sizes=(32, 32), **how)
    if n == 8 or n == 16:  # every group is short
        loop = accumulated
        expected = 0
    else:
        loop, expected = (lambda *parts: accumulated(*parts, at_end=True)), 2
    found = messages_of(loop, parts)
    scheduler = parts[3]
    dropped = scheduler.diagnostics.dropped["short accumulation group"]
    if measure == "all":
        assert dropped == expected
        assert len(found) == (1 if expected else 0)
    assert scheduler.samples_seen == 2 * n if expected else True
    assert scheduler.step_count >= 1 or n < 32


def test_steps_that_are_all_shorter_than_accumulate_are_an_error():
    parts = make(accumulate=4, batch_sizes=(32, 32), measure="all")
    with pytest.warns(UserWarning, match="If all steps have 1, pass accumulate=1"), \
            pytest.raises(RuntimeError, match="If all steps have 1, pass accumulate=1"):
        plain_loop(*parts)


@pytest.mark.parametrize("forward_twice", [False, True])
def test_two_losses_of_one_batch_are_not_accumulation(forward_twice):
    def loop(model, optimizer, loader, scheduler, _):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward(retain_graph=True)
            outputs = model(inputs) if forward_twice else outputs
            outputs.square().mean().backward()
            optimizer.step()
            scheduler.step(loss)

    with pytest.raises(RuntimeError, match=r"add (them|the losses)"):
        loop(*make(accumulate=2, batch_sizes=(16, 16), measure="all"))
    with pytest.raises(RuntimeError, match="add several losses of one batch"):
        loop(*make(measure="all"))


def test_batches_fetched_ahead_are_no_repeated_ones():
    def loop(model, optimizer, loader, scheduler, _):
        for _ in range(2):
            batches, n = iter(loader), 0
            following = next(batches)
            while following is not None:
                batch, following = following, next(batches, None)
                loss = loss_of(model, batch)
                (loss / 4).backward()
                n += 1
                if n % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step(loss)

    assert messages_of(loop, make(accumulate=4, batch_sizes=(32, 32), measure="all")) == []
