"""Checkpoints: one state of all parts of a run, in memory or in files, of any number of processes.

Files are written by torch.distributed.checkpoint: whole or not there, and read by any number of
processes, whether the model is plain, in DistributedDataParallel or under fully_shard.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch._checks import check_version
from adabatch._types import Part
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.distributed.group import is_initialized, ranks_of, registered_group
from adabatch.interfaces import BatchSource, State
from adabatch.micro_batches.optimizer import AccumulatingOptimizer

if TYPE_CHECKING:
    from adabatch.scheduler.scheduler import BatchSizeScheduler

LATEST = "latest"
SHOWN = 20  # differences that an error lists
# The loader before the scheduler, which writes the batch size last.
_ORDER = ("model", "optimizer", "grad_scaler", "lr_scheduler", "loader", "scheduler")


def state_dict(**parts: Part) -> State:
    """The states of all parts, and torch's random states: plain numbers and tensors.

    torch.save it; torch.load(..., weights_only=True) reads it. Call after scheduler.step(loss) and
    before the next batch is drawn; with micro-batches where loader.is_last_micro_batch is True.
    Called within a step that is not taken, as in the handler of a KeyboardInterrupt, with both
    loader= and scheduler=, the batches of that step come again after resuming; where the data set
    cannot go back, as an iterable one, a warning says so.

    Args:
        parts: whatever has a state_dict(): scheduler=, loader=, optimizer=, model=, lr_scheduler=,
            grad_scaler=, or others under any name.

    Raises:
        TypeError: a part without state_dict and load_state_dict.
        RuntimeError: in the middle of a batch.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> sorted(state_dict(model=model))
        ['parts', 'random', 'version']
    """
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise TypeError(f"{name} must have state_dict() and load_state_dict(), got "
                            f"{type(part).__name__}: pass the object itself")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    untrained = _untrained(parts)
    states = {name: untrained if name == "loader" and untrained is not None else part.state_dict()
              for name, part in parts.items()}
    return {"version": 1, "random": {"cpu": torch.get_rng_state(), "cuda": cuda}, "parts": states}


def _untrained(parts: dict[str, Part]) -> State | None:
    """The loader's state before the batches of a step that is under way; None between steps."""
    loader, scheduler = parts.get("loader"), parts.get("scheduler")
    if not isinstance(loader, AdaptiveDataLoader) or not isinstance(scheduler, Stepped):
        return None
    position = scheduler.untrained_from() if scheduler.loader is loader else None
    if position is None or (position == loader.position and loader.is_last_micro_batch):
        return None
    state = loader.state_from(position)
    if state is None:
        warnings.warn(
            "the checkpoint is taken within a step: its batch was delivered, no step was taken on "
            "it, and this data set or sampler cannot go back, so that it will be left out after "
            "resuming. Save after scheduler.step(loss)", stacklevel=3)
    return state


def load_state_dict(state: State, **parts: Part) -> None:
    """Load what state_dict(...) gave; the next iteration over the loader continues from there.

    Raises:
        ValueError: an unknown version, or other parts than were saved. Nothing is loaded then.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> load_state_dict(state_dict(model=model), model=model)
    """
    check_version(state, 1, "a training run")
    if state["parts"].keys() != parts.keys():
        raise ValueError(f"the state holds {sorted(state['parts'])}, but {sorted(parts)} were "
                         "passed: pass the same parts")
    places = {name: place for place, name in enumerate(_ORDER)}
    for name in sorted(parts, key=lambda name: (places.get(name, -1), name)):
        parts[name].load_state_dict(state["parts"][name])
    torch.set_rng_state(state["random"]["cpu"])
    cuda = state["random"]["cuda"]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def save_checkpoint(
    folder: str | Path, *, model: nn.Module, optimizer: Optimizer, loader: Part,
    scheduler: BatchSizeScheduler, keep: int = 2, **parts: Part,
) -> Path:
    """Write a checkpoint, after scheduler.step(loss) and before the next batch is drawn.

    The processes that train together (`process_group=` of wrap) all call it, and each writes its
    part of model and optimizer. The new folder gets its name when all of it is on the disk, and
    `folder/latest` names it: a run that is killed meanwhile finds the one before.

    Args:
        folder: of the checkpoints; the same for all processes.
        model: also in DistributedDataParallel or under fully_shard.
        optimizer, loader, scheduler: from adabatch.wrap.
        keep: how many checkpoints to keep; older ones are deleted.
        parts: others whose state_dict() is the same on all processes (lr_scheduler=).

    Returns:
        The checkpoint's path.

    Example:
        >>> import tempfile, adabatch
        >>> model, data = nn.Linear(2, 1), torch.utils.data.TensorDataset(torch.randn(32, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> loader = torch.utils.data.DataLoader(data, 16)
        >>> optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader)
        >>> parts = dict(model=model, optimizer=optimizer, loader=loader, scheduler=scheduler)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, **parts).name, load_checkpoint(folder, **parts)
        ('step-000000000', 0)
    """
    # Imported here, as it takes longer than the rest of adabatch together.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    folder, step, processes = Path(folder), scheduler.step_count, _Processes.of(scheduler)
    # The scheduler's state before the optimizer's, which may take an empty step to have one.
    run = _packed(state_dict(loader=loader, scheduler=scheduler, **parts)["parts"])
    models, optimizers = get_state_dict(model, _innermost(optimizer))
    state = {"model": models, "optimizer": optimizers, "run": run,
             "random": {str(processes.rank): _random_states()}}
    part = folder / f"step-{step:09d}.part"
    if processes.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    with _quiet():
        dcp.save(state, checkpoint_id=part, process_group=processes.group,
                 no_dist=processes.size == 1)
    path = part.with_suffix("")
    if processes.rank == 0:
        _commit(folder, part, path, keep)
    processes.wait()
    return path


def load_checkpoint(
    folder: str | Path, *, model: nn.Module, optimizer: Optimizer, loader: Part,
    scheduler: BatchSizeScheduler, **parts: Part,
) -> int | None:
    """Load the latest whole checkpoint, before the first batch; all processes together.

    It may come from another number of processes or another wrapper of the model: the loader's
    position counts samples of the one order that all share. With the same number of processes,
    each continues with its own random numbers. Arguments as for save_checkpoint.

    Returns:
        The number of steps done, or None where there is no checkpoint.

    Raises:
        ValueError: other parts than were saved, or another model or optimizer (all differences are
            listed; nothing is loaded then). A checkpoint that cannot be read, as a file of it is
            damaged or missing: model and optimizer may then be loaded in part.
    """
    latest = Path(folder) / LATEST
    if not latest.exists():
        return None
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path, processes = _latest(latest), _Processes.of(scheduler)
    inner, own = _innermost(optimizer), str(processes.rank)
    models, optimizers = get_state_dict(model, inner)
    state: State = {"model": models, "optimizer": optimizers, "run": b""}
    with _reading(path):
        keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    _check_fits(path, keys, state)
    saved = {key.split(".")[1] for key in keys if key.startswith("random.")}
    if len(saved) == processes.size and own in saved:
        state["random"] = {own: {name: value for name, value in _random_states().items()
                                 if f"random.{own}.{name}" in keys}}
    with _quiet(), _reading(path):
        dcp.load(state, checkpoint_id=path, process_group=processes.group,
                 no_dist=processes.size == 1)
        run = torch.load(io.BytesIO(state["run"]), weights_only=True)
    set_state_dict(model, inner, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    random = state["random"][own] if "random" in state else {"cpu": torch.get_rng_state()}
    load_state_dict({"version": 1, "parts": run, "random": {"cpu": random["cpu"], "cuda": []}},
                    loader=loader, scheduler=scheduler, **parts)
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    return scheduler.step_count


def _latest(latest: Path) -> Path:
    """The checkpoint that the file names; ValueError: none that there is."""
    name = latest.read_text(errors="replace").strip()
    if name not in _checkpoints(latest.parent):
        raise ValueError(f"{latest} must hold the name of a checkpoint beside it, got {name!r}: "
                         f"write one of {_checkpoints(latest.parent)} into it, or delete it to "
                         "begin without a checkpoint")
    return latest.parent / name


def _checkpoints(folder: Path) -> list[str]:
    """The names of the whole checkpoints, oldest first."""
    return sorted(each.name for each in folder.glob("step-*") if each.is_dir() and not each.suffix)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in reading as one ValueError: torch raises whatever a damaged file leads to,
    or a BaseException."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((failure for failure, _ in failures), error)
        others = [name for name in _checkpoints(path.parent) if name != path.name]
        fix = f"write the name of another one, such as {others[-1]}, into" if others else "delete"
        raise ValueError(
            f"the checkpoint {path} cannot be read: a file of it is damaged or missing "
            f"({type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}). "
            f"Build all parts again, and {fix} {path.parent / LATEST}") from cause


def _check_fits(path: Path, saved: Mapping[str, object], state: State) -> None:
    """Raise a ValueError that lists the tensors of model and optimizer that are not those saved:
    torch raises a BaseException for some, and passes over what only the checkpoint has."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    parts = ("model.", "optimizer.state.")
    here = dict(_shapes("", state))
    there = {name: tuple(entry.size) for name, entry in saved.items()
             if name.startswith(parts) and isinstance(entry, TensorStorageMetadata)}
    here = {name: shape for name, shape in here.items() if name.startswith(parts)}
    lines = [f"\n  - {name}: {there.get(name, 'not')} in the checkpoint, {here.get(name, 'not')} "
             "here" for name in sorted(here.keys() | there.keys())
             if here.get(name) != there.get(name)]
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ValueError(
            f"the checkpoint {path} is of another model or optimizer: build both as they were when "
            f"it was saved, or save to another folder{''.join(lines[:SHOWN])}{more}")


def _shapes(path: str, value: object) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names, as torch.distributed.checkpoint joins them, and shapes of all tensors."""
    if isinstance(value, Tensor):
        yield path, tuple(value.shape)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _shapes(f"{path}.{name}" if path else str(name), each)


@runtime_checkable
class Stepped(Protocol):
    """A scheduler that knows which batches no step was taken on."""

    loader: BatchSource

    def untrained_from(self) -> int | None:
        """See BatchSizeScheduler.untrained_from."""


class _Processes(NamedTuple):
    """Those that train together, and torch's group of them; None for the default, or none."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, scheduler: BatchSizeScheduler) -> _Processes:
        if not is_initialized() or len(ranks_of(scheduler.process_group)) == 1:
            return cls(None, 0, 1)
        group = registered_group(scheduler.process_group)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(self.group)


def _random_states() -> dict[str, Tensor]:
    """This process's random states, of its current CUDA device if it has one."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _commit(folder: Path, part: Path, path: Path, keep: int) -> None:
    """Rename the folder, then let `latest` name it: each one move, after the data is on disk."""
    for file in part.iterdir():
        _sync(file)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    _sync(folder)
    named = folder / f"{LATEST}.part"
    named.write_text(path.name)
    _sync(named)
    named.replace(folder / LATEST)
    _sync(folder)
    older = sorted(each for each in folder.glob("step-*")
                   if each.is_dir() and each.name < path.name)
    for each in older[: max(0, len(older) - keep + 1)]:
        shutil.rmtree(each, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _packed(state: State) -> bytes:
    """As one object: torch.distributed.checkpoint would split tensors and fix their sizes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _innermost(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AccumulatingOptimizer) else optimizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
