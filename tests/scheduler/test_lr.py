"""Factors on the lr live for one step only: everyone else sees the lr as if they were not there."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from adabatch import schedules
from adabatch.scheduler.lr import (
    DelayedValue,
    StepFactor,
    effective_lr_for,
    read_lrs,
    sgd_effective_lr,
)

SCHEDULES = {
    "StepLR": lambda optimizer: StepLR(optimizer, 3, 0.5),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "MultiplicativeLR": lambda optimizer: MultiplicativeLR(optimizer, lambda step: 0.95),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 12),
    "LinearLR": lambda optimizer: LinearLR(optimizer, 0.1, total_iters=8),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 2.0, total_steps=12),
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, 0.1, 1.0, step_size_up=3),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=4), ExponentialLR(optimizer, 0.9)], [4]
    ),
    "schedules.LinearLR": lambda optimizer: schedules.LinearLR(optimizer, 20),
}
LRS = {"float": lambda: 0.5, "tensor": lambda: torch.tensor(0.5)}
each_lr = pytest.mark.parametrize("lr", LRS.values(), ids=LRS)


def make_optimizer(lr, kind=SGD, groups=1, **options):
    """An optimizer over `groups` parameters of one entry, the gradient of each 1."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    return kind([{"params": [parameter]} for parameter in parameters], lr=lr, **options)


def weights(optimizer):
    return [parameter.item() for group in optimizer.param_groups for parameter in group["params"]]


@each_lr
@pytest.mark.parametrize("groups", [1, 3])
def test_the_factor_scales_the_step_and_is_gone_after_it(lr, groups):
    optimizer = make_optimizer(lr(), groups=groups)
    objects = [group["lr"] for group in optimizer.param_groups]
    factor = StepFactor(optimizer, lambda: 0.25)
    for step in (1, 2):
        optimizer.step()
        assert weights(optimizer) == pytest.approx([-0.125 * step] * groups)
        assert factor.last_lrs == [0.125] * groups
        assert read_lrs(optimizer) == [0.5] * groups
    if torch.is_tensor(objects[0]):
        assert all(group["lr"] is before
                   for group, before in zip(optimizer.param_groups, objects, strict=True))


def test_groups_with_lrs_of_their_own():
    one, shared = nn.Parameter(torch.zeros(1)), torch.tensor(0.5)
    two, three = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for parameter in (one, two, three):
        parameter.grad = torch.ones(1)
    optimizer = SGD([{"params": [one], "lr": 1.0}, {"params": [two]}, {"params": [three]}],
                    lr=shared)
    factor = StepFactor(optimizer, lambda: 0.5)
    optimizer.step()
    assert factor.last_lrs == [0.5, 0.25, 0.25]
    assert weights(optimizer) == [-0.5, -0.25, -0.25]
    assert read_lrs(optimizer) == [1.0, 0.5, 0.5]


@each_lr
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_lr_schedulers_do_not_see_it(make, lr, groups):
    ours, theirs = (make_optimizer(lr(), groups=groups, momentum=0.5) for _ in range(2))
    applied = 1.0
    watched = StepFactor(ours, lambda: applied)
    schedule, reference = make(ours), make(theirs)
    for step in range(11):
        applied = (0.5, 1.0, 0.3, 2.0, 0.0)[step % 5]
        ours.step()
        theirs.step()
        assert watched.last_lrs == pytest.approx([value * applied for value in read_lrs(theirs)],
                                                 rel=1e-6)
        assert read_lrs(ours) == read_lrs(theirs)
        schedule.step()
        reference.step()
        assert read_lrs(ours) == read_lrs(theirs)
    assert schedule.get_last_lr() == reference.get_last_lr()


class Failing(SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise FloatingPointError("out of range")
        return super().step(closure)


@each_lr
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_that_raises(lr, groups):
    optimizer = make_optimizer(lr(), Failing, groups)
    factor = StepFactor(optimizer, lambda: 0.5)
    for undo in (factor.restore, lambda: None):
        Failing.fails = True
        with pytest.raises(FloatingPointError):
            optimizer.step()
        undo()
    Failing.fails = False
    optimizer.step()
    assert weights(optimizer) == [-0.25] * groups
    assert read_lrs(optimizer) == [0.5] * groups


@each_lr
def test_an_lr_set_after_a_step_that_raised_stays(lr):
    optimizer = make_optimizer(lr(), Failing)
    factor = StepFactor(optimizer, lambda: 0.5)
    Failing.fails = True
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.75
    factor.restore()
    assert read_lrs(optimizer) == [0.75]


def test_skipped_steps_leave_everything_as_it_was():
    """A GradScaler leaves out optimizer.step() where gradients overflowed."""
    optimizer = make_optimizer(1.0)
    calls = []
    factor = StepFactor(optimizer, lambda: calls.append(None) or 0.5)
    schedule = ExponentialLR(optimizer, 0.5)
    for step in range(4):
        if step % 2 == 0:
            optimizer.step()
        schedule.step()
    assert len(calls) == 2
    assert weights(optimizer) == [-0.5 * (1 + 0.25)]
    assert factor.last_lrs == [0.125]
    assert read_lrs(optimizer) == [0.0625]


def test_a_real_grad_scaler():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=1.0)
    factor = StepFactor(optimizer, lambda: 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert parameter.item() == -0.5
    assert (factor.last_lrs, read_lrs(optimizer)) == ([0.5], [1.0])


@each_lr
def test_removed_it_leaves_no_trace(lr):
    optimizer = make_optimizer(lr())
    before = copy.deepcopy(optimizer.state_dict())
    factor = StepFactor(optimizer, lambda: 0.5)
    factor.remove()
    optimizer.step()
    assert weights(optimizer) == [-0.5]
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_removed_after_a_step_that_raised():
    optimizer = make_optimizer(0.5, Failing)
    factor = StepFactor(optimizer, lambda: 0.5)
    Failing.fails = True
    with pytest.raises(FloatingPointError):
        optimizer.step()
    factor.remove()
    assert read_lrs(optimizer) == [0.5]


def test_a_group_added_later_is_scaled_too():
    optimizer = make_optimizer(0.5)
    StepFactor(optimizer, lambda: 0.5)
    late = nn.Parameter(torch.zeros(1))
    late.grad = torch.ones(1)
    optimizer.add_param_group({"params": [late], "lr": 2.0})
    optimizer.step()
    assert weights(optimizer) == [-0.25, -1.0]
    assert read_lrs(optimizer) == [0.5, 2.0]


def test_a_pending_factor_meets_later_batches_only():
    factor = DelayedValue(1.0)
    assert factor.for_batch(0) == factor.for_batch(9) == 1.0
    factor.set(0.5, after_batch=4)
    assert (factor.for_batch(4), factor.for_batch(5), factor.latest) == (1.0, 0.5, 0.5)
    factor.set(0.25, after_batch=5)
    assert (factor.for_batch(5), factor.for_batch(6)) == (0.5, 0.25)
    factor.set(0.125, after_batch=5)
    assert (factor.for_batch(5), factor.for_batch(6)) == (0.5, 0.125)
    assert DelayedValue(0.25).for_batch(0) == 0.25


# The effective lr


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_the_effective_lr_is_the_long_run_step_of_sgd(momentum, dampening):
    optimizer = make_optimizer(0.1, momentum=momentum, dampening=dampening)
    for _ in range(300):
        before = weights(optimizer)[0]
        optimizer.step()
    step = before - weights(optimizer)[0]
    assert sgd_effective_lr(optimizer.param_groups[0]) == pytest.approx(step, rel=1e-5)


def test_the_effective_lr_of_nesterov_momentum():
    optimizer = make_optimizer(0.1, momentum=0.8, nesterov=True)
    for _ in range(300):
        before = weights(optimizer)[0]
        optimizer.step()
    assert sgd_effective_lr(optimizer.param_groups[0]) == pytest.approx(
        before - weights(optimizer)[0], rel=1e-4
    )


def test_effective_lr_for():
    assert effective_lr_for(make_optimizer(0.1)) is sgd_effective_lr
    with pytest.raises(ValueError, match=r"known for Adam.*effective_lr=lambda group"):
        effective_lr_for(make_optimizer(0.1, Adam))
    assert effective_lr_for(make_optimizer(0.1, Adam), len) is len
    with pytest.raises(TypeError, match=r"callable of a param group, got 0\.1"):
        effective_lr_for(make_optimizer(0.1), 0.1)
