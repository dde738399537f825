"""Online selection as published: one batch, losses of its splits, a step per part."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from adabatch.controllers import OnlineSelection
from adabatch.schedules.online import OnlineStep, online_step, select_batch_size, split_losses
from tests.scripted import Slope, regression, slope_run, steps


@pytest.mark.parametrize(
    ("losses", "smallest", "largest"),
    [
        ({256: 0.7, 128: 0.6, 64: 0.8}, 128, 64),
        ({256: 0.7, 128: 0.7, 64: 0.7}, 256, 256),
        ({64: 0.7, 256: 0.7000001, 128: 0.9}, 256, 128),
        ({256: math.nan, 128: 0.6, 64: 0.5}, 64, 128),
        ({256: -1.0, 128: -2.0}, 128, 256),
        ({256: 0.0, 128: 0.0}, 256, 256),
        ({256: math.inf, 128: math.inf}, 256, 256),
    ],
)
def test_selection(losses, smallest, largest):
    assert select_batch_size(losses) == smallest
    assert select_batch_size(losses, pick="largest") == largest


def test_selection_of_nothing():
    with pytest.raises(ValueError, match=r"at least one loss that is a number, got \{\}"):
        select_batch_size({})
    with pytest.raises(ValueError, match="at least one loss that is a number"):
        select_batch_size({256: math.nan})
    with pytest.raises(ValueError, match="pick must be one of 'smallest', 'largest', got 'best'"):
        select_batch_size({256: 1.0}, pick="best")


def spread_loss(model, part):
    """The variance of the part: like a batch-normalised network's loss, it depends on the batch."""
    return model(part["x"]).var(correction=0)


def test_losses_are_means_over_the_samples_of_the_parts():
    x = torch.tensor([1.0, 3.0, 2.0, 8.0, 5.0])
    losses = split_losses(
        nn.Identity(), spread_loss, {"x": x, "name": "kept"}, candidates=(8, 2, 1))
    parts = {8: [x], 2: [x[:2], x[2:4], x[4:]], 1: list(x[:, None])}
    expected = {
        size: sum(len(part) * part.var(correction=0).item() for part in split) / 5
        for size, split in parts.items()}
    assert losses == pytest.approx(expected, rel=1e-6)
    assert split_losses(
        nn.Identity(), lambda model, part: part, x, candidates=(2,)) == pytest.approx({2: 3.8})


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def loss_fn(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def test_evaluating_changes_neither_running_statistics_nor_gradients():
    model = normalised()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = split_losses(model, loss_fn, regression(64).tensors, candidates=(64, 32, 16))
    assert len(set(losses.values())) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_dependence_between_samples_ties():
    losses = split_losses(nn.Linear(3, 1), loss_fn, regression(256).tensors)
    assert select_batch_size(losses) == select_batch_size(losses, pick="largest") == 256


@pytest.mark.parametrize("lr", [lambda: 0.4, lambda: torch.tensor(0.4)], ids=["float", "tensor"])
@pytest.mark.parametrize(("size", "moves"), [(8, [0.4]), (4, [0.2, 0.2]), (3, [0.15, 0.15, 0.1])])
def test_one_step_per_part_with_its_share_of_the_lr(size, moves, lr):
    model = Slope()
    optimizer, lrs = SGD(model.parameters(), lr=lr()), []
    chosen = {8: 8, 4: 4, 3: 3}[size]

    def loss(model, part):
        if torch.is_grad_enabled():
            return model(part).mean()
        return torch.tensor(float(len(part) not in (chosen, 8 % chosen or chosen)))

    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: lrs.append(model.weight))
    step = online_step(model, optimizer, loss, torch.ones(8, 1), candidates=(8, 4, 3))
    assert (step.batch_size, step.n_steps) == (size, len(moves))
    assert lrs == pytest.approx([-sum(moves[: count + 1]) for count in range(len(moves))], rel=1e-6)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.4)
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_against_the_steps_by_hand():
    inputs, targets = regression(32).tensors
    ours, theirs = normalised(), normalised()
    optimizer = SGD(ours.parameters(), lr=0.2, momentum=0.9)
    other = SGD(theirs.parameters(), lr=0.2, momentum=0.9)
    schedule, reference = StepLR(optimizer, 2, 0.5), StepLR(other, 2, 0.5)
    for _ in range(3):
        step = online_step(ours, optimizer, loss_fn, (inputs, targets), candidates=(32, 16, 8))
        schedule.step()
        lr, losses = other.param_groups[0]["lr"], []
        for start in range(0, 32, step.batch_size):
            other.zero_grad()
            part = slice(start, start + step.batch_size)
            loss = loss_fn(theirs, (inputs[part], targets[part]))
            loss.backward()
            other.param_groups[0]["lr"] = lr * step.batch_size / 32
            other.step()
            losses.append(loss.item())
        other.param_groups[0]["lr"] = lr
        reference.step()
        assert step.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert step.batch_size == min(step.losses_by_size, key=step.losses_by_size.get)
    assert all(
        torch.equal(*pair)
        for pair in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert isinstance(step, OnlineStep)


def test_a_step_that_raises_leaves_the_lr():
    model = Slope()
    optimizer = SGD(model.parameters(), lr=0.4)
    with pytest.raises(RuntimeError, match="does not require grad"):
        online_step(
            model, optimizer, lambda model, part: part.mean(), torch.ones(8, 1), candidates=(4,))
    assert optimizer.param_groups[0]["lr"] == 0.4
    assert not optimizer._optimizer_step_pre_hooks


def test_bad_batches_and_candidates():
    for batch in ((), torch.tensor(1.0), (torch.ones(3), torch.ones(4)), torch.ones(0, 2)):
        with pytest.raises(
            ValueError, match="batch must hold tensors whose first dimension is the sample's"
        ):
            split_losses(nn.Identity(), loss_fn, batch)
    with pytest.raises(ValueError, match=r"candidates\[1\] must be an integer >= 1, got 0"):
        split_losses(nn.Identity(), loss_fn, torch.ones(4), candidates=(4, 0))
    with pytest.raises(TypeError, match="candidates must be a list or tuple of integers, got 4"):
        split_losses(nn.Identity(), loss_fn, torch.ones(4), candidates=4)


def controller(*choices, **options):
    sizes = iter([*choices, *[choices[-1]] * 100])

    def losses():
        chosen = next(sizes)
        return {size: float(size != chosen) for size in (64, 32, 16)}

    return OnlineSelection(losses, candidates=(64, 32, 16), **options)


def test_as_a_controller_it_chooses_again_after_the_largest_candidates_samples():
    run = slope_run(controller(16, 32, 64, 16), n=64 * 5, coupling="linear")
    moved = list(steps(*run))
    sizes = [64] + [16] * 4 + [32] * 2 + [64] + [16] * 4
    assert [rows for rows, _ in moved] == sizes
    assert [move for _, move in moved] == pytest.approx([size / 64 for size in sizes], rel=1e-5)


def test_the_controller_resumed_and_with_missing_losses():
    first, second = controller(16, 32), controller(32)
    first.on_step(samples=64, epoch=0)
    assert first.propose(None, loss=1.0, lr=0.1) == 16.0
    first.on_step(samples=48, epoch=0)
    second.load_state_dict(first.state_dict())
    second.on_step(samples=8, epoch=0)
    assert second.propose(None, loss=1.0, lr=0.1) == 16.0
    second.on_step(samples=8, epoch=0)
    assert second.propose(None, loss=1.0, lr=0.1) == 32.0
    short = OnlineSelection(lambda: {64: 1.0}, candidates=(64, 32))
    short.on_step(samples=64, epoch=0)
    with pytest.raises(ValueError, match=r"a loss for each of \[64, 32\], got none for \[32\]"):
        short.propose(None, loss=1.0, lr=0.1)
    diverged = OnlineSelection(lambda: {64: math.nan, 32: math.nan}, candidates=(64, 32))
    diverged.on_step(samples=64, epoch=0)
    assert diverged.propose(None, loss=math.nan, lr=0.1) == 64.0
