"""Layers split over processes (ColwiseParallel, RowwiseParallel, SequenceParallel), alone and
beside fully_shard: the same as one process, or an error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from tests.distributed.bad_setups import raises_alike
from tests.distributed.runs import alone_group, assert_same, whole
from tests.options import grouped

PLAIN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
# Sequence parallelism: the first norm sees this process's positions, every process its weights.
SEQUENCE = {
    "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
COLUMNS = {"table": ColwiseParallel(output_layouts=Replicate()), **PLAIN}


class Net(nn.Module):
    """Ids [N, T] to two numbers; `heads`: with a norm on the hidden units that a process has."""

    def __init__(self, heads: bool = False):
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.LayerNorm(2) if heads else None
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(self.table(ids))).tanh()
        if self.heads is not None:
            x = self.heads(x.unflatten(-1, (-1, 2))).flatten(-2)
        return self.head(self.last(self.down(x)).mean(1))


def make(heads: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net(heads)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(12, (1999, 4), generator=generator)
    pairs, order = TensorDataset(ids, torch.randn(1999, 2, generator=generator)), torch.Generator()
    return DataLoader(pairs, batch_size=13, shuffle=True, generator=order.manual_seed(5))


def split(model: nn.Module, plan: dict[str, Any], how: str) -> tuple[nn.Module, Any]:
    """The model as `how` says, tp or fsdp (beside tensor parallelism, on a mesh of 2 by 2), and the
    processes that share each batch."""
    world = dist.get_world_size()
    if how == "tp":
        return parallelize_module(model, init_device_mesh("cpu", (world,)), plan), None
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], plan)
    if how == "fsdp":
        for part in (model.up, model.down, model):
            fully_shard(part, mesh=mesh["dp"])
    return model, mesh["dp"]


def train(
    plan: dict[str, Any] | None, how: str = "tp", steps: int = 15, accumulate: int = 1,
    heads: bool = False, **options: Any,
) -> dict[str, Any]:
    net, group = (make(heads), alone_group()) if plan is None else split(make(heads), plan, how)
    # Momenta of several meshes cannot be stepped together.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5, foreach=False)
    controller = options.pop("controller", lambda: adabatch.CABS(scale=8.0))()
    settings = {"controller": controller, "min_batch_size": 7, "max_batch_size": 60}
    settings |= {} if "samples" in options else {"measure": "all"}
    optimizer, loader, scheduler = adabatch.wrap(
        net, optimizer, data(), process_group=group, accumulate=accumulate,
        **grouped(**settings | options))
    losses: list[torch.Tensor] = []
    for ids, targets in loader:
        loss = mse_loss(net(ids), targets)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if len(losses) == accumulate:
            scheduler.step(sum(losses) / accumulate)
            optimizer.step()
            optimizer.zero_grad()
            losses.clear()
        if scheduler.step_count == steps:
            break
    scheduler.flush()
    weights = torch.cat([whole(parameter).flatten() for parameter in net.parameters()])
    layers = scheduler.diagnostics.layers() if options.get("per_parameter") else []
    scheduler.remove()
    return {"records": list(scheduler.diagnostics), "weights": weights, "layers": layers}


def same_when_layers_are_split(folder: Path) -> None:
    expected = train(None)
    for plan in (PLAIN, SEQUENCE, COLUMNS):
        assert_same(train(plan), expected)
    assert_same(train(SEQUENCE, samples=6), train(None, samples=6))
    measured = [record.measured for record in train(PLAIN, measure=0.05)["records"]]
    assert 5 <= sum(measured) < len(measured)


def same_when_layers_are_split_per_parameter(folder: Path) -> None:
    """With accumulation."""
    options = {"accumulate": 2, "per_parameter": True, "max_batch_size": 200,
               "controller": lambda: adabatch.CABS(scale=20.0)}
    found, expected = train(SEQUENCE, **options), train(None, **options)
    assert_same(found, expected)
    for here, there in zip(found["layers"], expected["layers"], strict=True):
        assert here.name == there.name
        assert here.variance_trace == pytest.approx(there.variance_trace, rel=1e-4)
        assert here.true_grad_sq_norm == pytest.approx(there.true_grad_sq_norm, rel=1e-4, abs=1e-6)


def same_when_layers_are_split_beside_fully_shard(folder: Path) -> None:
    """On a mesh of 2 by 2, with shares of 6 and 7 samples."""
    expected = train(None)
    for plan in (PLAIN, SEQUENCE):
        assert_same(train(plan, "fsdp"), expected)


def split_layers_with_nothing_measured(folder: Path) -> None:
    options = {"controller": lambda: adabatch.controllers.Scheduled("0:13"), "measure": "all",
               "steps": 8}
    found, expected = train(PLAIN, **options), train(None, **options)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


def split_layers_that_are_refused(folder: Path) -> None:
    raises_alike(ValueError, "without inner_products", lambda: train(PLAIN, inner_products=True))
    raises_alike(ValueError, "up.weight.*PerSample", lambda: train(PLAIN, estimator="cross_rank"))
    raises_alike(RuntimeError, "part of the samples' activations",
                 lambda: train(PLAIN, heads=True))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hooked = parallelize_module(make(), mesh, PLAIN)
    hooks = adabatch.GradSampleHooks(hooked)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    raises_alike(RuntimeError, "up is sharded.*group=", lambda: hooked(ids))
    hooks.remove()
    scaled = make()
    weight = distribute_tensor(scaled.last.weight.detach(), mesh, [Shard(0)])
    scaled.last.weight = nn.Parameter(weight)
    raises_alike(ValueError, r"last \(LayerNorm\): only Linear and Embedding",
                 lambda: wrap(scaled, measure="all"))
    given = {"process_group": mesh, "batch_sizes": (7, 2048)}
    raises_alike(ValueError, r'up.weight.*group=mesh\["dp"\]', lambda: wrap(hooked, **given))


def wrap(model: nn.Module, **options: Any) -> None:
    adabatch.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), data(), **options)


def split_layers_without_a_data_parallel_group(folder: Path) -> None:
    for how in ("fsdp", "neither"):
        for controller in (adabatch.CABS(), adabatch.controllers.Scheduled("0:13")):
            call = partial(wrap, split(make(), SEQUENCE, how)[0], controller=controller)
            raises_alike(ValueError, r'up.weight.*group=mesh\["dp"\]', call)
    raises_alike(RuntimeError, "nothing averages", lambda: train(PLAIN, "neither"))
