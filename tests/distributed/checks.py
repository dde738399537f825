"""What is checked on every process of a group; run by tests/distributed/processes.py. Each check is given a folder that all processes see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import adabatch
from tests.distributed.runs import assert_same, train


def same_as_one_process_ddp(folder: Path) -> None:
    assert_same(train("ddp"), train("alone"))


def same_as_one_process_fsdp(folder: Path) -> None:
    assert_same(train("fsdp"), train("alone"))


def same_as_one_process_hsdp(folder: Path) -> None:
    assert_same(train("hsdp"), train("alone"))


def same_as_one_process_compiled(folder: Path) -> None:
    assert_same(train("ddp-compiled", steps=25), train("alone", steps=25))


def same_with_dots(folder: Path) -> None:
    assert_same(train("ddp", dots=True), train("alone", dots=True))


def same_with_accumulation(folder: Path) -> None:
    """Equal shares; the reported loss, a mean over a process's own passes, is then that over all of them. In one epoch: its end is shared out otherwise."""
    options = {"accumulate": 2, "samples": 1999, "multiple_of": 2 * dist.get_world_size(), "max_batch_size": 400, "steps": 30}
    assert_same(train("ddp", **options), train("alone", **options))
    assert_same(train("fsdp", **options, dots=True), train("alone", **options, dots=True))


def same_moments_with_accumulation_of_unequal_shares(folder: Path) -> None:
    """Batches of 13: the processes' shares differ in each pass, and between the two passes of a step."""
    options = {"accumulate": 2, "samples": 1999, "steps": 4, "controller": lambda: adabatch.controllers.Scheduled("0:26"), "every": 1, "dots": True}
    found, expected = train("ddp", **options), train("alone", **options)
    for name in ("variance_trace", "grad_sq_norm", "true_grad_sq_norm", "batch_size"):
        here, there = ([getattr(record, name) for record in run["records"]] for run in (found, expected))
        assert here == pytest.approx(there, rel=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


def same_with_a_summed_loss(folder: Path) -> None:
    options = {"controller": lambda: adabatch.controllers.NoiseScale(scale=2.0), "dots": True, "steps": 30, "samples": 1999, "max_batch_size": 400}
    options |= {"loss_reduction": "sum"}
    assert_same(train("ddp", **options), train("alone", **options))


def same_with_groups_and_parameters_measured_apart(folder: Path) -> None:
    for dots in (False, True):
        found, expected = (train(how, groups=2, per_parameter=True, dots=dots, steps=20, samples=1999, max_batch_size=400) for how in ("ddp", "alone"))
        assert_same(found, expected)
        for here, there in zip(found["scheduler"].diagnostics.layers(), expected["scheduler"].diagnostics.layers(), strict=True):
            assert here.name == there.name
            assert here.variance_trace == pytest.approx(there.variance_trace, rel=1e-4)
            assert here.true_grad_sq_norm == pytest.approx(there.true_grad_sq_norm, rel=1e-4)


def same_with_micro_batches(folder: Path) -> None:
    """Micro-batches of unequal shares, each averaged at once: slower than inside no_sync, and right as well."""
    options = {"max_micro_batch_size": 6, "steps": 20, "samples": 1999, "max_batch_size": 400}
    found, expected = train("ddp", **options), train("alone", **options)
    assert_same(found, expected)


def measures_a_subset_of_each_share(folder: Path) -> None:
    """T̂ from 6 samples of each batch is unbiased: over 150 batches at fixed weights it agrees with that from all, within four standard errors."""
    fixed = {"controller": lambda: adabatch.controllers.Scheduled("0:13"), "every": 1, "steps": 150, "lr": 0.0, "samples": 1999}
    some, everything = train("ddp", **fixed, measured=6), train("alone", **fixed)
    differences = torch.tensor([a.variance_trace - b.variance_trace for a, b in zip(some["records"], everything["records"], strict=True)])
    assert abs(differences.mean()) < 4 * differences.std() / len(differences) ** 0.5
    assert differences.std() > 0
