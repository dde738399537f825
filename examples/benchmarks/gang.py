"""Data-parallel training steps on gloo processes of this machine: plain, measured by each process
for itself, and measured over all processes.

Legend: W processes, m samples of a step on each of them, so that a global batch has W·m.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import WORKLOADS, Batch, Gpt, Workload, token_losses
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import adabatch
from adabatch.distributed.group import HostGroup

LR = 0.01
TIMEOUT = timedelta(seconds=120)
WARM_UP = 2


def _small_batch() -> Batch:
    return torch.randint(64, (8, 16)), torch.randint(64, (8, 16))


SMALL = Workload(
    *("small", "GPT 1 layer, d=32, T=16, m=8"),
    *(lambda: Gpt(1, 32, 2, 16, 64), _small_batch, token_losses),
)
MODELS = {**WORKLOADS, SMALL.name: SMALL}


@dataclass(frozen=True)
class Plan:
    """What the processes are to do.

    Args:
        model: a key of MODELS.
        rounds: timed steps of each method.
        settled: rounds in which scheduler.step is timed alone.
        lengths: of the vectors that are summed alone, in doubles.
        blocks, calls: `blocks` times, `calls` all-reduces of each length in a row.
        threads: torch's, of each process.
    """

    model: str
    rounds: int
    settled: int
    lengths: tuple[int, ...]
    blocks: int
    calls: int
    threads: int


class Repeated(Dataset):
    """The samples of one batch over and over: an epoch of any length without its memory."""

    def __init__(self, batch: Batch, length: int):
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index % len(tensor)] for tensor in self.batch)


class Plain:
    """DistributedDataParallel with no measurement, on the same loader."""

    title = "DDP"
    scheduler: Any = None

    def __init__(self, work: Workload, steps: int):
        model, batch = work.setting()
        self.work, self.samples, world = work, len(batch[0]), dist.get_world_size()
        self.model = DistributedDataParallel(model)
        self.optimizer: Any = torch.optim.SGD(model.parameters(), LR)
        self.data = Repeated(batch, world * self.samples * steps)
        self.loader = self.make_loader(world)
        self.wrap()
        self.batches = iter(self.loader)

    def make_loader(self, world: int) -> adabatch.AdaptiveDataLoader:
        """Batches of m samples on this process."""
        own = {"rank": dist.get_rank(), "world_size": world}
        size = self.samples * world
        return adabatch.AdaptiveDataLoader(self.data, size, shuffle=True, **own)

    def wrap(self) -> None:
        """Set up the measurement."""

    def train(self) -> Tensor:
        """One optimizer step; its loss."""
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.work.losses(self.model(inputs), targets).mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def tell(self, loss: Tensor) -> None:
        """What comes after the optimizer's step."""
        if self.scheduler is not None:
            self.scheduler.step(loss)


class Whole(Plain):
    """adabatch over all processes. All samples are measured at every step, which is the dearest;
    the size is held, so that all steps are alike."""

    title = "adabatch, all processes"

    def wrap(self) -> None:
        size = self.loader.batch_size
        self.optimizer, self.loader, self.scheduler = adabatch.wrap(
            self.model, self.optimizer, self.loader, controller=adabatch.CABS(),
            batch_sizes=(size, size), measure="all", process_group=self.group(),
        )

    def group(self) -> Any:
        """The processes that share a batch."""
        return None


class Local(Whole):
    """The same measurement with each process for itself: no sum over processes. What Whole takes
    above it is the distributed part."""

    title = "adabatch, each for itself"

    def make_loader(self, world: int) -> adabatch.AdaptiveDataLoader:
        return adabatch.AdaptiveDataLoader(self.data, self.samples, shuffle=True)

    def group(self) -> Any:
        return dist.new_group([dist.get_rank()], use_local_synchronization=True)


METHODS: tuple[Callable[..., Plain], ...] = (Plain, Local, Whole)


def _slowest(seconds: list[float]) -> list[float]:
    """Of each measurement the time of the process that took longest."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seconds)
    return [max(times) for times in zip(*gathered, strict=True)]


def _rotated(methods: list[Plain], by: int) -> list[Plain]:
    by %= len(methods)
    return methods[by:] + methods[:by]


def step_seconds(methods: list[Plain], rounds: int) -> dict[str, list[float]]:
    """{method: seconds of its steps}, all methods once a round, each after a barrier."""
    seconds: dict[str, list[float]] = {type(method).__name__: [] for method in methods}
    for at in range(rounds):
        for method in _rotated(methods, at):
            dist.barrier()
            begin = time.perf_counter()
            method.tell(method.train())
            seconds[type(method).__name__].append(time.perf_counter() - begin)
    return {name: _slowest(times) for name, times in seconds.items()}


def settled_seconds(methods: list[Plain], rounds: int) -> dict[str, list[float]]:
    """{method: seconds of scheduler.step alone}, begun together by all processes: no wait for one
    that is still computing its gradients."""
    seconds: dict[str, list[float]] = {type(method).__name__: [] for method in methods}
    for at in range(rounds):
        for method in _rotated(methods, at):
            loss = method.train()
            dist.barrier()
            begin = time.perf_counter()
            method.tell(loss)
            seconds[type(method).__name__].append(time.perf_counter() - begin)
    return {name: _slowest(times) for name, times in seconds.items()}


def all_reduce_seconds(lengths: tuple[int, ...], blocks: int, calls: int) -> dict[int, list[float]]:
    """{length in doubles: seconds of one all-reduce, a mean for each block}, lengths interleaved.
    """
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    vectors = {length: torch.zeros(length, dtype=torch.float64) for length in lengths}
    for _ in range(blocks):
        for length, vector in vectors.items():
            dist.all_reduce(vector)
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(calls):
                dist.all_reduce(vector)
            seconds[length].append((time.perf_counter() - begin) / calls)
    return {length: _slowest(times) for length, times in seconds.items()}


def warm_up(methods: list[Plain]) -> int:
    """Some steps of each; the doubles that all processes add up in one of Whole's, 0 where there is
    one process."""
    sent: list[int] = []
    original = HostGroup.start_sum

    def start_sum(ranks: HostGroup, values: list[float]) -> Any:
        sent.append(len(values))
        return original(ranks, values)

    with mock.patch.object(HostGroup, "start_sum", start_sum):
        for _ in range(WARM_UP):
            for method in methods:
                method.tell(method.train())
    return sent[-1] if sent else 0


def _work(rank: int, world: int, folder: str, plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    own = {"rank": rank, "world_size": world, "timeout": TIMEOUT}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", **own)
    work = MODELS[plan.model]
    methods = [method(work, WARM_UP + plan.rounds + plan.settled + 1) for method in METHODS]
    length = warm_up(methods)
    steps = step_seconds(methods, plan.rounds)
    scheduled = [method for method in methods if method.scheduler is not None]
    settled = settled_seconds(scheduled, plan.settled)
    reduced = all_reduce_seconds(plan.lengths, plan.blocks, plan.calls) if world > 1 else {}
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in methods[0].model.parameters())
        result = {"world": world, "parameters": parameters, "length": length, "steps": steps}
        result |= {"settled": settled, "all_reduce": reduced, "plan": asdict(plan)}
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, plan: Plan) -> dict:
    """All measurements with `world` processes: seconds of the steps, of scheduler.step alone, and
    of the all-reduce alone.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (world, folder, plan), nprocs=world)
        return json.loads(Path(folder, "result.json").read_text())
