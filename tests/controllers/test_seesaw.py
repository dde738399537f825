"""Seesaw: batch and lr together make of each scheduled cut c what was published: c by the batch and
√c by the lr."""

import math

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

import adabatch
from adabatch import AdaptiveDataLoader
from adabatch.controllers import Seesaw
from tests.options import make_scheduler
from tests.scripted import Slope, ones


def train(optimizer_kind, make_schedule, n_steps, schedule_first=True, n=100_000, **options):
    """[(scheduled lr, lr stepped with, batch size)] of each step."""
    model = Slope()
    optimizer = optimizer_kind(model.parameters(), lr=0.4)
    loader = AdaptiveDataLoader(ones(n), 16)
    scheduler = make_scheduler(optimizer, loader, None, coupling="seesaw", min_batch_size=1,
                               **options)
    schedule, rows = make_schedule(optimizer), []
    for (inputs,), _ in zip(loader, range(n_steps), strict=False):
        model(inputs).mean().backward()
        scheduled = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if schedule_first:
            schedule.step()
        scheduler.step(1.0)
        if not schedule_first:
            schedule.step()
        rows.append((scheduled, scheduler.get_last_lr()[0], len(inputs)))
    return rows


@pytest.mark.parametrize(("kind", "exponent"), [(Adam, 1.0), (SGD, 0.5)])
def test_a_cut_by_c(kind, exponent):
    rows = train(kind, lambda optimizer: MultiStepLR(optimizer, [2, 4], gamma=1 / 16), 6,
                 max_batch_size=5000)
    cuts = [1, 1, 16, 16, 256, 256]
    assert [size for _, _, size in rows] == [16 * cut**exponent for cut in cuts]
    assert [lr for _, lr, _ in rows] == pytest.approx([0.4 / math.sqrt(cut) for cut in cuts])
    assert [lr for lr, _, _ in rows] == pytest.approx([0.4 / cut for cut in cuts])


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_cosine_after_a_warm_up(kind):
    def schedule(optimizer):
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.25, total_iters=5),
                                        CosineAnnealingLR(optimizer, 30)], [5])

    rows = train(kind, schedule, 30)
    for scheduled, lr, size in rows:
        # what the noise goes by falls as scheduled, within the rounding of the size
        noise = lr / size if kind is SGD else lr / math.sqrt(size)
        assert noise == pytest.approx(scheduled / (16 if kind is SGD else 4), rel=1e-6)
    assert {size for _, _, size in rows[:6]} == {16}
    assert [size for _, _, size in rows] == sorted(size for _, _, size in rows)
    assert rows[-1][2] > 100 if kind is Adam else rows[-1][2] > 30


def test_beyond_the_largest_batch_the_lr_falls_as_scheduled():
    rows = train(Adam, lambda optimizer: MultiStepLR(optimizer, [1, 2, 3], gamma=0.25), 5,
                 max_batch_size=64)
    assert [size for _, _, size in rows] == [16, 64, 64, 64, 64]
    assert [lr for _, lr, _ in rows] == pytest.approx([0.4, 0.2, 0.05, 0.0125, 0.0125])


def test_a_step_late_the_lr_still_fits_the_batch():
    rows = train(SGD, lambda optimizer: MultiStepLR(optimizer, [2], gamma=1 / 16), 4,
                 schedule_first=False)
    assert [size for _, _, size in rows] == [16, 16, 16, 64]
    assert [lr for _, lr, _ in rows] == pytest.approx([0.4, 0.4, 0.4 / 16, 0.1])


def test_wrap_measures_nothing():
    model = torch.nn.Linear(1, 1)
    optimizer, _, scheduler = adabatch.wrap(model, Adam(model.parameters(), lr=0.1),
                                            torch.utils.data.DataLoader(ones(40), 20),
                                            coupling="seesaw")
    assert repr(scheduler.controller) == "Seesaw(batch_size=20, rule='sqrt')"
    assert not model._forward_hooks
    optimizer.param_groups[0]["lr"] = 0.0
    scheduler.step(1.0)


def test_rates_of_zero():
    controller = Seesaw(64)
    assert [controller.propose(None, loss=1.0, lr=lr) for lr in (0.0, 0.1, 0.0, 0.05)] == [
        64.0, 64.0, math.inf, 128.0
    ]


def test_arguments():
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        Seesaw(0)
    with pytest.raises(ValueError, match="rule must be one of 'sqrt', 'linear', got 'adam'"):
        Seesaw(8, rule="adam")
