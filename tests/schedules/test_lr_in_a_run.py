"""lr schedules by samples beside a BatchSizeScheduler that changes batch and lr: the loop of the
README."""

import pytest
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from adabatch import AdaptiveDataLoader
from adabatch.controllers import Scheduled
from adabatch.schedules import ExponentialBS, LinearLR, SampleClock, VirtualBatchSize
from tests.options import make_scheduler
from tests.scripted import Slope, ones

BUDGET, UNIT = 2000, 16


def run(advance, make):
    """(samples seen, lr in the param group, lr stepped with, batch size) of each step over the
    budget."""
    model = Slope()
    optimizer, loader = SGD(model.parameters(), lr=1.0), AdaptiveDataLoader(ones(300), 16)
    controller = Scheduled(ExponentialBS(None, 1.07, batch_size_manager=VirtualBatchSize(16)))
    scheduler = make_scheduler(optimizer, loader, None, controller, coupling="linear",
                               min_batch_size=8, max_batch_size=128)
    by_samples, rows = make(optimizer), []
    while scheduler.samples_seen < BUDGET:
        for (inputs,) in loader:
            seen, lr = scheduler.samples_seen, optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step(1.0)
            advance(by_samples, scheduler)
            rows.append((seen, lr, scheduler.get_last_lr()[0], len(inputs)))
            if scheduler.samples_seen >= BUDGET:
                break
    return rows


def test_a_torch_scheduler_on_a_sample_clock():
    rows = run(
        lambda clock, scheduler: clock.step(scheduler.samples_seen - clock.samples_seen),
        lambda optimizer: SampleClock(CosineAnnealingLR(optimizer, BUDGET // UNIT), UNIT),
    )
    alone = SGD(Slope().parameters(), lr=1.0)
    cosine, lrs = CosineAnnealingLR(alone, BUDGET // UNIT), []
    for _ in range(BUDGET // UNIT + 1):
        lrs.append(alone.param_groups[0]["lr"])
        alone.step()
        cosine.step()
    assert [lr for _, lr, _, _ in rows] == [lrs[seen // UNIT] for seen, _, _, _ in rows]
    assert len({size for _, _, _, size in rows}) > 8


def test_the_linear_budget():
    rows = run(lambda linear, scheduler: linear.step(scheduler.diagnostics.latest.batch_size),
               lambda optimizer: LinearLR(optimizer, budget_samples=BUDGET))
    assert [lr for _, lr, _, _ in rows] == pytest.approx([1 - seen / BUDGET
                                                          for seen, _, _, _ in rows])
    # linear coupling, the short last batches of the epochs included: lr / batch is that of the base
    # batch
    assert [used for _, _, used, _ in rows] == pytest.approx([lr * size / 16
                                                              for _, lr, _, size in rows])
