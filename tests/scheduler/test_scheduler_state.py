"""Saving and resuming: k steps, a checkpoint, fresh objects, k steps = 2k steps, bit for bit."""

import copy
import io
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from adabatch import CABS, AdaptiveDataLoader, GradSampleHooks
from tests.options import make_scheduler
from tests.scripted import Proposals, regression, slope_run, squared_error, steps

DATA = regression(700, width=5)


class Run:
    """A training run of a two-layer network with two param groups, an lr schedule and CABS;
    checkpoints as a user would write them."""

    def __init__(self, seed=0, controller=CABS, samples=None, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        groups = [{"params": list(self.model[0].parameters())},
                  {"params": list(self.model[2].parameters()), "lr": 0.2}]
        self.optimizer = SGD(groups, lr=0.5, momentum=0.5)
        self.schedule = OneCycleLR(self.optimizer, [2.0, 1.0], total_steps=100)
        self.loader = AdaptiveDataLoader(DATA, 16, shuffle=True, seed=seed)
        hooks = GradSampleHooks(self.model, samples=samples,
                                param_groups=[group["params"] for group in groups])
        options = {"min_batch_size": 4, "max_batch_size": 96, "on_limit": "lower_lr", **options}
        self.scheduler = make_scheduler(self.optimizer, self.loader, hooks, controller(), **options)

    def train(self, n_steps):
        done = 0
        while True:
            for inputs, targets in self.loader:
                self.optimizer.zero_grad()
                loss = squared_error(self.model(inputs), targets)
                loss.backward()
                self.optimizer.step()
                self.scheduler.step(loss)
                self.schedule.step()
                done += 1
                if done == n_steps:
                    return self

    @property
    def parts(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scheduler": self.scheduler,
            "sampler": self.loader.batch_sampler,
        }

    def save(self):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return self

    def records(self, since=0):
        """The history without its wall-clock times."""
        timed = ("seconds", "samples_per_second")
        return [{
            name: value for name, value in asdict(record).items() if name not in timed
        } for record in list(self.scheduler.diagnostics)[since:]]


OPTIONS = {
    "plain": {},
    "reference": {"controller": CABS.reference},
    "subset": {"samples": 6},
    "every": {"every": 3, "samples": 6},
    "measure": {"measure": 0.15},
    "small overhead": {"measure": 0.02},
    "cooldown": {"cooldown": 4, "hysteresis": 0.1},
    "multiples": {"multiple_of": 8, "short_batch": "keep", "on_limit": "keep"},
    "drop": {"short_batch": "drop"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("k", [1, 20])
def test_resumed_runs_are_the_same_bit_for_bit(options, k):
    whole = Run(**options).train(2 * k)
    half = Run(**options).train(k)
    resumed = Run(seed=1, **options).load(half.save()).train(k)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_equal(resumed.records(), whole.records(since=k))  # NaN equals NaN
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert resumed.loader.batch_size == whole.loader.batch_size
    np.testing.assert_equal(plain(resumed.scheduler.state_dict()),
                            plain(whole.scheduler.state_dict()))
    assert resumed.loader.batch_sampler.state_dict() == whole.loader.batch_sampler.state_dict()


def plain(state):
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if torch.is_tensor(state) else state


def test_the_runs_above_move_lower_the_lr_and_cross_epochs():
    run = Run().train(40)
    assert len(set(run.scheduler.diagnostics.column("batch_size"))) > 8
    assert max(run.scheduler.diagnostics.column("proposed_batch_size")) > 96
    assert run.loader.batch_sampler.epoch >= 2
    assert len(set(run.scheduler.diagnostics.column("lr"))) == 40


@every_option
def test_the_same_seed_gives_the_same_sizes(options):
    first, second = (Run(**options).train(25) for _ in range(2))
    np.testing.assert_equal(first.records(), second.records())
    sizes = [list(
        Run(seed=seed, **options).train(25).scheduler.diagnostics.column("batch_size")
    ) for seed in (0, 1)]
    assert sizes[0] == list(first.scheduler.diagnostics.column("batch_size"))
    assert sizes[0] != sizes[1]


@every_option
def test_the_state_is_small_and_does_not_grow(options):
    run = Run(**options).train(20)
    early = saved_bytes(run.scheduler)
    assert early < 12_000
    assert saved_bytes(run.train(40).scheduler) < early + 100


def saved_bytes(scheduler):
    """Without the layers' history, which has its own bound
    (tests/diagnostics/test_layers.py)."""
    file, state = io.BytesIO(), scheduler.state_dict()
    state["diagnostics"].pop("layers", None)
    torch.save(state, file)
    return file.tell()


def test_the_state_of_a_wrapped_run_with_default_options_is_small():
    model = nn.Linear(5, 1)
    hooks = GradSampleHooks(model, samples=16, capacity=2048)
    scheduler = make_scheduler(SGD(model.parameters(), lr=0.1), AdaptiveDataLoader(DATA, 16), hooks)
    assert saved_bytes(scheduler) < 10_000


def test_a_state_is_a_snapshot():
    run = Run(samples=6).train(5)
    state = run.scheduler.state_dict()
    before = repr(plain(state))
    run.train(10)
    assert repr(plain(state)) == before


@pytest.mark.parametrize("part", [None, "controller", "estimator", "diagnostics"])
def test_an_unknown_version_is_an_error(part):
    scheduler = Run().scheduler
    state = scheduler.state_dict()
    (state if part is None else state[part])["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        scheduler.load_state_dict(state)
    del state["version"]
    with pytest.raises(ValueError, match="BatchSizeScheduler has version None"):
        scheduler.load_state_dict(state)


def test_a_state_that_is_not_whole_is_an_error():
    scheduler = Run().scheduler
    state = scheduler.state_dict()
    del state["controller"], state["batch_size"]
    with pytest.raises(ValueError, match=r"lacks \['batch_size', 'controller'\]"):
        scheduler.load_state_dict(state)
    with pytest.raises(TypeError,
                       match=r"must be the dict that its state_dict.. returned, got list"):
        scheduler.load_state_dict([1])


def test_loading_sets_the_loaders_size_at_once():
    saved = slope_run(Proposals(40))
    list(steps(*saved, 2))
    resumed = slope_run(Proposals(40), batch_size=5)
    resumed[3].load_state_dict(saved[3].state_dict())
    assert (resumed[2].batch_size, resumed[3].get_last_batch_size()) == (40, 40)
    assert [rows for rows, _ in steps(*resumed, 2)] == [40, 40]
    assert list(resumed[3].diagnostics.column("samples_seen")) == [96, 136]
    assert list(resumed[3].diagnostics.column("step")) == [2, 3]
    assert math.isnan(resumed[3].diagnostics[0].seconds)


@pytest.mark.parametrize(("options", "size"), [
    ({"max_batch_size": 24}, 24), ({"min_batch_size": 50}, 50), ({"multiple_of": 16}, 32)
])
def test_a_state_from_other_bounds_keeps_to_the_present_ones(options, size):
    saved = slope_run(Proposals(40))
    list(steps(*saved, 2))
    resumed = slope_run(Proposals(40), **options)
    resumed[3].load_state_dict(saved[3].state_dict())
    assert resumed[2].batch_size == resumed[3].get_last_batch_size() == size


def test_a_lowered_lr_is_resumed():
    saved = slope_run(Proposals(128), on_limit="lower_lr")
    list(steps(*saved, 2))
    resumed = slope_run(Proposals(128), on_limit="lower_lr")
    resumed[3].load_state_dict(saved[3].state_dict())
    assert next(steps(*resumed, 1))[1] == pytest.approx(0.5)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda each: torch.save(each, io.BytesIO())])
def test_a_scheduler_itself_is_not_copied_but_its_state_is(how):
    run = Run()
    run.train(3)
    for attached in (run.scheduler, {"all": [run.model, run.scheduler]}):
        with pytest.raises(TypeError, match=r"save scheduler\.state_dict\(\)"):
            how(attached)
    for plain in (run.model, run.optimizer, run.schedule, run.scheduler.state_dict()):
        how(plain)
    run.train(1)
