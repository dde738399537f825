"""Everything that has to be measured on a GPU, in one run of under ten minutes: the kernels, and
whole training steps with and without measurement.

    python examples/benchmarks/gpu.py                       # on the GPU; results go to --out
    python examples/benchmarks/gpu.py --device cpu --quick  # tries the script, in a minute

1. The table of kernels.py, errors against float64 among it.
2. Steps of a GPT-2-small-like model (compiled), a ResNet-50-like and a ViT-S-like one, all under
   bfloat16 autocast: plain, all samples measured, and what measure=0.05 chooses (its whole cycle:
   a measured step and those up to the next one). Plain and measured steps follow each other; the
   ratio is the median over pairs, with its 90 % interval.
3. compute-sanitizer over small cases of every kernel, where it is on the path.

Each part is a process with a time limit, so that a fault, a hang or a slow compiler costs no more
than that part: what it had found until then is reported, and the rest runs. Its output goes to a
.log in --out. gpu.json and gpu.md are written after each part, and list what there was no time for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_steps import MODELS, compare, setting_of
from report import _line

# kernels.py in this folder, loaded by its path: the name `kernels` belongs to another package.
_PATH = Path(__file__).with_name("kernels.py")
_spec = importlib.util.spec_from_file_location("kernel_benchmark", _PATH)
kernel_benchmark = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = kernel_benchmark
_spec.loader.exec_module(kernel_benchmark)

KERNELS_SHARE = 0.4  # of the time
# Seconds of 540 kept for a part by those before it.
RESERVED = {"gpt": 45, "cnn": 45, "vit": 45, "sanitizer": 60}
TO_FINISH = 20  # seconds of 540 from the last start of anything to the limit
# The goals.
RATIO, SHARE, ERRORS = 1.25, 0.8, {"bfloat16": 1e-2, "float32": 1e-4}
STEP = {"all samples": 1.10, "measure=0.05": 1.03}


# -- a part, in its process


def run_part(options: argparse.Namespace) -> None:
    """Run one part, writing what it has found so far to --out / part.json again and again."""
    end = time.monotonic() + options.seconds

    def save(result: object) -> None:
        path = options.out / f"{options.part}.json"
        path.with_suffix(".new").write_text(json.dumps(result))
        path.with_suffix(".new").replace(path)

    if options.part == "kernels":
        target = (options.device, options.small)
        save(kernel_benchmark.run(*target, lambda: time.monotonic() > end, save, options.first))
        return
    # The measured model is a copy of the plain one: without guards on hooks torch.compile would run
    # it by the plain one's code, without taps.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    setting = setting_of(options.part, options.device, options.small)

    def save_rows(rows: list[dict]) -> None:
        save({"title": setting[0], "rows": rows})

    compare(setting, options.device, options.repeats, end, save_rows)


def start_part(name: str, limit: float, options: argparse.Namespace, first: int = 0) -> dict:
    """The part's result, with "problem" where it did not end well."""
    path, log = options.out / f"{name}.json", options.out / f"{name}.log"
    path.unlink(missing_ok=True)
    soft = max(1.0, limit - TO_FINISH * options.seconds / 540)
    given = {
        "part": name, "device": options.device, "repeats": options.repeats, "seconds": soft,
        "out": options.out, "first": first,
    }
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in given.items())]
    command += ["--quick"] * options.small
    with log.open("w") as output:
        problem = ended(command, limit, output)
    result = json.loads(path.read_text()) if path.exists() else {}
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        last = [line for line in lines if line.strip()][-1:]
        result["problem"] = f"{problem}; last line of {log}: {' '.join(last)[:300]}"
    return result


def ended(command: list[str], limit: float, output: object) -> str:
    """Run a command in a new process group, all of which is killed at the limit (seconds); returns
    what went wrong, or ''."""
    options = {"stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(command, stdout=output, **options)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit:.0f} s"
    return f"exit status {status}" if status else ""


# -- all parts


def kernels(limit: float, options: argparse.Namespace) -> dict:
    """The rows of kernels.py; after a case whose fault ended the process, a new one continues with
    the next case."""
    found: dict = {"peaks": {}, "rows": [], "left_out": []}
    end, first = time.monotonic() + limit, 0
    while first is not None and end - time.monotonic() > TO_FINISH * options.seconds / 540:
        result = start_part("kernels", end - time.monotonic(), options, first)
        found["peaks"] = found["peaks"] or result.get("peaks", {})
        if "problem" in result:
            found["problem"] = result["problem"]
        for name in ("rows", "left_out"):
            found[name] += result.get(name, [])
        after = result.get("next")
        # A process that returned has counted the case that broke it; one that died has not.
        first = after + 1 if after is not None and "problem" in result else after
    return found


def sanitize(limit: float, options: argparse.Namespace) -> str:
    """compute-sanitizer's verdict on small cases of every kernel, or why there is none."""
    if options.device != "cuda":
        return "not run: no GPU"
    if shutil.which("compute-sanitizer") is None:
        return "not run: compute-sanitizer is not on the path"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7", sys.executable]
    command += [str(_PATH), "--device", "cuda", "--quick", "--deterministic"]
    command += ["--out", str(options.out / "sanitizer")]
    log = options.out / "sanitizer.log"
    with log.open("w") as output:
        problem = ended(command, limit, output)
    return f"{problem}: {log.read_text(errors='replace')[-300:]}" if problem else "clean"


def machine(device: str) -> dict[str, str]:
    """Device and versions."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    found["command"] = " ".join(["python", *sys.argv])
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError as error:
            found["triton"] = f"none ({error})"
    return found


def main(arguments: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, also for ROCm, or cpu (default cuda)")
    add("--quick", "--small", dest="small", action="store_true", help="tiny cases, for a try")
    add("--repeats", type=int, default=21, help="steps of each way, at most (default 21)")
    add("--seconds", type=float, default=540, help="limit of the whole run (default 540)")
    add("--out", type=Path, default=Path("out/gpu"), help="results (default out/gpu)")
    add("--part", choices=("kernels", *MODELS), help=argparse.SUPPRESS)
    add("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick tries the script without one")
    if options.part:
        run_part(options)
        return
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(options.device), "steps": {}}

    def left(*later: str) -> float:
        """Seconds that are left without those reserved for the parts named."""
        reserved = sum(RESERVED[name] for name in later) * options.seconds / 540
        return begin + options.seconds - time.monotonic() - reserved

    def done(part: str) -> None:
        result["seconds"] = round(time.monotonic() - begin)
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
        (options.out / "gpu.md").write_text(report(result))
        print(f"{part} done after {result['seconds']} s", flush=True)

    limit = min(KERNELS_SHARE * options.seconds, left(*RESERVED))
    result["kernels"] = kernels(limit, options)
    done("kernels")
    for number, name in enumerate(MODELS):
        limit = left(*MODELS[number + 1 :], "sanitizer")
        no_time = {"problem": "left out: no time"}
        result["steps"][name] = start_part(name, limit, options) if limit > 5 else no_time
        done(name)
    result["sanitizer"] = sanitize(max(5.0, left()), options)
    done("sanitizer")
    print(report(result))


# -- the report


def found_of(result: dict) -> list[tuple[str, str, str]]:
    """(goal, what was found, whether it is met) of each figure that there is."""
    rows = [row for row in result.get("kernels", {}).get("rows", []) if "failed" not in row]
    found: list[tuple[str, str, bool]] = []

    def judge(goal: str, value: float, form: str, met: bool) -> None:
        found.append((goal, format(value, form), met))

    for row in rows:
        if row["kernel"] == "weight_grad_moments" and "T=2048" in row["case"]:
            ratio = row["ms"] / row["weight_grad"]
            goal = f"weight_grad_moments over torch's weight gradient, {row['case']}"
            judge(f"{goal}: at most {RATIO}", ratio, ".2f", ratio <= RATIO)
    if shares := [row["share"] for row in rows if row["unit"] == "B/s"]:
        goal = f"memory-bound kernels, least share of a copy's bandwidth: at least {SHARE:.0%}"
        judge(goal, min(shares), ".0%", min(shares) >= SHARE)
    for kind, most in ERRORS.items():
        if errors := [row["error"] for row in rows if kind in row["case"]]:
            goal = f"largest error of {kind} against float64: at most {most:g}"
            judge(goal, max(errors), ".1e", max(errors) <= most)
    for row in result["steps"].get("gpt", {}).get("rows", []):
        for way, most in STEP.items():
            if row["way"].startswith(way) and "failed" not in row:
                goal = f"GPT's step over a plain one, {way}: at most {most}"
                judge(goal, row["median"], ".3f", row["median"] <= most)
    if "sanitizer" in result:
        verdict = result["sanitizer"]
        found.append(("compute-sanitizer: clean", verdict, verdict == "clean"))
    return [(goal, value, "yes" if met else "no") for goal, value, met in found]


def report(result: dict) -> str:
    """Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    parts = [f"{machine}; {result.get('seconds', 0)} s in total\n"]
    parts.append(_table(["goal", "found", "met"], found_of(result)))
    named = {"kernels": result.get("kernels", {}), **result["steps"]}
    parts += [f"{name}: {part['problem']}\n" for name, part in named.items() if "problem" in part]
    if "kernels" in result:
        peaks = result["kernels"]["peaks"].items()
        units = {"copy": "TB/s"}
        peak = (f"{key} {value / 1e12:.3g} {units.get(key, 'TFLOP/s')}" for key, value in peaks)
        parts += [f"Peaks: {', '.join(peak)}\n", kernel_benchmark.table(result["kernels"]["rows"])]
        parts += [f"left out: {title}\n" for title in result["kernels"]["left_out"]]
    header = ["measured", "step, ms", "time / plain", "90 % interval", "variance trace"]
    for name, part in result["steps"].items():
        parts.append(f"**{part.get('title', name)}**\n")
        if rows := [_step_cells(row) for row in part.get("rows", [])]:
            parts.append(_table(header, rows))
    return "\n".join(parts)


def _step_cells(row: dict) -> list[str]:
    if "failed" in row:
        return [row["way"], f"failed: {row['failed']}", "", "", ""]
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    return [row["way"], f"{row['ms']:.2f}", f"{row['median']:.3f}", interval, f"{row['trace']:.4g}"]


def _table(header: list[str], rows: list) -> str:
    cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(map(_line, [header, ["---"] * len(header), *cells])) + "\n"


if __name__ == "__main__":
    main()
