"""save_checkpoint and load_checkpoint of one process and of a part of many; those of all processes:
tests/distributed/test_elastic.py."""

from itertools import count

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

import adabatch
from adabatch.controllers import Scheduled
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


def plain(kind=Adam, **options):
    def build(model):
        optimizer = kind(model.parameters(), lr=0.01, **options)
        return dict(zip(("optimizer", "loader", "scheduler"), adabatch.wrap(
            model, optimizer, DataLoader(Indexed(), 16), controller=Scheduled("0:16")),
            strict=True), model=model)
    return build


@pytest.mark.parametrize(("model", "build", "difference"), [
    (nn.Linear(3, 2), plain(), r"model.weight: \(1, 3\) in the checkpoint, \(2, 3\) here"),
    (nn.Sequential(nn.Linear(3, 1)), plain(), r"model.0.weight: not in the .*, \(1, 3\) here"),
    (nn.Linear(3, 1, bias=False), plain(), r"model.bias: \(1,\) in the checkpoint, not here"),
    (nn.Linear(3, 1), plain(SGD), r"state.weight.exp_avg: \(1, 3\) in the checkpoint, not here"),
    (nn.Linear(3, 1), plain(Adam, amsgrad=True), r"max_exp_avg_sq: not in the .*, \(1, 3\) here"),
], ids=["shape", "names", "fewer", "optimizer-without", "optimizer-with"])
def test_another_model_or_optimizer_is_refused(tmp_path, model, build, difference):
    adabatch.save_checkpoint(tmp_path, **plain()(nn.Linear(3, 1)))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"another model or optimizer(.|\n)*{difference}"):
        adabatch.load_checkpoint(tmp_path, **build(model))
    assert all(map(torch.equal, before, model.parameters()))
    assert adabatch.load_checkpoint(tmp_path, **plain()(nn.Linear(3, 1))) == 0


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_part_of_all_processes(tmp_path):
    checks = ["checkpoints_of_some_processes", "checkpoints_of_a_process_alone"]
    assert_checks_pass(3, [*checks, "checkpoints_of_a_mesh_without_a_group"], tmp_path)


INTERRUPTED = {
    "plain": {}, "accumulate": {"accumulate": 2, "batch_sizes": (16, 16)},
    "micro-batches": {"micro_batches": 3}, "nothing measured": {"controller": Scheduled("0:8")},
    "workers": {"num_workers": 1}, "scheduler first": {"first": True},
}


def interrupted_run(num_workers=0, first=False, **options):
    """(parts, train): train(trained, stop) collects the indices of the steps taken in one epoch and
    raises KeyboardInterrupt in the forward or backward pass number `stop`."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = DataLoader(Indexed(64), 8, shuffle=True, num_workers=num_workers)
    optimizer, loader, scheduler = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.1), loader, **{"batch_sizes": (8, 8), **options})
    size, passes, seen = options.get("accumulate", 1), count(), []

    def train(trained, stop=None):
        for n, (indices, inputs, targets) in enumerate(loader, 1):
            seen.extend(indices.tolist())
            if next(passes) == stop:
                raise KeyboardInterrupt
            loss = (model(inputs) - targets).square().mean()
            (loss / size).backward()
            if n % size and "micro_batches" not in options:
                continue
            if first:
                scheduler.step(loss)
            optimizer.step()
            optimizer.zero_grad()
            if not first:
                scheduler.step(loss)
            if loader.is_last_micro_batch:
                trained.extend(seen)
                seen.clear()

    return {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}, train


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("options", INTERRUPTED.values(), ids=INTERRUPTED)
def test_a_batch_that_no_step_was_taken_on_comes_again(options, epochs, stop):
    """Ctrl-C in the middle of a step, caught to save: no sample is left out after resuming."""
    trained = []
    parts, train = interrupted_run(**options)
    for _ in range(epochs):
        train(trained)
    per_epoch = 24 if "micro_batches" in options else 8
    with pytest.raises(KeyboardInterrupt):
        train(trained, stop=per_epoch * epochs + stop)
    state = adabatch.state_dict(**parts)
    parts, train = interrupted_run(**options)
    adabatch.load_state_dict(state, **parts)
    train(trained)
    assert [trained.count(index) for index in range(64)] == [1 + epochs] * 64


def test_between_steps_and_after_a_validation_pass_nothing_comes_again():
    trained = []
    parts, train = interrupted_run()
    train(trained)
    for _ in parts["loader"]:
        pass
    assert adabatch.state_dict(**parts)["parts"]["loader"] == parts["loader"].state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(trained, stop=11)
    assert parts["scheduler"].untrained_from() == 24
    parts, train = interrupted_run()
    assert parts["scheduler"].untrained_from() is None


class Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 64:
            self.at += 1
            yield self.at, torch.ones(3), torch.ones(1)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_stream_that_cannot_go_back_says_so():
    model = nn.Linear(3, 1)
    optimizer, loader, scheduler = adabatch.wrap(
        model, SGD(model.parameters(), lr=0.1), adabatch.AdaptiveDataLoader(Stream(), 8),
        batch_sizes=(8, 8), controller=Scheduled("0:8"))
    parts = {"model": model, "loader": loader, "optimizer": optimizer, "scheduler": scheduler}
    for step, (_, inputs, targets) in enumerate(loader):
        loss = (model(inputs) - targets).square().mean()
        if step == 3:
            break
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        adabatch.state_dict(**parts)  # between steps: no warning
    with pytest.warns(UserWarning, match=r"cannot go back.*Save after scheduler\.step"):
        adabatch.state_dict(**parts)


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(b"\xf4\x80garbage" * 100),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_file_is_explained_and_the_one_before_loads(name, damage, tmp_path):
    parts = make()
    train(parts, 2)
    older = adabatch.save_checkpoint(tmp_path, **parts)
    train(parts, 4)
    damage(adabatch.save_checkpoint(tmp_path, **parts) / name)
    with pytest.raises(ValueError, match=r"step-000000004 cannot be read: a file of it is damaged "
                                         r".*such as step-000000002, into .*latest"):
        adabatch.load_checkpoint(tmp_path, **make())
    (tmp_path / "latest").write_text(older.name)
    assert adabatch.load_checkpoint(tmp_path, **make()) == 2


@pytest.mark.parametrize("text", [b"", b"step-00", b"\xf4\x80"])
def test_a_damaged_name_is_explained(text, tmp_path):
    parts = make()
    train(parts, 2)
    adabatch.save_checkpoint(tmp_path, **parts)
    (tmp_path / "latest").write_bytes(text)
    with pytest.raises(ValueError, match=r"write one of \['step-000000002'\] into it"):
        adabatch.load_checkpoint(tmp_path, **make())
    (tmp_path / "latest").unlink()
    assert adabatch.load_checkpoint(tmp_path, **make()) is None


def test_without_an_older_checkpoint_the_name_is_deleted(tmp_path):
    parts = make()
    train(parts, 2)
    (adabatch.save_checkpoint(tmp_path, **parts) / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"cannot be read.*and delete .*latest"):
        adabatch.load_checkpoint(tmp_path, **make())
