"""Set-ups and runs that must end in the same error on every process, without a hang; checks for
tests/distributed/processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler

import adabatch
from tests.distributed.runs import assert_same, make_data, make_loader, make_model, train, wrapped
from tests.options import grouped


def wrap(
    model: nn.Module | None = None, loader: Any = None, lr: float = 0.1, **options: Any
) -> Any:
    model = wrapped(make_model(), "ddp") if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = {"min_batch_size": 7, "max_batch_size": 40, "measure": "all"} | options
    loader = make_loader() if loader is None else loader
    return model, *adabatch.wrap(model, optimizer, loader, **grouped(**settings))


def own(values: list[Any]) -> Any:
    """The last process's value differs."""
    return values[dist.get_rank() == dist.get_world_size() - 1]


def raises_alike(error: type[Exception], match: str, function: Any) -> None:
    """On every process the same text."""
    with pytest.raises(error, match=match) as caught:
        function()
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1, texts


def different_set_ups(folder: Path) -> None:
    last = dist.get_world_size() - 1
    models = [make_model, lambda: nn.Sequential(*make_model()[:3], nn.Linear(8, 3))]
    raises_alike(
        ValueError,
        rf"parameters: 3.weight \(2, 8\) float32 on rank.*\(3, 8\) float32 on rank {last}",
        lambda: wrap(own(models)()))
    raises_alike(ValueError, rf"maximum: 40 on rank.*; 64 on rank {last}",
                 lambda: wrap(max_batch_size=own([40, 64])))
    raises_alike(ValueError, f"samples of an epoch: 61 on rank.*; 59 on rank {last}",
                 lambda: wrap(loader=make_loader(samples=own([61, 59]))))
    raises_alike(ValueError, f"lr=0.1.*lr=0.2.*on rank {last}", lambda: wrap(lr=own([0.1, 0.2])))
    controllers = [adabatch.CABS, lambda: adabatch.CABS(scale=2.0)]
    raises_alike(ValueError, "controller: ", lambda: wrap(controller=own(controllers)()))
    inner = [adabatch.CABS, lambda: adabatch.CABS(scale=2.0)]
    raises_alike(ValueError, r"controller: .*scale=2\.0", lambda: wrap(
        controller=adabatch.controllers.Confident(own(inner)(), level=0.9)))
    raises_alike(ValueError, "multiple_of: 1 on rank", lambda: wrap(multiple_of=own([1, 2])))


def loaders_of_other_processes(folder: Path) -> None:
    data = make_data()
    alone = adabatch.AdaptiveDataLoader(data, batch_size=13)
    with pytest.raises(ValueError, match="rank="):
        wrap(loader=alone)
    right = adabatch.AdaptiveDataLoader(
        data, batch_size=13, rank=dist.get_rank(), world_size=dist.get_world_size())
    wrap(loader=right)[3].remove()
    with pytest.raises(ValueError, match="CrossRank"):
        wrap(estimator="micro_batch")


def takes_over_a_distributed_sampler(folder: Path) -> None:
    """Its seed, and world_size times its batch size; each sample once an epoch over all."""
    data = torch.utils.data.TensorDataset(*make_data().tensors, torch.arange(61))
    sampler = DistributedSampler(data, shuffle=True, seed=11)
    plain = DataLoader(data, batch_size=5, sampler=sampler)
    model, optimizer, loader, scheduler = wrap(loader=plain)
    assert loader.batch_size == 5 * dist.get_world_size()
    assert loader.batch_sampler.seed == 11
    seen: list[int] = []
    for inputs, targets, indices in loader:
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        seen += indices.tolist()
    scheduler.remove()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seen)
    assert sorted(index for share in gathered for index in share) == list(range(61))


def orders_agree_whatever_the_generators(folder: Path) -> None:
    torch.manual_seed(dist.get_rank())
    loader = DataLoader(make_data(), batch_size=13, shuffle=True)
    *_, adaptive, scheduler = wrap(loader=loader)
    seeds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seeds, adaptive.batch_sampler.seed)
    scheduler.remove()
    assert len(set(seeds)) == 1


def one_step(
    model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, spoil: float = 0.0
) -> None:
    inputs, targets = next(iter(loader))
    optimizer.zero_grad()
    loss = mse_loss(model(inputs), targets) + spoil
    loss.backward()
    scheduler.step(loss)


def a_process_with_nan_spoils_no_other(folder: Path) -> None:
    model, optimizer, loader, scheduler = wrap()
    one_step(model, optimizer, loader, scheduler)
    before = scheduler.get_last_batch_size()
    one_step(model, optimizer, loader, scheduler, spoil=own([0.0, float("nan")]))
    one_step(model, optimizer, loader, scheduler)
    dropped = [record.dropped for record in scheduler.diagnostics]
    assert dropped == ["", "non-finite loss", ""]
    records = list(scheduler.diagnostics)
    assert records[1].next_batch_size == before
    assert records[2].variance_trace > 0
    scheduler.remove()


class Grid(nn.Module):
    """A layer for the samples, and one for a constant that no hook can follow."""

    def __init__(self, rows: int):
        super().__init__()
        torch.manual_seed(1)
        self.branch, self.trunk = nn.Linear(5, 8), nn.Linear(3, 8)
        self.grid = torch.randn(rows, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.branch(inputs) @ self.trunk(self.grid.tanh()).T)[:, :2]


def a_role_that_is_open_on_one_process(folder: Path) -> None:
    """A constant as long as one process's part: all leave the step out, and all take a size with
    which each process sees another part."""
    world, records = dist.get_world_size(), []
    for rows in (7, 6) if world == 2 else (5,):  # the parts of 13
        for options in ({}, {"inner_products": True}, {"per_parameter": True}, {"adam": True}):
            model = wrapped(Grid(rows), "ddp")
            kind = torch.optim.Adam if options.pop("adam", False) else torch.optim.SGD
            optimizer, loader, scheduler = adabatch.wrap(
                model, kind(model.parameters(), lr=1e-3), make_loader(), measure="all",
                batch_sizes=(13, 40), estimator=adabatch.PerSample(**options))
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = mse_loss(model(inputs), targets)
                loss.backward()
                optimizer.step()
                scheduler.step(loss)
            scheduler.remove()
            found = [(each.dropped != "", each.batch_size, each.variance_trace > 0)
                     for each in scheduler.diagnostics]
            assert found[0] == (True, 13, False)
            assert found[1] == (False, 13 + 2 * world - 1, True)
            records.append(found)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, records)
    assert all(each == records for each in gathered)


def gradients_that_nobody_averages(folder: Path) -> None:
    model, optimizer, loader, scheduler = wrap(make_model())
    raises_alike(RuntimeError, "DistributedDataParallel",
                 lambda: one_step(model, optimizer, loader, scheduler))
    scheduler.remove()
    model, optimizer, loader, scheduler = wrap()
    with model.no_sync():
        raises_alike(RuntimeError, "no_sync", lambda: one_step(model, optimizer, loader, scheduler))
    scheduler.remove()


class RankDependent(adabatch.controllers.NoiseScale):
    """Proposes a different size on each process."""

    def propose(self, moments: Any, *, loss: float, lr: float) -> float:
        super().propose(moments, loss=loss, lr=lr)
        return 20.0 + dist.get_rank()


def controllers_that_disagree(folder: Path) -> None:
    model, optimizer, loader, scheduler = wrap(controller=RankDependent(1.0))
    one_step(model, optimizer, loader, scheduler)
    raises_alike(RuntimeError, "batch size: 20 on rank 0; 21 on rank 1",
                 lambda: one_step(model, optimizer, loader, scheduler))
    scheduler.remove()
    model, optimizer, loader, scheduler = wrap()
    optimizer.param_groups[0]["lr"] *= 1 + dist.get_rank()
    raises_alike(RuntimeError, "lr: ", lambda: one_step(model, optimizer, loader, scheduler))
    scheduler.remove()


class Fixed:
    """An object with propose() and nothing else."""

    def propose(self, moments: Any, *, loss: float, lr: float) -> float:
        return 16.0


def a_controller_with_propose_alone(folder: Path) -> None:
    model, optimizer, loader, scheduler = wrap(controller=Fixed())
    one_step(model, optimizer, loader, scheduler)
    assert scheduler.get_last_batch_size() == 16
    scheduler.remove()


def goodput_uses_a_common_clock(folder: Path) -> None:
    train("ddp", steps=45, controller=lambda: adabatch.controllers.Goodput(7), samples=1999)


class Wrapped:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = wrapped(make_model(), "ddp")

    def forward(self, inputs: torch.Tensor) -> Wrapped:
        return Wrapped(self.inner(inputs))


def outputs_without_tensors_cannot_be_weighted(folder: Path) -> None:
    model, _, loader, scheduler = wrap(Opaque(), make_loader(batch_size=13))
    inputs, _ = next(iter(loader))
    with pytest.raises(RuntimeError, match="no tensor was found"):
        model(inputs)
    scheduler.remove()


def a_group_created_again(folder: Path) -> None:
    """The old run refuses; a new wrap() with the old state continues."""
    model, optimizer, loader, scheduler = wrap()
    one_step(model, optimizer, loader, scheduler)
    state = adabatch.state_dict(loader=loader, scheduler=scheduler)
    position, size = loader.position, scheduler.get_last_batch_size()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="wrap again"):
        one_step(model.module, optimizer, loader, scheduler)
    alone = f"file://{folder}/alone-{rank}"
    dist.init_process_group("gloo", init_method=alone, rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="wrap again"):
        one_step(model.module, optimizer, loader, scheduler)
    scheduler.remove()
    _, _, resumed, new_scheduler = wrap(make_model())
    adabatch.load_state_dict(state, loader=resumed, scheduler=new_scheduler)
    assert resumed.position == position > 0
    assert new_scheduler.get_last_batch_size() == size
    dist.destroy_process_group()
    again = f"file://{folder}/again"
    dist.init_process_group("gloo", init_method=again, rank=rank, world_size=world)


def a_group_of_some_processes(folder: Path) -> None:
    """Two of three share batches by group=, the third trains alone."""
    from torch.nn.parallel import DistributedDataParallel

    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        model = DistributedDataParallel(make_model(), process_group=pair)
        *_, loader, scheduler = wrap(model, group=pair)
        assert loader.batch_sampler.shard.world_size == 2
        scheduler.remove()
    assert_same(train("ddp", steps=20), train("alone", steps=20))


def micro_batches_agree_within_their_group(folder: Path) -> None:
    """Two of three processes find different limits and take the smaller; the third is not asked."""
    from torch.nn.parallel import DistributedDataParallel

    from adabatch.micro_batches import optimizer as module

    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        model = DistributedDataParallel(make_model(), process_group=pair)
        options = {"group": pair, "max_micro_batch_size": "auto", "loss_fn": mse_loss}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "find_micro_batch_size", lambda *args, **kw: 5 + dist.get_rank())
            *_, loader, scheduler = wrap(model, **options)
        assert loader.micro_batches.limit == 5
        scheduler.remove()
