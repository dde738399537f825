"""Peak memory of one training step.

On Linux: the peak of the resident set, reset by /proc/self/clear_refs before the step.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: not a part of the step's memory
from methods import OURS
from models import Workload

WARM_UP = 3


def peak_memory(work: Workload, method: Callable[..., Any], device: str) -> dict[str, float]:
    """Bytes in use before the model was made, and at the peak of a step after some to warm up.

    On a CPU one step is rehearsed on another copy first: the code that it pages in (3 MB of torch's
    library for a norm) does not count as the step's memory. On CUDA devices the bytes are those
    that torch's allocator has handed out.

    Raises:
        OSError: no /proc/self/clear_refs (not Linux), on the CPU.
    """
    if device == "cpu":
        model, batch = work.setting()
        method(work, model).step(batch)
        del model, batch
        gc.collect()
    before = 0.0 if device != "cpu" else _status("VmRSS")
    model, batch = work.setting()
    batch = tuple(tensor.to(device) for tensor in batch)
    running = method(work, model.to(device))
    running.step(batch)
    compile_ours(work, running)
    for _ in range(WARM_UP):
        running.step(batch)
    gc.collect()
    peaks = []
    for _ in range(3):
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        running.step(batch)
        peaks.append(
            _status("VmHWM") if device == "cpu" else float(torch.cuda.max_memory_allocated()))
    return {"before": before, "peak": sorted(peaks)[1]}


def compile_ours(work: Workload, method: Any) -> None:
    """Compile a method's further steps, if the workload is compiled and the method is the plain
    step or one of ours.

    Between models that differ only in their hooks the compiler must look at the hooks, or it would
    run one by the other's code.
    """
    if work.compiled and type(method) in OURS:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        method.model.compile()


def _status(field: str) -> float:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))
