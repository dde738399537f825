"""Runs checks on several gloo processes at once: one start of processes for many checks, a time
limit on everything."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

TIMEOUT = 120.0

# One process imports torch, the others are forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel", "tests.distributed.bad_setups", "tests.distributed.checks",
    "tests.distributed.checkpoints", "tests.distributed.tensor_parallel"])


def run_checks(
    world_size: int, names: list[str], folder: Path, timeout: float = TIMEOUT
) -> dict[str, dict[int, str]]:
    """{check: {rank: traceback}} of the checks that failed, each run on all processes."""
    queue = _context.Queue()
    processes = [
        _context.Process(target=_child, daemon=True,
                         args=(rank, world_size, names, str(folder), timeout, queue))
        for rank in range(world_size)]
    for process in processes:
        process.start()
    failed: dict[str, dict[int, str]] = {}
    end, open_ranks = time.monotonic() + timeout, set(range(world_size))
    try:
        while open_ranks:
            rank, name, error = queue.get(timeout=max(0.1, end - time.monotonic()))
            if name is None:
                open_ranks.discard(rank)
            elif error:
                failed.setdefault(name, {})[rank] = error
    except Exception as error:  # the queue is empty after the time limit
        running = f"{error!r}; still running: ranks {sorted(open_ranks)}; so far: {failed}"
        failed.setdefault("the processes did not end", {})[-1] = running
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
    return failed


def assert_checks_pass(world_size: int, names: list[str], folder: Path) -> None:
    """Run the checks; a failure shows the traceback of each rank."""
    failed = run_checks(world_size, names, folder)
    lines = [
        f"{name}, rank {rank}:\n{error}"
        for name, errors in failed.items() for rank, error in errors.items()
    ]
    assert not failed, "\n\n".join(lines)


def _child(
    rank: int, world_size: int, names: list[str], folder: str, timeout: float,
    queue: multiprocessing.Queue,
) -> None:
    import torch.distributed as dist

    from tests.distributed import bad_setups, checkpoints, checks, tensor_parallel

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout, exit=True)
    os.environ.pop("WORLD_SIZE", None)
    modules = (checks, bad_setups, checkpoints, tensor_parallel)
    for number, name in enumerate(names):
        queue_error = ""
        try:
            store = f"file://{folder}/store-{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size,
                                    timeout=timedelta(seconds=30))
            check: Callable[[Path], None] = next(
                vars(module)[name] for module in modules if name in vars(module))
            torch.manual_seed(0)
            torch._dynamo.reset()
            check(Path(folder))
        except Exception:
            queue_error = traceback.format_exc()
        queue.put((rank, name, queue_error))
        try:
            # A rank that failed must not meet the others in the next check's communication.
            dist.barrier()
            dist.destroy_process_group()
        except Exception:
            queue.put((rank, f"{name}: after it", traceback.format_exc()))
            break
    queue.put((rank, None, ""))
