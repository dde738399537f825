"""Nothing on the step path waits for an accelerator: its numbers are read one step later. Played
on the CPU, and, where there is a GPU, under its watch."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import adabatch
from adabatch import CABS, AdaptiveDataLoader, GradSampleHooks
from adabatch import _transfers as host_copies
from adabatch.scheduler.record import HostTransferStage
from tests.options import grouped, make_scheduler
from tests.scripted import Proposals, regression, squared_error

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
         "aten::item")


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    allowed = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not NoReads.allowed and function.name().split(".")[0] in READS:
            raise AssertionError(f"{function.name()} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def lag(monkeypatch):
    """The CPU counts as an accelerator."""
    monkeypatch.setattr(host_copies, "LAGS_ON_CPU", True)


@pytest.fixture
def watched(lag, monkeypatch):
    """Reading is allowed where the pipeline reads its copies, and nowhere else."""
    finish = HostTransferStage.finish

    def reading(self, observation):
        NoReads.allowed = True
        finish(self, observation)
        # What follows is the host's: its tensors are copies.

    monkeypatch.setattr(HostTransferStage, "finish", reading)


class Run:
    """A small network with a repeated layer, trained by the loop of the README."""

    def __init__(self, controller=None, device="cpu", model=None, grad_scaler=None,
                 loss_of=squared_error, **options):
        torch.manual_seed(0)
        own = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8),
                            nn.Linear(8, 1)) if model is None else model
        self.model, self.device = own.to(device), device
        self.scaler, self.loss_of = grad_scaler, loss_of
        loader = DataLoader(regression(400), batch_size=16)
        every_step = {} if "samples" in options else {"measure": "all"}
        options = {"batch_sizes": (4, 64), **every_step, "grad_scaler": grad_scaler, **options}
        parts = adabatch.wrap(self.model, SGD(self.model.parameters(), lr=1e-3), loader,
                              controller=controller or Proposals(20, 24, 12, 16),
                              **grouped(**options))
        self.optimizer, self.loader, self.scheduler = parts
        self.batches = iter(self.loader)

    def step(self, batch=None):
        inputs, targets = batch or (tensor.to(self.device) for tensor in next(self.batches))
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model(inputs), targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.optimizer.step()
        self.scheduler.step(loss)
        return len(inputs)

    def train(self, n_steps):
        return [self.step() for _ in range(n_steps)]

    @property
    def history(self):
        return self.scheduler.diagnostics


OPTIONS = {
    "all": {},
    "subset": {"samples": 3},
    "budget": {"measure": 0.2},
    "inner_products": {"inner_products": True},
    "micro-batches": {"max_micro_batch_size": 6},
    "micro-batch estimator": {"estimator": "micro_batch"},
    "per parameter": {"per_parameter": True},
    "summed": {"loss_reduction": "sum", "loss_of": lambda outputs,
               targets: (outputs - targets).square().sum() / 2},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def plain(options):
    return dict(options)


@each_option
def test_no_step_after_the_first_reads_the_device(options, watched):
    run = Run(**plain(options))
    run.train(1)
    for _ in range(6):
        batch = next(run.batches)
        NoReads.allowed = False
        with NoReads():
            run.step(batch)
    assert len(run.history) >= 1


@each_option
def test_the_numbers_are_the_same_one_step_later(options, monkeypatch):
    """With one size throughout, so that the batches are the same."""
    fixed = {**plain(options), "controller": Proposals(16)}
    expected = Run(**fixed)
    expected.train(9)
    monkeypatch.setattr(host_copies, "LAGS_ON_CPU", True)
    late = Run(**{**fixed, "controller": Proposals(16)})
    for n_steps in range(9):
        late.step()
        assert len(late.history) <= n_steps
    late.scheduler.flush()
    assert len(late.history) == len(expected.history)
    for name in ("step", "batch_size", "samples_seen", "measured", "loss", "lr", "next_batch_size"):
        assert list(late.history.column(name)) == pytest.approx(list(expected.history.column(name)),
                                                                rel=1e-6), name
    for name in ("variance_trace", "grad_sq_norm"):
        assert list(late.history.column(name)) == pytest.approx(list(expected.history.column(name)),
                                                                rel=1e-5, nan_ok=True), name
    passed = [[entry["lr"] for entry in run.scheduler.controller.passed]
              for run in (late, expected)]
    assert passed[0] == passed[1]


def test_sizes_follow_the_proposals_one_step_later(lag):
    assert Run().train(6) == [16, 16, 20, 24, 12, 16]


def test_a_saved_state_has_settled_what_was_under_way(lag):
    run = Run(controller=CABS())
    run.train(5)
    assert len(run.history) == 4
    state = run.scheduler.state_dict()
    assert len(run.history) == 5
    assert state["step_count"] == 5
    again = Run(controller=CABS())
    again.scheduler.load_state_dict(state)
    assert again.scheduler.get_last_batch_size() == run.scheduler.get_last_batch_size()
    assert again.scheduler.step_count == 5


def test_what_is_under_way_when_a_state_is_loaded_is_forgotten(lag):
    run = Run()
    state = run.scheduler.state_dict()
    run.train(2)
    run.scheduler.load_state_dict(state)
    run.scheduler.flush()
    assert len(run.history) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_dropped_one_step_later(bad, lag):
    run = Run()
    run.train(2)
    run.loss_of = lambda outputs, targets: squared_error(outputs, targets) * bad
    run.optimizer.param_groups[0]["lr"] = 0.0
    weights = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.step()
    with torch.no_grad():
        for parameter, weight in zip(run.model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    run.loss_of = squared_error
    assert run.history.n_dropped == 0
    run.step()
    assert run.history.latest.dropped == "non-finite loss"
    assert run.history.latest.step == 2
    run.step()
    assert not run.history.latest.dropped


def test_a_grad_scalers_scale_is_read_while_it_holds(lag):
    """It doubles at every update: read one step later, the trace would be off by four."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    late, expected = Run(controller=Proposals(16), grad_scaler=scaler), None
    for _ in range(4):
        inputs, targets = next(late.batches)
        late.optimizer.zero_grad()
        loss = squared_error(late.model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(late.optimizer)
        scaler.update()
        late.scheduler.step(loss)
    late.scheduler.flush()
    host_copies.LAGS_ON_CPU = False
    expected = Run(controller=Proposals(16))
    expected.train(4)
    assert list(late.history.column("variance_trace")) == pytest.approx(
        list(expected.history.column("variance_trace")), rel=1e-5
    )


def test_checks_of_a_pass_raise_one_step_later(lag):
    class Sometimes(nn.Module):
        """Uses a second layer from the third step on, without calling it."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.steps = nn.Linear(3, 1), nn.Linear(3, 1), 0

        def forward(self, inputs):
            self.steps += 1
            output = self.first(inputs)
            return output if self.steps < 3 else output + nn.functional.linear(inputs,
                                                                               self.second.weight)

    run = Run(model=Sometimes(), controller=Proposals(16))
    run.scheduler.estimator.check_loss = lambda loss: None  # which would find it at once
    run.train(3)
    with pytest.raises(RuntimeError,
                       match=r"these parameters have a gradient that no tap saw: second.weight"):
        run.step()


def test_several_forward_passes_before_a_backward_pass_wait(lag):
    """The passes' sizes are then read from the reports."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    hooks = GradSampleHooks(model, accumulate=2)
    batches = [regression(6).tensors, regression(4, seed=1).tensors]
    traces = []
    for _ in range(2):
        model.zero_grad()
        losses = [squared_error(model(inputs), targets) / 2 for inputs, targets in batches]
        for loss in losses:
            loss.backward()
        traces.append(hooks.collect().variance_trace)
    assert traces[0] == pytest.approx(traces[1], rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_option
def test_no_synchronisation_on_a_gpu(options):
    run = Run(device="cuda", **plain(options))
    run.train(3)
    before = torch.cuda.get_sync_debug_mode()
    for _ in range(5):
        inputs, targets = next(run.batches)
        inputs, targets = inputs.cuda(), targets.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.optimizer.zero_grad()
            loss = run.loss_of(run.model(inputs), targets)
            loss.backward()
            run.optimizer.step()
            run.scheduler.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    run.scheduler.flush()
    assert math.isfinite(run.history.latest.loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_cpus_numbers():
    runs = [Run(device=device, controller=Proposals(16)) for device in ("cpu", "cuda")]
    for run in runs:
        run.train(6)
        run.scheduler.flush()
    traces = [list(run.history.column("variance_trace")) for run in runs]
    assert traces[1] == pytest.approx(traces[0], rel=1e-3)


def test_the_cpu_has_no_lag():
    run = Run()
    run.train(3)
    assert len(run.history) == 3
    assert run.train(1) == [12]


def test_a_bare_scheduler_lags_too(lag):
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = AdaptiveDataLoader(regression(64), 8)
    scheduler = make_scheduler(optimizer, loader, GradSampleHooks(model), Proposals(16),
                               min_batch_size=4)
    for number, (inputs, targets) in enumerate(loader):
        optimizer.zero_grad()
        loss = squared_error(model(inputs), targets)
        loss.backward()
        scheduler.step(loss)
        optimizer.step()
        assert len(scheduler.diagnostics) == number
