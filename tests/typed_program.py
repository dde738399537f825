"""A user's program, for mypy --strict; it is not run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import adabatch
from adabatch import (
    CABS,
    AdaptiveDataLoader,
    BatchSizes,
    BatchSizeScheduler,
    Coupling,
    CrossRank,
    Diagnostics,
    Every,
    GradientMoments,
    GradSampleHooks,
    MicroBatch,
    MicroBatches,
    PerSample,
    ResizableBatchSampler,
    schedules,
)
from adabatch.controllers import (
    AdaScale,
    Annealed,
    AtLeast,
    AtMost,
    Average,
    Confident,
    Controller,
    Goodput,
    Monotone,
    NoiseScale,
    NormTest,
    Scheduled,
    Seesaw,
)
from adabatch.schedules import (
    ChainedBSScheduler,
    LinearLR,
    RampBS,
    SampleClock,
    SequentialBS,
    StepBS,
    VirtualBatchSize,
)
from adabatch.schedules.online import online_step


class Growing(Controller):
    needs_moments = False
    init_args, state_attrs = ("start",), ("steps",)

    def __init__(self, start: int = 16) -> None:
        self.start, self.steps = start, 0

    def on_step(self, *, samples: int, epoch: int) -> None:
        self.steps += 1

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return self.start + self.steps / 10


class Plain:
    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return 32.0


def my_rule(batch_size: int, base_batch_size: int, noise_scale: float) -> float:
    return math.sqrt(batch_size / base_batch_size)


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), 16, shuffle=True)


def train() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, loader, scheduler = adabatch.wrap(
        model, inner, data(), controller=CABS(f_star="auto"), batch_sizes=(16, 64),
        coupling=Coupling("sqrt", base_batch_size=16, on_limit="lower_lr", short_batch="keep"),
        measure=Every(2, samples=8), estimator=PerSample(per_parameter=True, ignore=["2"]),
        micro_batches=None, loss_reduction="mean", accumulate=1, grad_scaler=None,
        process_group=None, diagnostics=Diagnostics(smoothing=0.9, max_records=100))
    for inputs, targets in loader:
        with loader.retrying():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            torch.autograd.backward(loss)  # as loss.backward(), which torch left untyped
            optimizer.step()
            scheduler.step(loss)
    print(scheduler, loader, scheduler.get_last_lr()[0] + scheduler.last_lr_factor)
    size: int = loader.batch_size + scheduler.get_last_batch_size()
    noise: float = scheduler.diagnostics.latest.noise_scale_ema
    history: Diagnostics = scheduler.diagnostics
    column = history.column("batch_size")
    print(column.mean(), history[-1].loss, [record.step for record in history], size, noise)
    history.to_csv("run.csv")
    history.to_jsonl("run.jsonl")
    print(history.summary(), scheduler.measurement_plan.every)
    for layer in history.layers():
        print(layer.name, layer.share)
    with scheduler.paused():
        model(torch.randn(2, 4))
    parts = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    adabatch.save_checkpoint("c", model=model, optimizer=optimizer, loader=loader,
                             scheduler=scheduler)
    step: int | None = adabatch.load_checkpoint(
        "c", model=model, optimizer=optimizer, loader=loader, scheduler=scheduler)
    state = adabatch.state_dict(model=model, optimizer=optimizer)
    adabatch.load_state_dict(state, model=model, optimizer=optimizer)
    print(step, parts)
    scheduler.flush()
    scheduler.remove()


def more_options() -> None:
    model = nn.Linear(4, 3)
    for measure in ("auto", "all", 0.05, None):
        adabatch.wrap(model, torch.optim.Adam(model.parameters()), data(), measure=measure)
    adabatch.wrap(model, torch.optim.Adam(model.parameters()), data(), controller=Growing(),
                  coupling=my_rule, batch_sizes=BatchSizes(16, 64, multiple_of=8, size_ratio=1.5))
    adabatch.wrap(model, torch.optim.Adam(model.parameters()), data(), controller=Plain(),
                  coupling="linear", estimator=MicroBatch(), micro_batches=8)
    adabatch.wrap(model, torch.optim.Adam(model.parameters()), data(), estimator=CrossRank(),
                  micro_batches=MicroBatches("auto", loss_fn=mean_loss, max_grad_norm=1.0))
    report = adabatch.check(model, [torch.randn(8, 4), torch.randint(3, (8,))], loss_fn)
    print(report, report.refused)
    adabatch.wrap(model, torch.optim.SGD(model.parameters(), 0.1), data(),
                  estimator=PerSample(layout=report))
    watched = adabatch.monitor(model, torch.optim.SGD(model.parameters(), 0.1), accumulate=2)
    trace: float = watched.diagnostics.latest.variance_trace_ema
    with watched:
        print(trace, watched.latest, watched.measurement_plan)
    scaler = torch.amp.GradScaler("cpu")
    _, _, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), 0.1), data(), grad_scaler=scaler)
    scheduler.step(0.5, loss_scale=2.0)
    scheduler.step(torch.zeros(()), weights=[1.0, 2.0])


def rules() -> Iterator[Controller]:
    yield Annealed(1000, 16, cap=NoiseScale(scale=2.0))
    yield NormTest(theta=0.5, signal="raw")
    yield AtLeast(CABS(), 16)
    yield AtMost(CABS(), NoiseScale())
    yield Average(CABS(), NoiseScale(), weights=(1.0, 2.0))
    yield Confident(CABS(), level=0.9)
    yield Monotone(CABS())
    yield Goodput(16)
    yield AdaScale(128, 16)
    yield Scheduled("0:64 1M:256", unit="samples")
    yield Scheduled(lambda step: 16 + step)
    yield Scheduled(StepBS(None, 3, batch_size_manager=VirtualBatchSize(16)), unit="epoch")


def open_loop() -> None:
    loader = data()
    schedule = StepBS(loader, step_size=2, gamma=1.5, max_batch_size=64, min_batch_size=8)
    schedule.step()
    both = SequentialBS([schedule, StepBS(loader, 3)], [2])
    chained = ChainedBSScheduler([schedule, StepBS(loader, 3)])
    ramp = RampBS(loader, "0:64 1M:256")
    ramp.step(samples=64)
    plateau = schedules.IncreaseBSOnPlateau(loader, patience=1)
    plateau.step(metrics=torch.tensor(0.5))
    adaptive = AdaptiveDataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4, shuffle=True,
                                  seed=0, num_workers=0)
    adaptive.batch_size = 8
    StepBS(adaptive, 2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    linear = LinearLR(optimizer, budget_samples=1000)
    linear.step(16, next_samples=16)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    clock = SampleClock(cosine, samples_per_step=64)
    clock.step(64)
    print(both, chained, clock.samples_seen, len(adaptive), adaptive.position,
          adaptive.samples_left)
    sampler = ResizableBatchSampler(64, 8)
    for indices in DataLoader(TensorDataset(torch.randn(64, 2)), batch_sampler=sampler):
        print(indices)
    ds: Dataset[tuple[Tensor, ...]] = TensorDataset(torch.randn(8, 2))
    for batch in AdaptiveDataLoader(ds, batch_size=4):
        print(batch)
    lambda_bs = schedules.LambdaBS(loader, lambda epoch: 1 + epoch / 2)
    print(lambda_bs.batch_size + 1)
    model = nn.Linear(4, 3)
    for inputs, targets in loader:
        online_step(model, optimizer, mean_loss, [inputs, targets], candidates=(64, 32),
                    pick="smallest")


def hooks() -> None:
    model = nn.Linear(4, 3)
    measured = GradSampleHooks(model, statistics=["second_moment"])
    loss = nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.randint(3, (5,)))
    torch.autograd.backward(loss)
    moments = measured.collect()
    norms: Tensor = moments.sq_norms
    trace: float = moments.variance_trace
    print(norms.shape, trace, moments.noise_scale, moments.second_moment["weight"].shape)
    measured.remove()


def checked(make: Callable[[], BatchSizeScheduler]) -> Controller:
    print(make().samples_seen)
    return Seesaw(16)
