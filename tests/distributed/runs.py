"""Training runs that are the same on one process and on many."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from tests.options import grouped

SAMPLES = 61  # no multiple of 2, 3 or 4: the processes' parts differ


def make_model(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def make_data(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randn(samples, 2, generator=generator))


def make_loader(batch_size: int = 13, samples: int = SAMPLES, **options: Any) -> DataLoader:
    return DataLoader(make_data(samples), batch_size=batch_size, shuffle=True,
                      generator=torch.Generator().manual_seed(5), **options)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model as `how` says: plain, ddp, fsdp or hsdp, each with '-compiled'."""
    kind, *rest = how.split("-")
    world = dist.get_world_size()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind in ("fsdp", "hsdp"):
        shape = (world,) if kind == "fsdp" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in (model[0], model[3], model):
            fully_shard(part, mesh=mesh)
    return torch.compile(model, backend="aot_eager", dynamic=True) if rest else model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def alone_group() -> Any:
    """A group of this process alone."""
    return dist.new_subgroups(1)[0]


def train(
    how: str, steps: int = 50, *, accumulate: int = 1, loss_reduction: str = "mean",
    samples: int = SAMPLES, **options: Any,
) -> dict[str, Any]:
    """Train for `steps` steps; the history, and the weights at the end. 'alone' trains on one
    process, whatever others do."""
    alone = how == "alone"
    own = alone_group() if alone else options.pop("group", None)
    model = wrapped(make_model(), "plain" if alone else how)
    lr = options.pop("lr", 0.05 if loss_reduction == "mean" else 0.002)
    parameters, groups = list(model.parameters()), options.pop("groups", 1)
    groups = [{"params": parameters}] if groups == 1 else [
        {"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.5 * lr}]
    adam, waits = options.pop("adam", False), options.pop("waits", False)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.2 * lr) if adam else sgd
    controller = options.pop("controller", lambda: adabatch.CABS(scale=40.0))()
    settings = {"controller": controller, "min_batch_size": 7, "max_batch_size": 40} | options
    if "measured" in settings:
        settings["samples"] = settings.pop("measured")
    if settings.keys().isdisjoint({"samples", "every", "measure"}):
        settings["measure"] = "all"
    is_mean = loss_reduction == "mean"
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, make_loader(samples=samples), accumulate=accumulate,
        loss_reduction=loss_reduction, process_group=own, **grouped(**settings))
    if waits:
        scheduler._pipeline.stages[-1]._waits = True
    passes, losses = 0, []
    while scheduler.step_count < steps:
        for inputs, targets in loader:
            last = (passes + 1) % accumulate == 0
            with contextlib.nullcontext() if last or alone else no_sync(model, how):
                loss = mse_loss(model(inputs), targets, reduction=loss_reduction)
                (loss / (accumulate if is_mean else 1)).backward()
            losses.append(loss.detach())
            passes += 1
            if last:
                scheduler.step(sum(losses) / (accumulate if is_mean else 1))
                optimizer.step()
                optimizer.zero_grad()
                losses.clear()
                if waits:
                    assert len(scheduler.diagnostics) == scheduler.step_count - 1
                if waits and scheduler.step_count == 5:
                    scheduler.state_dict()
                    assert len(scheduler.diagnostics) == scheduler.step_count
            if scheduler.step_count >= steps:
                break
    scheduler.flush()
    weights = torch.cat([whole(parameter).flatten() for parameter in model.parameters()])
    scheduler.remove()
    return {"records": list(scheduler.diagnostics), "weights": weights, "scheduler": scheduler}


def column(run: dict[str, Any], name: str) -> list[Any]:
    return [getattr(record, name) for record in run["records"]]


@contextlib.contextmanager
def no_sync(model: nn.Module, how: str):
    if how.startswith("ddp"):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """The same decisions, and moments, losses and weights to the tolerance."""
    for name in ("batch_size", "next_batch_size"):
        here, there = column(found, name), column(expected, name)
        assert here == there, f"{name}: {here} against {there}"
    sizes, close = column(found, "batch_size"), {"rtol": tolerance, "atol": tolerance}
    assert len(set(sizes)) > 3, f"the sizes hardly changed, so that nothing was shown: {sizes}"
    for name in ("loss", "variance_trace", "grad_sq_norm", "true_grad_sq_norm",
                 "proposed_batch_size"):
        here, there = (torch.tensor(column(run, name)) for run in (found, expected))
        message = f"{name}: {here.tolist()} against {there.tolist()}"
        torch.testing.assert_close(here, there, **close, equal_nan=True, msg=message)
    torch.testing.assert_close(found["weights"], expected["weights"], **close)
