"""The Markdown of scaling.py: what was measured, what was fitted, and what is extrapolated, apart.
"""

from __future__ import annotations

import math
from typing import Any

from report import median_interval


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _percent(figures: dict[str, float]) -> str:
    return f"{figures['median']:+.2%} ({figures['low']:+.2%} to {figures['high']:+.2%}; {figures['min']:+.1%} to {figures['max']:+.1%})"


def _ratio(figures: dict[str, float]) -> str:
    return f"{figures['median']:.3f} ({figures['low']:.3f} to {figures['high']:.3f}; {figures['min']:.2f} to {figures['max']:.2f})"


def _steps(found: dict[str, Any]) -> str:
    setting = found["setting"]
    header = ["processes", "DDP step, ms", "each for itself / DDP", "all processes / DDP", "distributed part / DDP", "of it in scheduler.step", "doubles"]
    rows = [
        [
            *(str(row["world"]), f"{row['plain_ms']:.1f}", _ratio(row["local"]), _ratio(row["whole"])),
            *(_percent(row["distributed"]), _percent(row["settled"]), str(row["doubles"])),
        ]
        for row in found["steps"]
    ]
    return f"""## Measured: a step

{setting["title"]} on each process, {found["parameters"]:,} parameters; gloo, {setting["cores"]} cores, torch {setting["torch"]},
{setting["threads"]} thread(s) a process, {setting["rounds"]} rounds; of each step the slowest process. Median (90 % interval of it; minimum to maximum).
Every sample is measured at every step.

The distributed part is the step over all processes less that of each for itself, as a share of the DDP step: asked of model d on 2 processes are 2 % at most.
The column beside it is scheduler.step alone, begun together by all processes ({setting["settled"]} rounds): the vector and its sum, without the wait for a
process that is still busy. "doubles" are the vector's. One process has no distributed part: its row shows the noise. More processes than cores wait for each
other's turns.

{table(header, rows)}
"""


def _constants(name: str, fit: dict[str, Any]) -> list[str]:
    flat = not math.isfinite(fit["bandwidth"])
    bandwidth = "infinite: no growth with L seen" if flat else f"{fit['bandwidth'] / 1e9:.3g} ± {fit['bandwidth_error'] / 1e9:.2g}"
    return [name, f"{fit['latency'] * 1e6:.1f} ± {fit['latency_error'] * 1e6:.1f}", bandwidth, f"{fit['spread']:.1%}"]


def _all_reduces(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return "## Fitted\n\nNo fit: too few all-reduces were timed (it needs two processes or more).\n"
    names = list(found["fits"])
    constants = [_constants(f"{name}, all runs", fit) for name, fit in found["fits"].items()]
    if found["fits_with_a_core_each"] != found["fits"]:
        constants += [_constants(f"{name}, a core each", fit) for name, fit in found["fits_with_a_core_each"].items()]
    rows = [
        [
            *(str(point["world"]), str(point["length"]), f"{point['median'] * 1e6:.0f} ({point['min'] * 1e6:.0f} to {point['max'] * 1e6:.0f})"),
            *(f"{found['fits'][name]['residuals'][at]:+.1%}" for name in names),
        ]
        for at, point in enumerate(found["all_reduce"])
    ]
    return f"""## Fitted: the all-reduce alone

    t(W, L) = α·hops(W) + 2(W − 1)/W · 8L/B       hops: tree ⌈log₂ W⌉, ring 2(W − 1)

Least squares of log(measured/t) over the medians below; ± is one standard error of the fit, which knows nothing of what the model leaves out. Gloo, which
carries the vector, passes it round a ring. Where there are more processes than cores (here {found["setting"]["cores"]}) a hop is mostly the
wait for a turn on a core, which no law of a network describes: "a core each" leaves these out.

{table(["hops", "α, us", "B, GB/s", "spread of the residuals"], constants)}

{table(["processes", "doubles", "us, median of blocks (min to max)", *(f"residual, {name}, all runs" for name in names)], rows)}
"""


def _shares(title: str, rows: list[dict]) -> str:
    names = [name for name in rows[0] if name != "world"]
    header = ["processes", *(f"{name}: {what}" for name in names for what in ("us", "share of a step", "checksum apart"))]
    cells = [
        [
            f"{row['world']:,}",
            *(text for name in names for text in (f"{row[name]['seconds'] * 1e6:,.0f}", f"{row[name]['share']:.3%}", f"{row[name]['share_apart']:.3%}")),
        ]
        for row in rows
    ]
    return f"{title}\n\n{table(header, cells)}\n"


def _extrapolation(found: dict[str, Any]) -> str:
    setting, tables = found["setting"], found["extrapolation"]
    largest = max(row["world"] for row in found["steps"])
    assumed = (
        f"**Assumed network**: {setting['latency'] * 1e6:g} us a hop, {setting['bandwidth'] / 1e9:g} GB/s a link. These are assumptions, not measurements."
    )
    parts = [_shares(assumed, tables["assumed"])]
    if "as_here" in tables:
        here = "**As if every hop were one between two processes here**: the constants fitted above, with a core each where there are such runs."
        parts.append(_shares(here, tables["as_here"]))
    return f"""## Extrapolated: nothing below was run

The model's time of one vector of {found["length"]} doubles (its checksum among them) over a step of {setting["step_seconds"]:g} s. No more than
{largest} processes were run; all figures for more are the formula's. It leaves out stragglers, congestion and the operating system, and knows
one kind of link only. The share is what a step would wait if nothing hid the sum; on accelerators it is waited for one step later. The share of the measurement
itself does not grow with the processes.

"tree" is what a library with trees (NCCL, MPI) would take, "ring" what gloo does, "two rings" two all-reduces by rings, within groups of √W processes and
across them.

"checksum apart": if the decisions were compared every {setting["check_every"]} steps in a vector of their own, rather than by 4 doubles in every vector.

{chr(10).join(parts)}"""


def _order(found: dict[str, Any]) -> str:
    def milliseconds(values: list[float]) -> str:
        return f"{1e3 * median_interval(values)['median']:.3g} ({1e3 * min(values):.3g} to {1e3 * max(values):.3g})"

    names = ("first_batch", "batch", "new_epoch", "resize", "batch_after_resize")
    header = ["", "batch of all", *(name.replace("_", " ") + ", ms" for name in names), "resident, MB", "allocated, MB"]
    rows = [
        [
            *(row["kind"], f"{row['batch_size']:,}", *(milliseconds(row["seconds"][name]) for name in names)),
            *(f"{row['resident'] / 1e6:.1f}", f"{row['allocated'] / 1e6:.1f}"),
        ]
        for row in found["order"]
    ]
    samples, world = found["order"][0]["samples"], found["order"][0]["world"]
    return f"""## Measured: the order of {samples:,} samples, one process of {world}

Median (minimum to maximum). Memory: the rise of the peak of the resident set, and the peak of what Python and NumPy allocate. A table of the order would take
{8 * samples / 1e6:,.0f} MB. "loader" fetches and collates samples that are numbers, without workers.

{table(header, rows)}
"""


def markdown(found: dict[str, Any]) -> str:
    """The whole report."""
    return "\n".join(part(found) for part in (_steps, _all_reduces, _extrapolation, _order))
