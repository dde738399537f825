"""Checkpoints of runs that are a part of the world; checks for tests/distributed/processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import adabatch
from tests.distributed.runs import make_loader, make_model, whole


def make_parts(group: Any, mesh: DeviceMesh | None = None, seed: int = 3) -> dict[str, Any]:
    model = make_model(seed)
    if mesh is not None:
        model = fully_shard(model, mesh=mesh)
    elif group is not None:
        model = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, make_loader(), controller=adabatch.CABS(scale=40.0),
        batch_sizes=(7, 40), measure="all", process_group=group if mesh is None else mesh)
    return {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}


def run(parts: dict[str, Any]) -> Iterator[None]:
    model, optimizer, loader, scheduler = parts.values()
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            yield


def assert_resumes(folder: Path, group: Any, mesh: DeviceMesh | None = None) -> None:
    """3 steps, a checkpoint and 5 steps are 3 steps, and 5 steps of another run that loads it."""
    first = make_parts(group, mesh)
    training = run(first)
    list(islice(training, 3))
    path = adabatch.save_checkpoint(folder, **first)
    assert path.name == "step-000000003"
    list(islice(training, 5))
    resumed = make_parts(group, mesh, seed=8)
    assert adabatch.load_checkpoint(folder, **resumed) == 3
    list(islice(run(resumed), 5))
    pairs = zip(first["model"].parameters(), resumed["model"].parameters(), strict=True)
    assert all(torch.equal(whole(one), whole(other)) for one, other in pairs)
    assert first["loader"].position == resumed["loader"].position
    for parts in (first, resumed):
        parts["scheduler"].remove()


def checkpoints_of_some_processes(folder: Path) -> None:
    """The third process does nothing meanwhile."""
    for ranks in ([1, 2], [0, 2]):
        pair = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            assert_resumes(folder / f"ddp-{ranks}", pair)
        mesh = DeviceMesh("cpu", ranks)
        if dist.get_rank() in ranks:
            assert_resumes(folder / f"fsdp-{ranks}", None, mesh)


def checkpoints_of_a_mesh_without_a_group(folder: Path) -> None:
    """Refused on a mesh of two dimensions, until the scheduler gets a group of its processes."""
    pair = dist.new_group([1, 2])
    mesh = DeviceMesh("cpu", [[1, 2]], mesh_dim_names=("replicate", "shard"))
    if dist.get_rank() > 0:
        parts = make_parts(None, mesh)
        with pytest.raises(RuntimeError, match=r"\[1, 2\] alone.*scheduler.process_group = group"):
            adabatch.save_checkpoint(folder / "mesh", **parts)
        parts["scheduler"].process_group = pair
        assert adabatch.save_checkpoint(folder / "mesh", **parts).exists()
        parts["scheduler"].remove()


def checkpoints_of_a_process_alone(folder: Path) -> None:
    """A group of one in a world of three; each writes to a folder of its own, at its own pace."""
    own = dist.new_subgroups(1)[0]
    if dist.get_rank() != 1:
        assert_resumes(folder / f"alone-{dist.get_rank()}", own)
