"""Checkpoints of a run of many processes by torch.distributed.checkpoint: whole or not there, read by any number of processes, wrapped in any way."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from adabatch import checkpoint as one_process

LATEST = "latest"
NO_PART = "pass what adabatch.wrap gave: loader= and scheduler=, got {got}"


def save_checkpoint(folder: str | Path, *, model: nn.Module, optimizer: Optimizer, keep: int = 2, **parts: Any) -> Path:
    """Write a checkpoint, on all processes together, after scheduler.step(loss) and before the next batch is asked for.

    Each process writes its part of model and optimizer into a new folder; only when all have, the folder gets its name, and `folder/latest` names it. A run
    that is killed meanwhile finds the one before.

    Args:
        folder: where checkpoints lie, seen by all processes.
        model, optimizer: also in DistributedDataParallel or under fully_shard.
        keep: how many checkpoints are left; older ones are deleted.
        parts: loader= and scheduler=, and others with a state_dict that is the same on all processes (lr_scheduler=).

    Returns:
        The checkpoint's path.

    Raises:
        TypeError: loader or scheduler is missing.

    Example:
        >>> import tempfile, adabatch
        >>> model, data = nn.Linear(2, 1), torch.utils.data.TensorDataset(torch.randn(32, 2))
        >>> optimizer, loader, scheduler = adabatch.wrap(model, torch.optim.SGD(model.parameters(), 0.1), torch.utils.data.DataLoader(data, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(folder, model=model, optimizer=optimizer, loader=loader, scheduler=scheduler)
        ...     path.name, load_checkpoint(folder, model=model, optimizer=optimizer, loader=loader, scheduler=scheduler)
        ('step-000000000', 0)
    """
    _check_parts(parts)
    folder, step = Path(folder), parts["scheduler"].step_count
    # Imported here, as it takes longer than the rest of adabatch together.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    # The scheduler's state before the optimizer's, which may take a step of nothing to have a state.
    run = _packed(one_process.state_dict(**parts)["parts"])
    models, optimizers = get_state_dict(model, _innermost(optimizer))
    state = {"model": models, "optimizer": optimizers, "run": run, "random": {str(_rank()): torch.get_rng_state()}}
    part = folder / f"step-{step:09d}.part"
    if _rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    _wait_for_all()
    dcp.save(state, checkpoint_id=part, no_dist=not _many())
    path = part.with_suffix("")
    if _rank() == 0:
        _commit(folder, part, path, keep)
    _wait_for_all()
    return path


def load_checkpoint(folder: str | Path, *, model: nn.Module, optimizer: Optimizer, **parts: Any) -> int | None:
    """Load the latest checkpoint that is whole, on all processes together, before the first batch.

    The number of processes may be another than that which saved it, and so may the wrapper: the loader's position counts the samples of the one order that
    all share. With as many processes as before each goes on with its own random numbers.

    Args:
        folder, model, optimizer, parts: as for save_checkpoint.

    Returns:
        The number of steps done, or None where there is no checkpoint.

    Raises:
        TypeError: loader or scheduler is missing.
        ValueError: other parts than were saved.
    """
    _check_parts(parts)
    latest = Path(folder) / LATEST
    if not latest.exists():
        return None
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    path = latest.parent / latest.read_text().strip()
    inner = _innermost(optimizer)
    models, optimizers = get_state_dict(model, inner)
    state = {"model": models, "optimizer": optimizers, "run": b""}
    randoms = [key for key in dcp.FileSystemReader(path).read_metadata().state_dict_metadata if key.startswith("random.")]
    own = str(_rank())
    if len(randoms) == _world() and f"random.{own}" in randoms:
        state["random"] = {own: torch.get_rng_state()}
    dcp.load(state, checkpoint_id=path, no_dist=not _many())
    set_state_dict(model, inner, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run = torch.load(io.BytesIO(state["run"]), weights_only=True)
    random = {"cpu": state["random"][own] if "random" in state else torch.get_rng_state(), "cuda": []}
    one_process.load_state_dict({"version": 1, "parts": run, "random": random}, **parts)
    return parts["scheduler"].step_count


def _commit(folder: Path, part: Path, path: Path, keep: int) -> None:
    """Give the folder its name, then name it as the latest: each one move, the data being on the disk before."""
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
    steps = sorted(old for old in folder.glob("step-*") if old.is_dir() and old != path and old.name < path.name)
    for old in steps[: max(0, len(steps) - keep + 1)]:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _packed(state: dict[str, Any]) -> bytes:
    """As one object: torch.distributed.checkpoint would take tensors apart, and want them in the same sizes when it loads."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _innermost(optimizer: Any) -> Optimizer:
    """The optimizer that holds the state, of one that waits for micro-batches."""
    return optimizer.__dict__.get("optimizer", optimizer)


def _check_parts(parts: dict[str, Any]) -> None:
    if not {"loader", "scheduler"} <= parts.keys():
        raise TypeError(NO_PART.format(got=sorted(parts)))


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _many() else 0


def _world() -> int:
    return dist.get_world_size() if _many() else 1


def _wait_for_all() -> None:
    if _many():
        dist.barrier()
