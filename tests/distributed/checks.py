"""What is checked on every process of a group; run by tests/distributed/processes.py. Each check is
given a folder that all processes see."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import mse_loss

import adabatch
from tests.distributed.runs import (
    assert_same,
    column,
    make_loader,
    make_model,
    no_sync,
    train,
    wrapped,
)
from tests.options import grouped


def same_as_one_process_ddp(folder: Path) -> None:
    assert_same(train("ddp"), train("alone"))


def same_as_one_process_fsdp(folder: Path) -> None:
    assert_same(train("fsdp"), train("alone"))


def same_as_one_process_hsdp(folder: Path) -> None:
    assert_same(train("hsdp"), train("alone"))


def same_as_one_process_compiled(folder: Path) -> None:
    assert_same(train("ddp-compiled", steps=25), train("alone", steps=25))


def same_with_inner_products(folder: Path) -> None:
    assert_same(train("ddp", inner_products=True), train("alone", inner_products=True))


def same_with_accumulation(folder: Path) -> None:
    """Equal parts, for which a process's mean loss over its passes is comparable; within one epoch,
    whose end is divided differently."""
    options = {"accumulate": 2, "samples": 1999, "multiple_of": 2 * dist.get_world_size(),
               "max_batch_size": 400, "steps": 30}
    assert_same(train("ddp", **options), train("alone", **options))
    options["inner_products"] = True
    assert_same(train("fsdp", **options), train("alone", **options))


def same_moments_with_accumulation_of_unequal_shares(folder: Path) -> None:
    """Batches of 13: the parts differ in each pass, and between the two passes of a step."""
    options = {"accumulate": 2, "samples": 1999, "steps": 4, "every": 1, "inner_products": True,
               "controller": lambda: adabatch.controllers.Scheduled("0:26")}
    found, expected = train("ddp", **options), train("alone", **options)
    for name in ("variance_trace", "grad_sq_norm", "true_grad_sq_norm", "batch_size"):
        here, there = column(found, name), column(expected, name)
        assert here == pytest.approx(there, rel=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


def same_with_a_summed_loss(folder: Path) -> None:
    options = {"controller": lambda: adabatch.controllers.NoiseScale(scale=2.0), "steps": 30,
               "inner_products": True, "samples": 1999, "max_batch_size": 400,
               "loss_reduction": "sum"}
    assert_same(train("ddp", **options), train("alone", **options))


def same_per_group_and_per_parameter(folder: Path) -> None:
    for inner_products in (False, True):
        options = {"groups": 2, "per_parameter": True, "inner_products": inner_products,
                   "steps": 20, "samples": 1999, "max_batch_size": 400}
        found, expected = train("ddp", **options), train("alone", **options)
        assert_same(found, expected)
        layers = [run["scheduler"].diagnostics.layers() for run in (found, expected)]
        for here, there in zip(*layers, strict=True):
            assert here.name == there.name
            assert here.variance_trace == pytest.approx(there.variance_trace, rel=1e-4)
            assert here.true_grad_sq_norm == pytest.approx(there.true_grad_sq_norm, rel=1e-4)


def same_with_micro_batches(folder: Path) -> None:
    """Micro-batches of unequal sizes, each averaged at once, outside no_sync."""
    options = {"max_micro_batch_size": 6, "steps": 20, "samples": 1999, "max_batch_size": 400}
    found, expected = train("ddp", **options), train("alone", **options)
    assert_same(found, expected)


def measures_a_subset_of_each_part(folder: Path) -> None:
    """T̂ from 6 samples of each batch is unbiased: over 150 batches at fixed weights it agrees with
    that from all, within four standard errors."""
    fixed = {"controller": lambda: adabatch.controllers.Scheduled("0:13"), "every": 1, "steps": 150,
             "lr": 0.0, "samples": 1999}
    some, everything = train("ddp", **fixed, measured=6), train("alone", **fixed)
    traces = [torch.tensor(column(run, "variance_trace")) for run in (some, everything)]
    differences = traces[0] - traces[1]
    assert abs(differences.mean()) < 4 * differences.std() / len(differences) ** 0.5
    assert differences.std() > 0


def same_with_a_budget(folder: Path) -> None:
    """The default: samples and interval are chosen by cost, the same ones everywhere."""
    run = train("ddp", measure=0.05, samples=1999, max_batch_size=400, steps=60)
    measured = [record.measured for record in run["records"]]
    assert 5 <= sum(measured) < 60
    measurement = run["scheduler"].measurement_plan
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (measured, measurement.samples, measurement.every))
    assert all(each == gathered[0] for each in gathered)


def cross_rank_by_its_formula(folder: Path) -> None:
    """T̂ = Σ b_r‖g_r − ḡ‖²/(W − 1) from the processes' gradients in float64, for unequal b_r."""
    for how in ("ddp", "fsdp"):
        for loss_reduction in ("mean", "sum"):
            cross_rank_once(how, loss_reduction)


def cross_rank_once(how: str, loss_reduction: str, accumulate: int = 1, **options: Any) -> None:
    model = wrapped(make_model(), how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = adabatch.controllers.Scheduled("0:26" if accumulate == 2 else "0:13")
    options |= {"estimator": "cross_rank", "loss_reduction": loss_reduction,
                "accumulate": accumulate, "controller": controller, "min_batch_size": 7,
                "max_batch_size": 40}
    optimizer, loader, scheduler = adabatch.wrap(
        model, optimizer, make_loader(samples=1999), **grouped(**options))
    batches, mean = [], loss_reduction == "mean"
    for inputs, targets in loader:
        batches.append((inputs, targets))
        last = len(batches) == accumulate
        with contextlib.nullcontext() if last else no_sync(model, how):
            loss = mse_loss(model(inputs), targets, reduction=loss_reduction)
            (loss / (accumulate if mean else 1)).backward()
        if last:
            break
    scheduler.step(loss)
    found = scheduler.diagnostics.latest
    scheduler.remove()
    reference = make_model().double()
    inputs, targets = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    reference.zero_grad()
    # A sum over 2 outputs a sample is twice the mean.
    ((1 if mean else 2) * mse_loss(reference(inputs), targets)).backward()
    own = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (len(inputs), own))
    m = sum(size for size, _ in gathered)
    whole = sum(size * grad for size, grad in gathered) / m
    between = sum(size * (grad - whole).square().sum() for size, grad in gathered)
    trace = between / (len(gathered) - 1)
    assert found.batch_size == m
    assert found.variance_trace == pytest.approx(trace.item(), rel=1e-4)
    assert found.grad_sq_norm == pytest.approx(whole.square().sum().item(), rel=1e-4)


def cross_rank_with_accumulation_and_compression(folder: Path) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
        allreduce_hook,
        bf16_compress_hook,
    )

    cross_rank_once("ddp", "mean", accumulate=2)
    cross_rank_once("fsdp", "mean", accumulate=2)
    cross_rank_once("ddp", "mean", comm_hook=allreduce_hook)
    run = train("ddp", steps=5, estimator="cross_rank", comm_hook=bf16_compress_hook, samples=1999)
    assert all(record.variance_trace > 0 for record in run["records"])
    model = wrapped(make_model(), "ddp")
    model.register_comm_hook(None, allreduce_hook)
    with pytest.raises(RuntimeError, match="comm_hook="):
        wrap_cross_rank(model)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        wrap_cross_rank(make_model())


def wrap_cross_rank(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adabatch.wrap(model, optimizer, make_loader(), estimator=adabatch.CrossRank())


def cross_rank_is_unbiased(folder: Path) -> None:
    """Over 200 batches at fixed weights its mean is that of the traces per sample, within four
    standard errors, and it spreads more."""
    fixed = {"controller": lambda: adabatch.controllers.Scheduled("0:13"), "steps": 200, "lr": 0.0,
             "samples": 2999}
    between = column(train("ddp", **fixed, estimator="cross_rank"), "variance_trace")
    per_sample = column(train("alone", **fixed, every=1), "variance_trace")
    differences = torch.tensor(between) - torch.tensor(per_sample)
    assert abs(differences.mean()) < 4 * differences.std() / len(differences) ** 0.5
    assert torch.tensor(between).std() > torch.tensor(per_sample).std()


def cross_rank_needs_no_sync_between_micro_batches(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no_sync"):
        train("ddp", estimator="cross_rank", max_micro_batch_size=2, steps=1)


class Alternating(torch.nn.Module):
    """Each process, at each call, uses layers of its own choice."""

    def __init__(self, uses: list[list[int]]):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.uses, self.step = uses, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs))
        for part in self.uses[(dist.get_rank() + self.step) % len(self.uses)]:
            hidden = hidden + torch.tanh(self.parts[part](hidden))
        return self.last(hidden)


def exact_with_layers_that_not_all_processes_use(folder: Path) -> None:
    for uses in ([[0], [1]], [[0, 1], []], [[0], [1], [0, 1]]):
        inner = Alternating(uses).double()
        model = torch.nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
        optimizer, loader, scheduler = adabatch.wrap(
            model, torch.optim.SGD(model.parameters(), lr=1e-2), make_loader(), measure="all",
            batch_sizes=(13, 13))
        expected = []
        for inner.step, (inputs, targets) in enumerate(loader):
            inputs, targets = inputs.double(), targets.double()
            rows = []
            with scheduler.paused():
                for row in range(len(inputs)):
                    loss = mse_loss(inner(inputs[row : row + 1]), targets[row : row + 1])
                    grads = torch.autograd.grad(loss, list(inner.parameters()), allow_unused=True,
                                                materialize_grads=True)
                    rows.append(torch.cat([grad.flatten() for grad in grads]))
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, torch.stack(rows))
            expected.append(float(torch.cat(gathered).var(0).sum()))
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
        scheduler.remove()
        records = list(scheduler.diagnostics)
        assert sum(bool(each.dropped) for each in records) <= 2
        assert not records[-1].dropped
        for record, trace in zip(records, expected, strict=True):
            assert record.dropped or abs(record.variance_trace - trace) < 1e-6 * trace


def same_with_adam(folder: Path) -> None:
    """CABS by tr(PΣ)."""
    options = {"adam": True, "steps": 20, "samples": 1999, "max_batch_size": 400,
               "controller": lambda: adabatch.CABS(scale=300.0)}
    expected = train("alone", **options)
    for how in ("ddp", "fsdp"):
        assert_same(train(how, **options), expected, tolerance=1e-4)


def same_one_step_later(folder: Path) -> None:
    """Waited for in the next step, as with accelerators: the same records, each a step late, and a
    checkpoint in between loses none."""
    fixed = {"controller": lambda: adabatch.controllers.Scheduled("0:13"), "every": 1, "steps": 12,
             "samples": 1999}
    found, expected = train("ddp", **fixed, waits=True), train("alone", **fixed)
    names = "step", "batch_size", "samples_seen", "loss", "variance_trace", "true_grad_sq_norm"
    for name in names:
        here, there = column(found, name), column(expected, name)
        assert here == pytest.approx(there, rel=1e-5), name


def same_with_a_mesh_given(folder: Path) -> None:
    """group= a device mesh of two dimensions, all of whose processes share each batch."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    assert_same(train("hsdp", steps=20, group=mesh), train("alone", steps=20))
