"""What the global order of a very large epoch costs one process: times and memory.

Times to the first batch, of a new epoch and of another batch size, each in a process of its own.
The order is a keyed permutation, computed position by position: nothing has the epoch's size.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from adabatch import AdaptiveDataLoader, ResizableBatchSampler

BATCHES, REPEATS = 16, 7
STATUS = Path("/proc/self/status")


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def _sampler(samples: int, batch_size: int, rank: int, world: int) -> ResizableBatchSampler:
    return ResizableBatchSampler(samples, batch_size, shuffle=True, rank=rank, world_size=world)


def _loader(samples: int, batch_size: int, rank: int, world: int) -> AdaptiveDataLoader:
    data = Numbers(samples)
    return AdaptiveDataLoader(data, batch_size, shuffle=True, rank=rank, world_size=world)


MAKERS: dict[str, Callable[..., Any]] = {"sampler": _sampler, "loader": _loader}


def walk(kind: str, arguments: tuple[int, int, int, int]) -> dict[str, list[float]]:
    """{action: seconds of each time}: the first batch, batches in a row, new epochs, new sizes.

    Args:
        kind: key of MAKERS.
        arguments: samples of an epoch, batch size of all processes, rank, number of processes.
    """
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any], count: int = 1) -> None:
        begin = time.perf_counter()
        for _ in range(count):
            action()
        seconds.setdefault(name, []).append((time.perf_counter() - begin) / count)

    source: Any = None
    batches: Iterator[Any] = iter(())

    def begin_epoch(epoch: int) -> None:
        nonlocal source, batches
        if source is None:
            source = MAKERS[kind](*arguments)
        source.set_epoch(epoch)
        batches = iter(source)
        next(batches)

    timed("first_batch", lambda: begin_epoch(0))
    for _ in range(REPEATS):
        timed("batch", lambda: next(batches), BATCHES)
    for epoch in range(1, REPEATS + 1):
        timed("new_epoch", lambda epoch=epoch: begin_epoch(epoch))
    size = source.batch_size
    for repeat in range(REPEATS):
        timed("resize", lambda to=(2 * size, size)[repeat % 2]: setattr(source, "batch_size", to))
        timed("batch_after_resize", lambda: next(batches))
    return seconds


def costs(kind: str, arguments: tuple[int, int, int, int]) -> dict[str, Any]:
    """One walk for times and the resident set, a second one, slowed, for what Python allocates.

    Returns:
        "seconds" as in walk; "resident": bytes by which the peak of the resident set rose above
        what it was with all libraries loaded; "allocated": peak bytes of Python's and NumPy's
        allocations.
    """
    gc.collect()
    if STATUS.exists():
        # A process inherits the peak of the one that started it.
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    seconds = walk(kind, arguments)
    resident = _peak() - before
    tracemalloc.start()
    walk(kind, arguments)
    allocated = float(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    return {"seconds": seconds, "resident": resident, "allocated": allocated}


def _peak() -> float:
    """Peak bytes of the resident set; of the process's whole life where there is no /proc."""
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def measure(samples: int, batch_size: int, world: int) -> list[dict]:
    """Times and memory of one process of `world`, of the sampler alone and of the whole loader.

    Args:
        samples: of an epoch.
        batch_size: of all processes together.
        world: number of processes; the one before the last is measured.
    """
    arguments = samples, batch_size, max(0, world - 2), world
    context = multiprocessing.get_context("spawn")
    setting = {"samples": samples, "batch_size": batch_size, "world": world}
    rows = []
    for kind in MAKERS:
        with context.Pool(1) as pool:
            rows.append({"kind": kind, **setting, **pool.apply(costs, (kind, arguments))})
    return rows
