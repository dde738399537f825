"""Every coupling over a run: resumed bit for bit from a small state, and unseen by lr
schedulers."""

import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR

from adabatch import CABS, AdaptiveDataLoader, GradSampleHooks, schedules
from adabatch.controllers import Scheduled
from adabatch.scheduler.coupling import AdaScaleGain
from tests.options import make_scheduler
from tests.scripted import regression, squared_error

DATA = regression(500, width=4)


def growing():
    return Scheduled(schedules.ExponentialBS(None, 1.15,
                                             batch_size_manager=schedules.VirtualBatchSize(8)))


LR_SCHEDULES = {
    "StepLR": lambda optimizer: StepLR(optimizer, 5, 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 40),
    "LinearLR": lambda optimizer: LinearLR(optimizer, 0.2, total_iters=12),
    "Sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.2, total_iters=5), StepLR(optimizer, 4)], [5]
    ),
    "schedules.LinearLR": lambda optimizer: schedules.LinearLR(optimizer, 60),
}
OPTIONS = {
    "none": {},
    "linear": {"coupling": "linear"},
    "sqrt": {"coupling": "sqrt", "adam": True},
    "adascale": {"coupling": "adascale"},
    "adascale of one's own": {"coupling": AdaScaleGain(0.5), "base_batch_size": 5},
    "seesaw by SGD": {"coupling": "seesaw", "controller": None},
    "seesaw by AdamW": {"coupling": "seesaw", "controller": None, "adam": True},
    "on_limit": {"on_limit": "lower_lr", "cooldown": 3, "controller": lambda: CABS(scale=1000.0)},
    "betas": {"coupling": "sqrt", "adam": True, "scale_betas": True},
    "all": {"coupling": "adascale", "adam": True, "scale_betas": True, "on_limit": "lower_lr",
            "max_batch_size": 40, "tensor": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Run:
    """A two-layer network with two param groups, an lr schedule, and a batch size that grows."""

    def __init__(self, seed=0, controller=growing, adam=False, tensor=False,
                 lr_schedule="Sequential", **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        lrs = [torch.tensor(value) for value in (0.03, 0.01)] if tensor else [0.03, 0.01]
        groups = [{"params": list(layer.parameters()), "lr": lr}
                  for layer, lr in zip((self.model[0], self.model[2]), lrs, strict=True)]
        self.optimizer = AdamW(groups) if adam else SGD(groups, lr=0.1, momentum=0.5)
        self.schedule = LR_SCHEDULES[lr_schedule](self.optimizer)
        self.loader = AdaptiveDataLoader(DATA, 8, shuffle=True, seed=seed)
        options = {"min_batch_size": 4, "max_batch_size": 96, **options}
        hooks = GradSampleHooks(self.model, param_groups=[group["params"] for group in groups])
        self.scheduler = make_scheduler(self.optimizer, self.loader, hooks,
                                        controller and controller(), **options)
        self.used: list[float] = []

    def train(self, n_steps):
        done = 0
        while True:
            for inputs, targets in self.loader:
                self.optimizer.zero_grad()
                loss = squared_error(self.model(inputs), targets)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.scheduler.step(loss)
                self.used.append(self.scheduler.get_last_lr()[0])
                done += 1
                if done == n_steps:
                    return self

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule,
                "scheduler": self.scheduler, "sampler": self.loader.batch_sampler}


@every_option
@pytest.mark.parametrize("k", [1, 17])
def test_k_reload_k_is_2k_bit_for_bit(options, k):
    whole, half = Run(**options).train(2 * k), Run(**options).train(k)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in half.parts.items()}, file)
    file.seek(0)
    resumed, state = Run(seed=1, **options), torch.load(file, weights_only=True)
    for name, part in resumed.parts.items():
        part.load_state_dict(state[name])
    resumed.train(k)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.used == whole.used[k:]
    sizes = [list(run.scheduler.diagnostics.column("batch_size")) for run in (resumed, whole)]
    assert sizes[0] == sizes[1][k:]
    assert len(set(sizes[1])) > 3 or k == 1


@every_option
def test_the_state_is_small(options):
    run = Run(**options).train(17)
    file = io.BytesIO()
    state = run.scheduler.state_dict()
    del state["diagnostics"], state["estimator"]  # the same for any coupling
    torch.save(state, file)
    assert file.tell() < 10_000
    run.scheduler.load_state_dict(run.scheduler.state_dict())
    with pytest.raises(ValueError, match="BatchSizeScheduler has version 7"):
        run.scheduler.load_state_dict(run.scheduler.state_dict() | {"version": 7})


@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
@every_option
def test_lr_schedulers_do_not_see_the_factors(options, lr_schedule):
    run = Run(lr_schedule=lr_schedule, **options)
    kind = AdamW if options.get("adam") else SGD
    alone = kind([{"params": [nn.Parameter(torch.zeros(1))],
                   "lr": torch.tensor(lr) if options.get("tensor") else lr} for lr in (0.03, 0.01)])
    reference, expected, seen, betas = LR_SCHEDULES[lr_schedule](alone), [], [], set()
    for _ in range(12):
        expected.append([float(group["lr"]) for group in alone.param_groups])
        seen.append([float(group["lr"]) for group in run.optimizer.param_groups])
        betas |= {group.get("betas") for group in run.optimizer.param_groups}
        alone.step()
        reference.step()
        run.train(1)
    assert seen == expected
    assert len(betas) == 1
    if options and not (
        options.get("coupling") == "seesaw" and lr_schedule == "LinearLR"
    ):  # a warm-up cuts nothing
        assert run.used != [lr for lr, _ in expected]
