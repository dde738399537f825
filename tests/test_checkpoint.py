"""save_checkpoint and load_checkpoint of one process and of a part of many; those of all processes:
tests/distributed/test_elastic.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader

import adabatch
from tests.distributed.processes import assert_checks_pass
from tests.scripted import Indexed, Proposals


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    inner = Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
    optimizer, loader, scheduler = adabatch.wrap(
        model, inner, DataLoader(Indexed(), 16, shuffle=True), controller=Proposals(20, 7, 33, 12),
        batch_sizes=(4, 64), micro_batches=adabatch.MicroBatches(10, lr_scheduler=schedule))
    return {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler,
            "lr_scheduler": schedule}


def training(parts):
    """Trains; yields the indices of each micro-batch."""
    model, optimizer, loader, scheduler = list(parts.values())[:4]
    while True:
        for indices, inputs, targets in loader:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            yield indices.tolist()


def train(parts, until, run=None):
    """Up to the end of step number `until`."""
    run, seen = training(parts) if run is None else run, []
    while parts["scheduler"].step_count < until:
        seen.append(next(run))
    return seen


def test_a_resumed_run_is_the_whole_one(tmp_path):
    whole = make()
    run = training(whole)
    train(whole, 5, run)
    path = adabatch.save_checkpoint(tmp_path, **whole)
    assert path.name == "step-000000005"
    after = train(whole, 14, run)
    again = make()
    torch.rand(3)
    assert adabatch.load_checkpoint(tmp_path, **again) == 5
    assert train(again, 14) == after
    for ours, theirs in zip(whole["model"].parameters(), again["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again["lr_scheduler"].get_last_lr() == whole["lr_scheduler"].get_last_lr()


def test_the_latest_ones_are_kept(tmp_path):
    parts = make()
    assert adabatch.load_checkpoint(tmp_path, **parts) is None
    for step in (2, 4, 6):
        train(parts, step)
        adabatch.save_checkpoint(tmp_path, **parts)
    names = {path.name for path in tmp_path.glob("step-*")}
    assert names == {"step-000000004", "step-000000006"}
    assert (tmp_path / "latest").read_text() == "step-000000006"


def test_other_parts_than_were_saved(tmp_path):
    parts = make()
    adabatch.save_checkpoint(tmp_path, **parts)
    del parts["lr_scheduler"]
    with pytest.raises(ValueError, match=r"the state holds .*lr_scheduler.*pass the same parts"):
        adabatch.load_checkpoint(tmp_path, **parts)
    with pytest.raises(TypeError, match="lr must have state_dict"):
        adabatch.state_dict(lr=0.1)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_part_of_all_processes(tmp_path):
    checks = ["checkpoints_of_some_processes", "checkpoints_of_a_process_alone"]
    assert_checks_pass(3, [*checks, "checkpoints_of_a_mesh_without_a_group"], tmp_path)
