"""A step that raises leaves nothing behind: lr, betas and step counts are the user's at once."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, MultiplicativeLR
from torch.utils.data import DataLoader, TensorDataset

import adabatch

SCHEDULES = [
    lambda optimizer: ExponentialLR(optimizer, 0.5),
    lambda optimizer: MultiplicativeLR(optimizer, lambda epoch: 0.9),
    lambda optimizer: CosineAnnealingLR(optimizer, 10),
]


class Failing(torch.optim.AdamW):
    """Raises in the step, before or after it was taken."""

    error, late = None, False

    def step(self, closure=None):
        if self.error is not None and not self.late:
            raise self.error
        out = super().step(closure)
        if self.error is not None:
            raise self.error
        return out


def raise_in(optimizer, where, error):
    """Let the next step raise there; a function that ends it."""
    if where in ("step", "after the step"):
        optimizer.error, optimizer.late = error, where != "step"
        return lambda: setattr(optimizer, "error", None)

    def hook(*_):
        raise error

    register = {"pre-hook": optimizer.register_step_pre_hook,
                "post-hook": optimizer.register_step_post_hook}[where]
    return register(hook).remove


def wrapped(**options):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = Failing(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(96, 5)), batch_size=16)
    coupling = adabatch.Coupling("linear", base_batch_size=64, scale_betas=True)
    return model, *adabatch.wrap(
        model, optimizer, loader, batch_sizes=(16, 16), coupling=coupling, **options)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()],
                         ids=["RuntimeError", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["step", "after the step", "pre-hook", "post-hook"])
@pytest.mark.parametrize("make", SCHEDULES, ids=["recursive", "multiplicative", "cosine"])
@pytest.mark.parametrize("first", [False, True], ids=["", "schedule before wrap"])
def test_lr_and_betas_are_the_users(make, where, error, first):
    torch.manual_seed(0)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    expected = make(plain)
    model = nn.Linear(5, 3)
    optimizer = Failing(model.parameters(), lr=0.1)
    schedule = make(optimizer) if first else None
    loader = DataLoader(TensorDataset(torch.randn(96, 5)), batch_size=16)
    coupling = adabatch.Coupling("linear", base_batch_size=64, scale_betas=True)
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, loader, batch_sizes=(16, 16), coupling=coupling)
    schedule = schedule or make(optimizer)
    for step, (inputs,) in enumerate(loader):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        end = raise_in(optimizer, where, error) if step == 2 else None
        try:
            optimizer.step()
        except (RuntimeError, KeyboardInterrupt):
            assert step == 2
        if end is not None:
            end()
        group = optimizer.param_groups[0]
        assert group["lr"] == plain.param_groups[0]["lr"]
        assert group["betas"] == (0.9, 0.999)
        assert optimizer.state_dict()["param_groups"][0]["lr"] == group["lr"]
        plain.step()
        expected.step()
        schedule.step()
        scheduler.step(loss)
    assert step == 5
    assert schedule.get_last_lr() == expected.get_last_lr()
    counts = {float(state["step"]) for state in optimizer.state.values()}
    assert counts == {5.0 if where in ("step", "pre-hook") else 6.0}


def test_the_step_is_the_users_again_after_remove():
    _, optimizer, _, scheduler = wrapped()
    assert "step" in vars(optimizer)
    scheduler.remove()
    assert "step" not in vars(optimizer)


def test_an_lr_schedules_step_is_there_again_after_remove():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ExponentialLR(optimizer, 0.5)
    before = vars(optimizer)["step"]
    data = DataLoader(TensorDataset(torch.randn(96, 5)), batch_size=16)
    _, _, scheduler = adabatch.wrap(model, optimizer, data, batch_sizes=(8, 16))
    scheduler.remove()
    assert vars(optimizer)["step"] is before


def test_an_optimizer_is_copied_saved_and_freed_as_before():
    model, optimizer, loader, scheduler = wrapped()
    ExponentialLR(optimizer, 0.5)
    copied = copy.deepcopy(optimizer)
    assert "step" not in vars(copied)
    copied.step()
    torch.save(optimizer, io.BytesIO())
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(scheduler)
        del scheduler, loader
        assert reference() is None
    finally:
        gc.enable()
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()  # on its own from now on


def test_a_grad_scaler_sees_the_steps_own_signature():
    model, optimizer, loader, scheduler = wrapped(grad_scaler=(
        scaler := torch.amp.GradScaler("cpu", init_scale=2.0)))
    for inputs, in loader:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step(loss)
    assert scheduler.step_count == 6


def test_a_closure_that_raises():
    _model, optimizer, loader, _ = wrapped()

    def closure():
        raise ValueError("no loss")

    next(iter(loader))
    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("micro_batches", [None, 6], ids=["", "micro-batches"])
@pytest.mark.parametrize("where", ["post-hook", "closure"])
def test_a_state_saved_within_a_step_holds_no_factor(where, micro_batches, lr):
    """As by the handler of a signal that arrives there."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    adam = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = DataLoader(TensorDataset(torch.randn(64, 5)), batch_size=16)
    saved = []
    adam.register_step_post_hook(lambda *_: saved.append(optimizer.state_dict()))
    optimizer, loader, scheduler = adabatch.wrap(
        model, adam, loader, batch_sizes=(16, 16), micro_batches=micro_batches,
        coupling=adabatch.Coupling("linear", base_batch_size=64, scale_betas=True))
    for inputs, in loader:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        if where == "closure" and micro_batches is None:
            optimizer.step(lambda: saved.append(optimizer.state_dict()))
        else:
            optimizer.step()
        scheduler.step(loss)
    assert len(saved) >= 4
    for state in saved:
        assert float(state["param_groups"][0]["lr"]) == pytest.approx(0.1)
        assert state["param_groups"][0]["betas"] == (0.9, 0.999)
        assert all(float(each["step"]) in (0, 1, 2, 3, 4) for each in state["state"].values())
    assert float(adam.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert {float(each["step"]) for each in adam.state.values()} == {4.0}
    scheduler.remove()
    assert not adam._optimizer_state_dict_post_hooks
