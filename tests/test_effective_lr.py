"""The effective lr: what a controller is told."""

import pytest
from torch.optim import Adam

from adabatch.scheduler.effective_lr import effective_lr_for, sgd_effective_lr
from tests.test_step_factor import make_optimizer, weights


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
    assert sgd_effective_lr(optimizer.param_groups[0]) == pytest.approx(before - weights(optimizer)[0], rel=1e-4)


def test_effective_lr_for():
    assert effective_lr_for(make_optimizer(0.1)) is sgd_effective_lr
    with pytest.raises(ValueError, match=r"known for Adam.*effective_lr=lambda group"):
        effective_lr_for(make_optimizer(0.1, Adam))
    assert effective_lr_for(make_optimizer(0.1, Adam), len) is len
    with pytest.raises(TypeError, match=r"callable of a param group, got 0\.1"):
        effective_lr_for(make_optimizer(0.1), 0.1)
