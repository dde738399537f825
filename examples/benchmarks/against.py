"""Is anything slower than in another checkout? Steps of both, in turn, each in its own process.

    git worktree add ../old COMMIT && (cd ../old && python -m venv .venv && ...)  # install it there
    python examples/benchmarks/against.py ../old --python ../old/.venv/bin/python
    python examples/benchmarks/against.py ../old --python ... --cells b,loader,import --repeats 9

Cells: the models of overhead.py (a to e), a measured step over a plain one; `wrap`, a small network
trained through wrap() with each measurement plan; `loader`, passes over a loader; `import`, that of
adabatch after torch. The last column is this checkout's figure over the other's, of turns of .3 s
that follow each other: the median and the 90 % interval of the median. A checkout runs its own
benchmark files.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
LETTERS = "abcde"
METHODS = ("Exact", "Budget")
LOADERS = [f"{kind}/{workers}/{size}" for kind in ("cheap", "drawn", "costly") for workers in (0, 2)
           for size in (16, 256)]
PLANS = ("default", "exact", "Scheduled")
IMPORT = ("import torch, time; t = time.perf_counter(); import adabatch; "
          "print(time.perf_counter() - t)")


def overhead_cell(letter: str, method: str) -> Callable[[], float]:
    """A step over a plain one of the same process (Budget: the mean over a period of its plan)."""
    from methods import METHODS as EVERY
    from models import WORKLOADS
    from overhead import seconds

    (model, batch), (plain_model, _) = (WORKLOADS[letter].setting() for _ in range(2))
    measured = EVERY[method](WORKLOADS[letter], model)
    plain = EVERY["Plain"](WORKLOADS[letter], plain_model)
    for _ in range(2):
        plain.step(batch), measured.step(batch)

    def ratio() -> float:
        before = seconds(plain, batch)
        spent = measured.cycle(batch, seconds)
        return 2 * spent / (before + seconds(plain, batch))

    return ratio


def wrap_cell(plan: str) -> Callable[[], float]:
    """Seconds per step of a loop of 200 steps at batches of 16, as the README writes it."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import adabatch

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = TensorDataset(torch.randn(3200, 64), torch.randint(0, 10, (3200,)))
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    options: dict = {"batch_sizes": (16, 16)}
    if "measure" in inspect.signature(adabatch.wrap).parameters:
        options |= {"exact": {"measure": "all"}}.get(plan, {})
    else:  # version 0.1
        options = {"min_batch_size": 16, "max_batch_size": 16}
        options |= {"exact": {"overhead": None}}.get(plan, {})
    if plan == "Scheduled":
        from adabatch import schedules

        manager = getattr(schedules, "VirtualBatchSize", None) or schedules.HeldBatchSize
        schedule = schedules.StepBS(None, step_size=10**9, batch_size_manager=manager(16))
        options["controller"] = adabatch.controllers.Scheduled(schedule)
    optimizer, loader, scheduler = adabatch.wrap(model, optimizer, loader, **options)

    def epoch() -> float:
        begin = time.perf_counter()
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
        return (time.perf_counter() - begin) / 200

    epoch()
    return epoch


def loader_cell(name: str, changing: bool) -> Callable[[], float]:
    """Seconds of one pass over about .4 s of samples."""
    from itertools import cycle

    from loader import CHANGES, KINDS, pass_through

    import adabatch

    kind, workers, size = name.split("/")
    samples = max(4 * int(size), int(0.4 / KINDS[kind].seconds))
    loader = adabatch.AdaptiveDataLoader(
        KINDS[kind](samples), int(size), shuffle=True, num_workers=int(workers),
        persistent_workers=int(workers) > 0)
    sizes = [max(1, round(int(size) * change)) for change in (CHANGES if changing else (1,))]
    pass_through(loader, cycle(sizes))
    return lambda: pass_through(loader, cycle(sizes))


def import_cell() -> Callable[[], float]:
    return lambda: float(subprocess.check_output([sys.executable, "-c", IMPORT]))


def typical(cell: Callable[[], float]) -> float:
    """The median of as many runs as fit into .3 s: the other process's caches and waiting threads
    are in the way of the first ones."""
    found: list[float] = []
    end = time.perf_counter() + 0.3
    while not found or time.perf_counter() < end:
        found.append(cell())
    return sorted(found)[len(found) // 2]


def serve() -> None:
    """Read names of cells, answer with the seconds of one run of each."""
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    cells: dict[str, Callable[[], float]] = {}
    makers = {"overhead": overhead_cell, "wrap": wrap_cell, "loader": loader_cell,
              "import": import_cell}
    for line in sys.stdin:
        kind, *arguments = line.split()
        if line not in cells:
            cells.clear()  # one at a time: memory
            if kind == "loader":
                cells[line] = loader_cell(arguments[0], arguments[1] == "changing")
            else:
                cells[line] = makers[kind](*arguments)
        print(f"seconds {typical(cells[line])}", flush=True)


class Checkout:
    """A process that runs cells in a checkout."""

    def __init__(self, tree: Path, python: str, threads: int):
        search = os.pathsep.join([str(tree / "examples/benchmarks"), str(tree)])
        self.process = subprocess.Popen(
            [python, str(HERE / "against.py"), "--serve", str(threads)], cwd="/",
            env={**os.environ, "PYTHONPATH": search}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)

    def run(self, cell: str) -> float:
        """Seconds of one run of the cell."""
        self.process.stdin.write(cell + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the process of the checkout ended in {cell}")


def cells_of(name: str) -> list[str]:
    if name in LETTERS:
        return [f"overhead {name} {method}" for method in METHODS]
    if name == "wrap":
        return [f"wrap {plan}" for plan in PLANS]
    if name == "loader":
        return [f"loader {cell} {size}" for cell in LOADERS for size in ("constant", "changing")]
    return [name]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        sys.path.remove(str(HERE))  # its own benchmark files come from PYTHONPATH
        return serve()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--python", required=True, help="the interpreter that it is installed in")
    parser.add_argument("--cells", default="a,b,c,d,e,wrap,loader,import")
    parser.add_argument("--repeats", type=int, default=21, help="pairs of each cell (default 21)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from report import median_interval

    own = Checkout(HERE.parents[1], sys.executable, options.threads)
    other = Checkout(options.other.resolve(), options.python, options.threads)
    print(f"{'cell':<28} {'figure':>9} {'new/old':>8} (90 % interval of the median)")
    for cell in [cell for name in options.cells.split(",") for cell in cells_of(name)]:
        own.run(cell), other.run(cell)
        ratios, times = [], []
        for repeat in range(options.repeats):
            if repeat % 2:
                before, after = other.run(cell), own.run(cell)
            else:
                after, before = own.run(cell), other.run(cell)
            times.append(after)
            ratios.append(after / before)
        found = median_interval(ratios)
        print(f"{cell:<28} {sorted(times)[len(times) // 2]:>9.3g} {found['median']:>8.3f} "
              f"({found['low']:.3f} to {found['high']:.3f})", flush=True)


if __name__ == "__main__":
    main()
