"""Betas to the power of the batch: Adam's averages after batches of any sizes are those of single
samples' decay, bias correction included."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, SparseAdam

from adabatch.scheduler.betas import BetaRescaler

RATIOS = (1.0, 4.0, 0.5, 2.5, 16.0, 1.0, 0.25)
BETAS, LR, EPS = (0.9, 0.99), 0.1, 1e-8


def reference(grads, ratios, betas=BETAS):
    """Adam by its definition in float64, with β^r for each step and the true sum of the weights as
    bias correction."""
    weight, first, second, rest = 0.0, 0.0, 0.0, [1.0, 1.0]
    path = []
    for grad, ratio in zip(grads, ratios, strict=True):
        one, two = (beta**ratio for beta in betas)
        first, second = one * first + (1 - one) * grad, two * second + (1 - two) * grad**2
        rest = [left * beta**ratio for left, beta in zip(rest, betas, strict=True)]
        weight -= LR * (first / (1 - rest[0])) / ((second / (1 - rest[1])) ** 0.5 + EPS)
        path.append(weight)
    return path


def run(optimizer, parameter, ratios, horizon_ratio, grads):
    path = []
    for grad, ratio in zip(grads, ratios, strict=True):
        horizon_ratio[0] = ratio
        parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()
        path.append(parameter.item())
    return path


def grads_of(n):
    return [((7 * i) % 5 - 1.5) / 2 for i in range(n)]


def make(kind=Adam, **options):
    parameter, ratio = nn.Parameter(torch.zeros(1, dtype=torch.float64)), [1.0]
    optimizer = kind([parameter], lr=LR, betas=BETAS, eps=EPS, **options)
    return parameter, optimizer, ratio, BetaRescaler(optimizer, lambda: ratio[0])


@pytest.mark.parametrize("options", [
    {}, {"foreach": True}, {"capturable": False, "amsgrad": False}
], ids=["plain", "foreach", "explicit"])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_against_the_definition(kind, options):
    parameter, optimizer, ratio, _ = make(kind, weight_decay=0.0, **options)
    assert run(optimizer, parameter, RATIOS, ratio, grads_of(7)) == pytest.approx(
        reference(grads_of(7), RATIOS), rel=1e-5
    )
    assert optimizer.param_groups[0]["betas"] == BETAS
    assert optimizer.state[parameter]["step"].item() == 7


def test_a_batch_of_the_base_size_changes_nothing_bit_for_bit():
    parameter, optimizer, ratio, horizon = make()
    plain = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    other = Adam([plain], lr=LR, betas=BETAS, eps=EPS)
    assert run(optimizer, parameter, [1.0] * 6, ratio, grads_of(6)) == run(other, plain, [1.0] * 6,
                                                                           [1.0], grads_of(6))
    assert (horizon.steps, horizon.exponents) == (6, 6.0)


def test_steps_before_it_was_attached_count_as_of_the_base_size():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([parameter], lr=LR, betas=BETAS, eps=EPS)
    path = run(optimizer, parameter, [1.0] * 3, [1.0], grads_of(3))
    ratio = [1.0]
    BetaRescaler(optimizer, lambda: ratio[0])
    path += run(optimizer, parameter, RATIOS, ratio, grads_of(10)[3:])
    assert path == pytest.approx(reference(grads_of(10), (1.0, 1.0, 1.0, *RATIOS)), rel=1e-5)


def test_resumed():
    parameter, optimizer, ratio, horizon = make()
    run(optimizer, parameter, RATIOS[:4], ratio, grads_of(4))
    again, other, other_ratio, fresh = make()
    again.data.copy_(parameter.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.load_state_dict(horizon.state_dict())
    rest = grads_of(7)[4:]
    assert run(other, again, RATIOS[4:], other_ratio, rest) == run(optimizer, parameter, RATIOS[4:],
                                                                   ratio, rest)


def test_a_parameter_left_out_of_steps_keeps_its_count():
    one, two = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = Adam([{"params": [one]}, {"params": [two], "betas": (0.5, 0.9)}], lr=LR,
                     betas=BETAS)
    BetaRescaler(optimizer, lambda: 3.0)
    for step in range(5):
        one.grad = torch.ones_like(one)
        two.grad = torch.ones_like(two) if step % 2 == 0 else None
        optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in (one, two)] == [5, 3]
    assert [group["betas"] for group in optimizer.param_groups] == [BETAS, (0.5, 0.9)]
    # a constant gradient: each corrected average is 1 whatever the weights, so each step is the lr
    assert one.item() == pytest.approx(-5 * LR, rel=1e-5)
    assert two.item() == pytest.approx(-3 * LR, rel=1e-5)


def test_a_step_that_raised_leaves_nothing_behind():
    class Failing(Adam):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise FloatingPointError("out of range")
            return super().step(closure)

    parameter, optimizer, ratio, horizon = make(Failing)
    run(optimizer, parameter, [1.0, 2.0], ratio, grads_of(2))
    optimizer.fails = True
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    horizon.restore()
    assert optimizer.param_groups[0]["betas"] == BETAS
    assert optimizer.state[parameter]["step"].item() == 2
    assert (horizon.steps, horizon.exponents) == (2, 3.0)
    optimizer.fails = False
    rest = run(optimizer, parameter, [4.0, 1.0], ratio, grads_of(4)[2:])
    assert rest == pytest.approx(reference(grads_of(4), (1.0, 2.0, 4.0, 1.0))[2:], rel=1e-5)


def test_counts_that_are_plain_integers():
    parameter = nn.Parameter(torch.zeros(3, 1))
    optimizer = SparseAdam([parameter], lr=LR, betas=BETAS)
    BetaRescaler(optimizer, lambda: 4.0)
    for _ in range(3):
        parameter.grad = torch.sparse_coo_tensor([[1]], [[1.0]], (3, 1), check_invariants=True)
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 3
    assert parameter[1].item() == pytest.approx(-3 * LR, rel=1e-5)


def test_removed_it_leaves_no_trace():
    parameter, optimizer, _, horizon = make()
    horizon.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="SGD has none"):
        BetaRescaler(SGD([parameter], lr=0.1), lambda: 1.0)
