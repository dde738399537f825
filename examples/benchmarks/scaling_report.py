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
    return _figures(figures, "+.2%", "+.1%")


def _ratio(figures: dict[str, float]) -> str:
    return _figures(figures, ".3f", ".2f")


def _figures(figures: dict[str, float], fine: str, coarse: str) -> str:
    """median (interval; minimum to maximum)."""
    median, low, high = (format(figures[name], fine) for name in ("median", "low", "high"))
    least, most = (format(figures[name], coarse) for name in ("min", "max"))
    return f"{median} ({low} to {high}; {least} to {most})"


def _steps(found: dict[str, Any]) -> str:
    setting = found["setting"]
    header = ["processes", "DDP step, ms", "each for itself / DDP", "all processes / DDP"]
    header += ["distributed part / DDP", "of it in scheduler.step", "doubles"]
    rows = [
        [
            *(str(row["world"]), f"{row['plain_ms']:.1f}"),
            *(_ratio(row["local"]), _ratio(row["whole"])),
            *(_percent(row["distributed"]), _percent(row["settled"]), str(row["doubles"])),
        ]
        for row in found["steps"]
    ]
    return f"""## Measured: a step

{setting["title"]} on each process, {found["parameters"]:,} parameters; gloo,
{setting["cores"]} cores, torch {setting["torch"]}, {setting["threads"]} thread(s) a process,
{setting["rounds"]} rounds; of each step the slowest process. Median (90 % interval of it;
minimum to maximum).
Every sample is measured at every step.

The distributed part is the step over all processes less that of each for itself, as a share of the
DDP step; the aim for model d on 2 processes is 2 % at most. The next column is scheduler.step
alone, begun together by all processes ({setting["settled"]} rounds): the vector and its sum,
without the wait for a process that is still busy. "doubles" are the vector's. One process has no
distributed part: its row shows the noise. More processes than cores wait for each other's turns.

{table(header, rows)}
"""


def _constants(name: str, fit: dict[str, Any]) -> list[str]:
    flat = not math.isfinite(fit["bandwidth"])
    bandwidth = f"{fit['bandwidth'] / 1e9:.3g} ± {fit['bandwidth_error'] / 1e9:.2g}"
    bandwidth = "infinite: no growth with L seen" if flat else bandwidth
    latency = f"{fit['latency'] * 1e6:.1f} ± {fit['latency_error'] * 1e6:.1f}"
    return [name, latency, bandwidth, f"{fit['spread']:.1%}"]


def _all_reduces(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return "## Fitted\n\nNo fit: too few all-reduces (it needs two processes or more).\n"
    names = list(found["fits"])
    constants = [_constants(f"{name}, all runs", fit) for name, fit in found["fits"].items()]
    if found["fits_with_a_core_each"] != found["fits"]:
        fits = found["fits_with_a_core_each"].items()
        constants += [_constants(f"{name}, a core each", fit) for name, fit in fits]
    rows = [
        [
            *(str(point["world"]), str(point["length"])),
            "{:.0f} ({:.0f} to {:.0f})".format(*(1e6 * point[k] for k in ("median", "min", "max"))),
            *(f"{found['fits'][name]['residuals'][at]:+.1%}" for name in names),
        ]
        for at, point in enumerate(found["all_reduce"])
    ]
    header = ["processes", "doubles", "us, median of blocks (min to max)"]
    header += [f"residual, {name}, all runs" for name in names]
    return f"""## Fitted: the all-reduce alone

    t(W, L) = α·hops(W) + 2(W − 1)/W · 8L/B       hops: tree ⌈log₂ W⌉, ring 2(W − 1)

Least squares of log(measured/t) over the medians below; ± is one standard error of the fit, which
knows nothing of what the model leaves out. Gloo, which carries the vector, passes it round a ring.
Where there are more processes than cores (here {found["setting"]["cores"]}) a hop is mostly the
wait for a turn on a core, which no law of a network describes: "a core each" leaves these out.

{table(["hops", "α, us", "B, GB/s", "spread of the residuals"], constants)}

{table(header, rows)}
"""


def _share(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['seconds'] * 1e6:,.0f}", f"{row['share']:.3%}", f"{row['share_apart']:.3%}"


def _shares(title: str, rows: list[dict]) -> str:
    names = [name for name in rows[0] if name != "world"]
    columns = ("us", "share of a step", "checksum apart")
    header = ["processes", *(f"{name}: {what}" for name in names for what in columns)]
    cells = [
        [
            f"{row['world']:,}",
            *(text for name in names for text in _share(row[name])),
        ]
        for row in rows
    ]
    return f"{title}\n\n{table(header, cells)}\n"


def _extrapolation(found: dict[str, Any]) -> str:
    setting, tables = found["setting"], found["extrapolation"]
    largest = max(row["world"] for row in found["steps"])
    assumed = (
        f"**Assumed network**: {setting['latency'] * 1e6:g} us a hop, "
        f"{setting['bandwidth'] / 1e9:g} GB/s a link. These are assumptions, not measurements."
    )
    parts = [_shares(assumed, tables["assumed"])]
    if "as_here" in tables:
        here = (
            "**As if every hop were one between two processes here**: the constants fitted above, "
            "with a core each where there are such runs."
        )
        parts.append(_shares(here, tables["as_here"]))
    return f"""## Extrapolated: nothing below was run

The model's time of one vector of {found["length"]} doubles (its checksum among them) over a step of
{setting["step_seconds"]:g} s. No more than {largest} processes were run; all figures for more are
the formula's. It leaves out stragglers, congestion and the operating system, and knows one kind of
link only. The share is what a step would wait if nothing hid the sum; on accelerators it is waited
for one step later. The share of the measurement itself does not grow with the processes.

"tree" is what a library with trees (NCCL, MPI) would take, "ring" what gloo does, "two rings" two
all-reduces by rings, within groups of √W processes and across them.

"checksum apart": if the decisions were compared every {setting["check_every"]} steps in a separate
vector, rather than by 4 doubles in every vector.

{chr(10).join(parts)}"""


def _order(found: dict[str, Any]) -> str:
    def milliseconds(values: list[float]) -> str:
        middle, least, most = median_interval(values)["median"], min(values), max(values)
        return f"{1e3 * middle:.3g} ({1e3 * least:.3g} to {1e3 * most:.3g})"

    names = ("first_batch", "batch", "new_epoch", "resize", "batch_after_resize")
    header = ["", "batch of all", *(name.replace("_", " ") + ", ms" for name in names)]
    header += ["resident, MB", "allocated, MB"]
    rows = [
        [
            *(row["kind"], f"{row['batch_size']:,}"),
            *(milliseconds(row["seconds"][name]) for name in names),
            *(f"{row['resident'] / 1e6:.1f}", f"{row['allocated'] / 1e6:.1f}"),
        ]
        for row in found["order"]
    ]
    samples, world = found["order"][0]["samples"], found["order"][0]["world"]
    return f"""## Measured: the order of {samples:,} samples, one process of {world}

Median (minimum to maximum). Memory: the rise of the peak of the resident set, and the peak of what
Python and NumPy allocate. A table of the order would take {8 * samples / 1e6:,.0f} MB. "loader"
fetches and collates samples that are numbers, without workers.

{table(header, rows)}
"""


def markdown(found: dict[str, Any]) -> str:
    """The whole report."""
    return "\n".join(part(found) for part in (_steps, _all_reduces, _extrapolation, _order))
