"""What many processes cost: the distributed part of a step, a model of it for more processes than
there are here, and the global order of a huge epoch.

    python examples/benchmarks/scaling.py      # model d, 1 to 4 gloo processes, 10⁹ samples
    python examples/benchmarks/scaling.py --processes 2 --rounds 101    # the distributed part
    python examples/benchmarks/scaling.py --latency 2e-5 --bandwidth 1e10 --step-seconds 0.5

1. A step of plain DDP, of adabatch measuring on each process for itself, and of adabatch over all
   processes: interleaved in one run, a barrier before each, ratios of steps that follow each other.
   The distributed part is the last less the one before. The all-reduce of small vectors is timed
   alone too.
2. The model of collective_model.py, fitted to these all-reduces; the share of a step it gives for
   up to 16,384 processes is extrapolation.
3. The order of 10⁹ samples as one process of eight draws it: time and memory.

Writes scaling.json and scaling.md into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from collective_model import FITTED, Fit, fit, shares
from gang import MODELS, Plan, run
from global_order import measure
from report import median_interval
from scaling_report import markdown

EXTRAPOLATED = [2**power for power in range(3, 15)]
NOMINAL_LENGTH = 20  # doubles of a step's vector with one parameter group, where no run has told


def step_figures(result: dict) -> dict[str, Any]:
    """Medians of what `gang.run` timed: steps as ratios to the plain step, differences as shares of
    it."""
    plain, local, whole = (result["steps"][name] for name in ("Plain", "Local", "Whole"))
    middle = median_interval(plain)["median"]
    steps = list(zip(whole, local, plain, strict=True))
    tells = zip(result["settled"]["Whole"], result["settled"]["Local"], strict=True)
    return {
        "world": result["world"],
        "doubles": result["length"],
        "plain_ms": 1e3 * middle,
        "local": median_interval([own / base for own, base in zip(local, plain, strict=True)]),
        "whole": median_interval([own / base for own, base in zip(whole, plain, strict=True)]),
        "distributed": median_interval([(own - without) / base for own, without, base in steps]),
        "settled": median_interval([(own - without) / middle for own, without in tells]),
    }


def all_reduces(results: list[dict]) -> list[dict]:
    """Times of the all-reduces alone, by number of processes and length."""
    return [
        {"world": result["world"], "length": int(length), **median_interval(seconds)}
        for result in results for length, seconds in result["all_reduce"].items()
    ]


def fits_of(points: list[dict], most: float = math.inf) -> dict[str, Fit]:
    """The model fitted to the medians of `all_reduces` with at most `most` processes; nothing
    where there are too few."""
    fits = {}
    used = [(each["world"], each["length"], each["median"]) for each in points]
    used = [each for each in used if each[0] <= most]
    for name in FITTED:
        try:
            fits[name] = fit(used, name)
        except ValueError:
            continue
    return fits


def extrapolations(
    options: argparse.Namespace, length: int, fits: dict[str, Fit]
) -> dict[str, list[dict]]:
    """Shares of a step with the network that is assumed, and as if every link were like those
    between the processes here."""
    common = {"step": options.step_seconds, "check_every": options.check_every}

    def rows(link: argparse.Namespace | Fit) -> list[dict]:
        constants = {"latency": link.latency, "bandwidth": link.bandwidth}
        return shares(EXTRAPOLATED, length, **constants, **common)

    tables = {"assumed": rows(options)}
    if fits:
        by_name = {name: rows(found) for name, found in fits.items()}
        tables["as_here"] = [
            {"world": world, **{name: found[at][name] for name, found in by_name.items()}}
            for at, world in enumerate(EXTRAPOLATED)
        ]
    return tables


def finite(value: Any) -> Any:
    """For JSON, which has no infinity: None in place of what is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", choices=MODELS, help="of the speed table, or 'small' (default d; quick: small)")
    add("--processes", help="numbers of processes, comma-separated (default 1,2,3,4; quick: 2)")
    add("--rounds", type=int, help="steps of each method, at least 7 (default 11; quick: 7)")
    add("--threads", type=int, default=1, help="torch's threads of each process (default 1)")
    add("--latency", type=float, default=5e-6, help="seconds per hop to assume (default 5e-6)")
    add("--bandwidth", type=float, default=25e9, help="bytes/s of a link to assume (default 25e9)")
    add("--step-seconds", type=float, default=0.2, help="of a step to assume (default 0.2)")
    add("--check-every", type=int, default=50,
        help="steps between checks of the decisions, if these had their own vector (default 50)")
    add("--samples", type=int, default=10**9, help="of the epoch whose order is drawn (10⁹)")
    add("--quick", action="store_true", help="a small model, two processes, few rounds")
    add("--out", type=Path, default=Path("out/scaling"))
    options = parser.parse_args(arguments)
    options.model = options.model or ("small" if options.quick else "d")
    options.rounds = options.rounds or (7 if options.quick else 11)
    processes = options.processes or ("2" if options.quick else "1,2,3,4")
    options.processes = [int(world) for world in processes.split(",")]
    if options.rounds < 7 or min(options.processes) < 1:
        parser.error("--rounds must be at least 7, and --processes at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    lengths = tuple(2**power for power in range(3, 13, 3 if options.quick else 1))
    plan = Plan(
        model=options.model,
        rounds=options.rounds,
        settled=max(7, options.rounds // 3),
        lengths=lengths,
        blocks=7,
        calls=20 if options.quick else 50,
        threads=options.threads,
    )
    setting = {"torch": torch.__version__, "cores": os.cpu_count(), **vars(options)}
    setting |= {"out": str(options.out), "title": MODELS[options.model].title}
    setting |= {"settled": plan.settled, "blocks": plan.blocks, "calls": plan.calls}
    found: dict[str, Any] = {"setting": setting}
    results = []
    for world in options.processes:
        results.append(run(world, plan))
        found["steps"] = [step_figures(result) for result in results]
        print(f"{world} processes: {found['steps'][-1]}", flush=True)
    points = all_reduces(results)
    fits, undisturbed = fits_of(points), fits_of(points, os.cpu_count() or 1)
    length = max([result["length"] for result in results]) or NOMINAL_LENGTH
    found |= {"parameters": results[0]["parameters"], "length": length, "all_reduce": points}
    for key, these in (("fits", fits), ("fits_with_a_core_each", undisturbed)):
        found[key] = {name: asdict(each) for name, each in these.items()}
    found["extrapolation"] = extrapolations(options, length, undisturbed or fits)
    # A batch of 4,096 of all eight processes, and one of 4,096 on each.
    sizes = (4096,) if options.quick else (4096, 8 * 4096)
    found["order"] = [row for size in sizes for row in measure(options.samples, size, 8)]
    (options.out / "scaling.json").write_text(json.dumps(finite(found), indent=1))
    report = markdown(found)
    (options.out / "scaling.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
