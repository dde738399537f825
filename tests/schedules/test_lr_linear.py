"""LinearLR by steps against linearlr, and by samples against the closed form and its integral."""

import io

import linearlr
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adabatch.schedules import LinearLR

MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def new_optimizer(lrs=(0.4,), tensor=False):
    groups = [{"params": [torch.zeros(1, requires_grad=True)],
               "lr": torch.tensor(lr) if tensor else lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=0.1)


def stepped(scheduler, *args, **kwargs):
    """One step of the optimizer and of the scheduler; the lrs the step used."""
    used = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    scheduler.optimizer.step()
    scheduler.step(*args, **kwargs)
    return used


sequences = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@MANY
@given(st.integers(1, 60) | st.floats(0.5, 60.0),
       st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=3), st.integers(-1, 20))
def test_by_steps_it_is_linearlrs(T, lrs, last_epoch):
    optimizers = [new_optimizer(lrs), new_optimizer(lrs)]
    for optimizer in optimizers if last_epoch >= 0 else ():
        for group in optimizer.param_groups:
            group["initial_lr"] = 2 * group["lr"]
    ours = LinearLR(optimizers[0], T, last_epoch)
    theirs = linearlr.LinearLR(optimizers[1], T, last_epoch)
    for _ in range(int(T) - max(0, last_epoch + 1)):
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert stepped(ours) == stepped(theirs)
    if theirs.last_epoch <= T:
        assert ours.get_last_lr() == theirs.get_last_lr()


def test_after_the_budget_the_lr_stays_zero():
    ours, theirs = LinearLR(new_optimizer(), 2), linearlr.LinearLR(new_optimizer(), 2)
    for _ in range(4):
        stepped(ours)
        stepped(theirs)
    assert theirs.get_last_lr()[0] < 0
    assert ours.get_last_lr() == [0.0]
    by_samples = LinearLR(new_optimizer(), budget_samples=100)
    stepped(by_samples, 130)
    assert by_samples.get_last_lr() == [0.0]


@MANY
@given(sequences, st.integers(100, 5000))
def test_the_lr_is_a_function_of_the_samples_seen(sizes, budget):
    scheduler = LinearLR(new_optimizer([0.4, 2.0]), budget_samples=budget)
    for i, size in enumerate(sizes):
        seen = sum(sizes[:i])
        assert stepped(scheduler, size) == pytest.approx([max(0.0, lr * (1 - seen / budget))
                                                          for lr in (0.4, 2.0)])


@MANY
@given(sequences)
def test_trapezoids_have_the_same_integral_for_any_sizes(sizes):
    """Between the lrs at the samples seen the line is straight, so trapezoids measure it exactly:
    lr₀ · budget / 2."""
    budget = sum(sizes)
    scheduler = LinearLR(new_optimizer(), budget_samples=budget)
    area = 0.0
    for size in sizes:
        [before] = stepped(scheduler, size)
        area += size * (before + scheduler.get_last_lr()[0]) / 2
    assert area == pytest.approx(0.4 * budget / 2)


@MANY
@given(sequences)
def test_the_sum_of_steps_exceeds_it_by_the_squares(sizes):
    budget = sum(sizes)
    scheduler = LinearLR(new_optimizer(), budget_samples=budget)
    area = sum(size * stepped(scheduler, size)[0] for size in sizes)
    assert area == pytest.approx(0.4 * (budget / 2 + sum(size**2 for size in sizes) / (2 * budget)))


@MANY
@given(sequences)
def test_announced_sizes_make_the_sum_itself_the_same(sizes):
    budget = sum(sizes)
    scheduler = LinearLR(new_optimizer(), budget_samples=budget, batch_size=sizes[0])
    area = sum(size * stepped(scheduler, size, next_samples=after)[0]
               for size, after in zip(sizes, [*sizes[1:], 1], strict=True))
    assert area == pytest.approx(0.4 * budget / 2)


@MANY
@given(sequences, st.integers(1, 2000))
def test_announced_sizes_beyond_the_budget(sizes, budget):
    """The last batch reaches beyond: the area is that up to the samples seen, which is never more
    than the whole."""
    scheduler = LinearLR(new_optimizer(), budget_samples=budget, batch_size=sizes[0])
    area = sum(size * stepped(scheduler, size, next_samples=after)[0]
               for size, after in zip(sizes, [*sizes[1:], 1], strict=True))
    inside = min(sum(sizes), budget)
    assert area == pytest.approx(0.4 * (inside - inside**2 / (2 * budget)))


def test_a_constant_batch_is_the_schedule_by_steps():
    by_steps = LinearLR(new_optimizer(), 20)
    by_samples = LinearLR(new_optimizer(), budget_samples=20 * 64)
    for _ in range(20):
        assert stepped(by_steps) == pytest.approx(stepped(by_samples, 64))


def test_tensor_lrs_are_written_in_place():
    optimizer = new_optimizer([0.4, 2.0], tensor=True)
    tensors = [group["lr"] for group in optimizer.param_groups]
    scheduler = LinearLR(optimizer, budget_samples=100)
    stepped(scheduler, 25)
    assert [group["lr"] for group in optimizer.param_groups] == tensors
    assert tensors[0] is optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(torch.stack(tensors), torch.tensor([0.3, 1.5]))


@pytest.mark.parametrize("arguments", [{"T": 40}, {"budget_samples": 4000},
                                       {"budget_samples": 4000, "batch_size": 16}])
def test_a_resumed_run_equals_an_unbroken_one(arguments):
    def run_steps(scheduler, steps):
        sizes = [{"samples": 16 + n, "next_samples": 17 + n} for n in steps]
        return [stepped(scheduler, **({} if "T" in arguments else each)) for each in sizes]

    expected = run_steps(LinearLR(new_optimizer(), **arguments), range(20))
    first = LinearLR(new_optimizer(), **arguments)
    rows = run_steps(first, range(10))
    file = io.BytesIO()
    torch.save([first.state_dict(), first.optimizer.state_dict()], file)
    assert file.tell() < 10_000
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    second = LinearLR(new_optimizer(), **arguments)
    second.load_state_dict(state)
    second.optimizer.load_state_dict(optimizer_state)
    assert rows + run_steps(second, range(10, 20)) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "T=None and budget_samples=None"),
        ({"T": 5, "budget_samples": 5}, ValueError, "T=5 and budget_samples=5"),
        ({"T": 0}, ValueError, "got 0"),
        ({"T": -3}, ValueError, "-3"),
        ({"T": float("inf")}, ValueError, "inf"),
        ({"T": "9"}, TypeError, "'9'"),
        ({"budget_samples": 0}, ValueError, "got 0"),
        ({"budget_samples": None, "T": 5, "batch_size": 3}, ValueError, "batch_size"),
        ({"budget_samples": 50, "batch_size": 0}, ValueError, "got 0"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        LinearLR(new_optimizer(), **arguments)


def test_bad_steps():
    scheduler = LinearLR(new_optimizer(), budget_samples=50)
    scheduler.optimizer.step()
    with pytest.raises(TypeError, match="by samples"):
        scheduler.step()
    with pytest.raises(ValueError, match="-4"):
        scheduler.step(-4)
    with pytest.raises(TypeError, match="list"):
        LinearLR([1], 5)
