"""What the variance trace costs: the time of a training step that measures it over that of a plain
one, extra peak memory, and the error of the trace.

    python examples/benchmarks/overhead.py              # all models, ours and the installed peers
    python examples/benchmarks/overhead.py --models b,c --repeats 41 --peers ""
    python examples/benchmarks/overhead.py --device cuda                   # models f, g and h
    python examples/benchmarks/overhead.py --models i-r --repeats 21       # whole training loops

The peers come with pip install 'adabatch[bench]', models i to p with
transformers; what is absent, or refuses a model, is skipped, and listed with the reason.
Of models i to r a whole training loop is timed: wrap, loader, optimizer and scheduler.step, with
all samples measured, with the default, and with a schedule, which measures nothing.

All methods are interleaved in one run, so that a slow minute of the machine affects them alike;
ratios are of steps that follow each other. Memory is the peak resident set of one step, in a
separate process for each method, in which freed memory is returned to the system at once
(MALLOC_MMAP_THRESHOLD_): otherwise the heap's holes count, tens of MB more or less from one run to
the next. Writes overhead.json and overhead.md into --out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_models import GPU_WORKLOADS
from loop_models import loop_workloads
from memory import compile_ours, peak_memory
from methods import LOOPS, METHODS, OURS, PEERS, Plain
from models import WORKLOADS, Batch, Workload
from report import median_interval, summary, table
from torch import nn

EVERY = {**WORKLOADS, **GPU_WORKLOADS, **loop_workloads()}
TINY = {"layers": 1, "width": 32, "positions": 16, "samples": 4, "side": 32, "block": 4}  # --quick


def exact_trace(work: Workload, device: str = "cpu", given: Batch | None = None) -> float:
    """tr Cov of the per-sample gradients, float64, divisor m − 1, one backward pass per sample, of
    the batch `given` or the workload's own."""
    model, batch = work.setting()
    inputs, targets = given or batch
    model, inputs, targets = model.to(device).double(), inputs.to(device), targets.to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = targets.double() if targets.is_floating_point() else targets
    samples, sq_norms = len(inputs), 0.0
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for row in range(samples):
        losses = work.losses(model(inputs[row : row + 1]), targets[row : row + 1])
        grads = torch.autograd.grad(losses.sum(), parameters)
        sq_norms += sum(float(grad.square().sum()) for grad in grads)
        total = [sums + grad for sums, grad in zip(total, grads, strict=True)]
    return (sq_norms - sum(float(sums.square().sum()) for sums in total) / samples) / (samples - 1)


def start(
    work: Workload, names: list[str], device: str
) -> tuple[dict[str, Plain], dict[str, str]]:
    """Each method on its copy of the model, and the reasons of those that are missing."""
    methods, skipped = {}, {}
    model, batch = work.setting()
    batch = tuple(tensor.to(device) for tensor in batch)
    for name in names:
        own: nn.Module = copy.deepcopy(model).to(device)
        try:
            method = METHODS[name](work, own)
            method.first_trace = method.step(batch)
        except Exception as error:  # a peer that is absent or refuses must not end the run
            if name in {ours.__name__ for ours in (*OURS, *LOOPS)} - {"LoopVmap"}:
                raise
            reason = str(error).splitlines()[0] if str(error) else ""
            skipped[name] = f"{type(error).__name__}: {reason}"[:120]
        else:
            methods[name] = method
            compile_ours(work, method)
    return methods, skipped


def seconds(method: Plain, batch: tuple) -> float:
    """Of one step."""
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    method.step(batch)
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    work: Workload, names: list[str], repeats: int, device: str, with_errors: bool = True
) -> dict:
    """Times, ratios and errors of all methods on one model; the first one is the plain step."""
    if importlib.util.find_spec(work.needs) is None:
        reason = f"needs {work.needs}: pip install {work.needs}"
        return {"model": work.name, "title": work.title, "rows": [], "trace": None,
                "skipped": {"the model": reason}}
    methods, skipped = start(work, names, device)
    _, batch = work.setting()
    batch = tuple(tensor.to(device) for tensor in batch)
    truth = exact_trace(work, device) if work.alone and with_errors else None
    for method in methods.values():
        for _ in range(method.warm_up):
            seconds(method, batch)
    times: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for repeat in range(repeats):
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            times[name].append(methods[name].cycle(batch, seconds))
    rows = []
    for name, method in methods.items():
        ratios = [own / plain for own, plain in zip(times[name], times[order[0]], strict=True)]
        found, error = method.first_trace, None
        if found is not None and truth is not None:
            given = method.first_batch
            error = abs(found / (exact_trace(work, device, given) if given else truth) - 1)
        figures = {"ms": 1e3 * sorted(times[name])[repeats // 2], **median_interval(ratios),
                   "predicted": method.predicted(len(batch[0]))}
        rows.append({"method": name, "title": method.title, **figures, "error": error})
    return {"model": work.name, "title": work.title, "rows": rows, "skipped": skipped,
            "trace": truth}


def add_memory(result: dict, device: str, threads: int) -> None:
    """Peak memory of one step of each method, in a separate process."""
    for row in result["rows"]:
        command = [sys.executable, __file__, "--memory-of", row["method"],
                   "--models", result["model"], "--device", device, "--threads", str(threads)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment)
        row["memory"] = json.loads(answer.stdout) if answer.returncode == 0 else None
    plain = result["rows"][0]["memory"] if result["rows"] else None
    for row in result["rows"]:
        if plain and row["memory"]:
            own, whole = (memory["peak"] - memory["before"] for memory in (row["memory"], plain))
            row["extra_mb"], row["extra_share"] = (own - whole) / 1e6, (own - whole) / whole


def letters(text: str) -> list[str]:
    """The names of models in "a,c" or "i-r".

    Example:
        >>> letters("b,i-k")
        ['b', 'i', 'j', 'k']
    """
    found = []
    for part in text.split(","):
        first, last = part[0], part[-1]
        found += [chr(code) for code in range(ord(first), ord(last) + 1)]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="letters, such as a,c or i-r (default a to e on a CPU, "
                        "f to h elsewhere)")
    parser.add_argument("--repeats", type=int, default=41, help="steps of each method (default 41)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--peers", default=",".join(peer.__name__ for peer in PEERS),
                        help="comma-separated; '' for none")
    parser.add_argument("--quick", action="store_true",
                        help="three repeats, no memory, no peers, tiny models i to r")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--out", type=Path, default=Path("out/overhead"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    known = EVERY
    if options.quick:
        options.repeats, options.no_memory, options.peers = 3, True, ""
        known = {**EVERY, **loop_workloads(**TINY)}
    default = WORKLOADS if options.device == "cpu" else GPU_WORKLOADS
    works = [known[name] for name in (letters(options.models) if options.models else default)]
    if options.memory_of:
        print(json.dumps(peak_memory(works[0], METHODS[options.memory_of], options.device)))
        return
    ours = [method.__name__ for method in OURS]
    loops = [method.__name__ for method in LOOPS]
    peers = [name for name in options.peers.split(",") if name]
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for work in works:
        names = loops if work.loop else [*ours, *peers]
        result = measure(work, names, options.repeats, options.device)
        if not options.no_memory:
            add_memory(result, options.device, options.threads)
        results.append(result)
        print(table([result]), flush=True)
        setting = {"torch": torch.__version__, "threads": options.threads,
                   "device": options.device, "repeats": options.repeats}
        (options.out / "overhead.json").write_text(
            json.dumps({"setting": setting, "results": results}, indent=1))
        (options.out / "overhead.md").write_text(f"{table(results)}\n{summary(results)}")
    print(summary(results))


if __name__ == "__main__":
    main()
