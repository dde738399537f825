"""Everything that has to be measured on a GPU, in one run of under ten minutes: the kernels, and whole training steps with and without measurement.

    python examples/benchmarks/gpu.py                          # on the GPU; writes gpu.json and gpu.md into --out
    python examples/benchmarks/gpu.py --device cpu --small     # tries the script

1. The table of kernels.py, errors against float64 among it.
2. Steps of a GPT-2-small-like model (compiled), a ResNet-50-like and a ViT-S-like one, all under bfloat16 autocast: plain, all samples measured, and what
   overhead=0.05 chooses (its whole cycle: a measured step and those up to the next one). Plain and measured steps follow each other; the ratio is the median
   over pairs, with its 90 % interval.
3. compute-sanitizer over small cases of every kernel, where it is on the path.
What there was no time for is listed as left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_models import Vit, resnet
from models import Gpt, class_losses, token_losses
from report import _line, median_interval

import adabatch
from adabatch.grad_sample.cost import within_budget

# kernels.py beside this file, loaded by its path: the name `kernels` belongs to another package.
_spec = importlib.util.spec_from_file_location("kernel_benchmark", Path(__file__).with_name("kernels.py"))
kernel_benchmark = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = kernel_benchmark
_spec.loader.exec_module(kernel_benchmark)


def settings(device: str, small: bool) -> dict[str, tuple]:
    """{title: (model, inputs, targets, losses, compiled)}"""
    torch.manual_seed(0)
    # The measured model is a copy of the plain one: without guards on hooks torch.compile would run it by the plain one's code, taps left out.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    rows, tokens, vocabulary, size = (4, 16, 64, 32) if small else (8, 1024, 50304, 224)
    images = 4 if small else 64
    gpt = Gpt(1, 32, 2, tokens, vocabulary) if small else Gpt(12, 768, 12, tokens, vocabulary)
    ids = torch.randint(vocabulary, (2, rows, tokens), device=device)
    pictures, classes = torch.randn(images, 3, size, size, device=device), torch.randint(1000, (images,), device=device)
    cnn, vit = (resnet((1, 1), 8), Vit(1, 32, 2, size)) if small else (resnet(), Vit(12, 384, 6, size))
    return {
        f"GPT-2-small-like, N={rows}, T={tokens}, compiled": (gpt, *ids, token_losses, True),
        f"ResNet-50-like, N={images}": (cnn, pictures.contiguous(memory_format=torch.channels_last), classes, class_losses, False),
        f"ViT-S-like, N={images}": (vit, pictures, classes, class_losses, False),
    }


class Steps:
    """Training steps of a copy of the model that measure nothing, all samples, or what a budget allows.

    Args:
        setting: of settings().
        device: where to train.
        measured: whether the copy carries hooks.
        overhead: the share that measuring may cost; None: all samples at every step. It is planned by the shapes of a first step, which is not compiled.
    """

    def __init__(self, setting: tuple, device: str, measured: bool, overhead: float | None = None):
        model, self.inputs, self.targets, self.losses, compiled = setting
        self.model, self.device, self.every, self.samples = copy.deepcopy(model).to(device), device, 1, len(self.inputs)
        self.hooks = adabatch.GradSampleHooks(self.model, capacity=self.samples) if measured else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.forward: Callable = self.model
        if overhead is not None:
            self.step()
            plan = within_budget(self.hooks.cost(), self.samples, overhead)
            self.hooks.samples, self.every = plan.samples, plan.every
            self.samples = plan.samples or self.samples
        self.forward = torch.compile(self.model) if compiled else self.model

    def step(self) -> float:
        """One step; the trace, 0 where nothing was measured."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.losses(self.forward(self.inputs), self.targets).mean()
        loss.backward()
        self.optimizer.step()
        return self.hooks.collect().variance_trace if self.hooks and self.hooks.enabled else 0.0

    def cycle(self) -> float:
        """Milliseconds a step, the mean over a measured one and those up to the next one."""
        spent = 0.0
        for step in range(self.every):
            if self.hooks:
                self.hooks.enabled = step == 0
            spent += _once(self.step)
        if self.hooks:
            self.hooks.enabled = True
        return spent / self.every


def compare(setting: tuple, device: str, repeats: int, end: float) -> list[dict]:
    """Rows of one model; fewer repeats, but five at least, where time is short."""
    steps = {"plain": Steps(setting, device, False), "all samples": Steps(setting, device, True), "overhead=0.05": Steps(setting, device, True, 0.05)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    traces = {name: each.step() for name, each in steps.items()}
    for each in steps.values():
        each.cycle()
        each.step()
    for repeat in range(repeats):
        if repeat >= 5 and time.monotonic() > end:
            break
        for name, each in steps.items():
            times[name].append(each.cycle())
    rows = []
    for name, each in steps.items():
        ratios = [own / plain for own, plain in zip(times[name], times["plain"], strict=True)]
        way = name if name == "plain" else f"{name}: {each.samples} samples at one step in {each.every}"
        rows.append({"way": way, "ms": sorted(times[name])[len(ratios) // 2], "trace": float(traces[name]), **median_interval(ratios)})
    return rows


def _once(step: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return 1e3 * (time.perf_counter() - begin)


def sanitize(seconds: float, out: Path) -> str:
    """compute-sanitizer's verdict on small cases of every kernel, or why there is none."""
    if shutil.which("compute-sanitizer") is None:
        return "not run: compute-sanitizer is not on the path"
    kernels = [str(Path(__file__).with_name("kernels.py")), "--device", "cuda", "--small", "--deterministic", "--out", str(out)]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7", sys.executable, *kernels]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return "clean" if result.returncode == 0 else f"exit status {result.returncode}: {(result.stdout + result.stderr)[-500:]}"


def machine(device: str) -> dict[str, str]:
    """Device and versions."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "command": " ".join(sys.argv)}
    if device == "cuda":
        import triton

        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny cases")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=540, help="nothing new is begun after this long (default 540)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(options.device), "steps": {}}

    def save() -> None:
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
        (options.out / "gpu.md").write_text(report(result))

    result["kernels"] = kernel_benchmark.run(options.device, options.small, lambda: time.monotonic() > end - 0.6 * options.seconds)
    save()
    of_steps = settings(options.device, options.small)
    for index, (title, setting) in enumerate(of_steps.items()):
        if time.monotonic() > end - 60:
            result["steps"][title] = "left out: no time"
            continue
        try:
            share = (end - 60 - time.monotonic()) / (len(of_steps) - index)
            result["steps"][title] = compare(setting, options.device, options.repeats, time.monotonic() + share)
        except (RuntimeError, ValueError) as error:  # one model that fails must not cost the others
            result["steps"][title] = f"failed: {type(error).__name__}: {error}"[:500]
        print(report(result), flush=True)
        save()
    if options.device == "cuda":
        result["sanitizer"] = sanitize(max(10.0, end - time.monotonic()), options.out / "sanitizer")
    save()


def report(result: dict) -> str:
    """Markdown."""
    parts = [", ".join(f"{name} {value}" for name, value in result["machine"].items()) + "\n"]
    if "kernels" in result:
        peak = ", ".join(f"{name} {value / 1e12:.3g} T{'B/s' if name == 'copy' else 'FLOP/s'}" for name, value in result["kernels"]["peaks"].items())
        parts += [f"Peaks: {peak}\n", kernel_benchmark.table(result["kernels"]["rows"])]
        parts += [f"left out: {title}\n" for title in result["kernels"]["left_out"]]
    for title, rows in result["steps"].items():
        parts.append(f"**{title}**\n")
        if isinstance(rows, str):
            parts.append(rows + "\n")
            continue
        lines = [_line(["measured", "step, ms", "time / plain", "90 % interval", "variance trace"]), _line(["---"] * 5)]
        for row in rows:
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            lines.append(_line([row["way"], f"{row['ms']:.2f}", f"{row['median']:.3f}", interval, f"{row['trace']:.4g}"]))
        parts.append("\n".join(lines) + "\n")
    if "sanitizer" in result:
        parts.append(f"compute-sanitizer: {result['sanitizer']}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
