"""The benchmark's figures: medians with their interval, and the Markdown table."""

from __future__ import annotations

import math

HEADER = ("method", "step, ms", "time / plain", "model", "90 % interval", "min to max",
          "extra peak memory", "relative error")


def median_interval(values: list[float], level: float = 0.9) -> dict[str, float]:
    """Median, its interval by the sign test (for any distribution), minimum and maximum.

    The interval is [x_(k), x_(n+1−k)] with the largest k for which P(Binomial(n, ½) < k) <=
    (1 − level)/2; with too few values, the whole range.

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        {'median': 3.0, 'low': 1.0, 'high': 5.0, 'min': 1.0, 'max': 5.0}
    """
    ordered = sorted(values)
    count = len(ordered)
    rank, below = 0, 0.0
    while rank < count:
        below += math.comb(count, rank) / 2**count
        if below > (1 - level) / 2:
            break
        rank += 1
    rank = max(rank, 1)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return {"median": middle, "low": ordered[rank - 1], "high": ordered[count - rank],
            "min": ordered[0], "max": ordered[-1]}


def table(results: list[dict]) -> str:
    """A Markdown table for each model; peers that were skipped are named below it."""
    parts = []
    for result in results:
        found = lines([*HEADER], [_cells(row) for row in result["rows"]])
        found += "".join(
            f"\nskipped: {name} ({reason})\n" for name, reason in result["skipped"].items())
        parts.append(f"**{result['model']}: {result['title']}**\n\n{found}")
    return "\n".join(parts)


def summary(results: list[dict]) -> str:
    """Ratios to the plain step: a row for each method, a column for each model."""
    titles = list(dict.fromkeys(row["title"] for result in results for row in result["rows"][1:]))
    by_model = [{row["title"]: row for row in result["rows"]} for result in results]
    rows = [[title, *(_ratio(rows.get(title)) for rows in by_model)] for title in titles]
    named = [f"- {result['model']}: {result['title']}" for result in results]
    return "\n".join([lines(["", *(result["model"] for result in results)], rows), *named]) + "\n"


def lines(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(lines(["", "a"], [["b", "1"]]), end="")
        |  | a |
        | --- | --- |
        | b | 1 |
    """
    return "\n".join(_line(row) for row in [head, ["---"] * len(head), *rows]) + "\n"


def _ratio(row: dict | None) -> str:
    return "—" if row is None else f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict) -> list[str]:
    memory = ("" if row.get("extra_mb") is None
              else f"{row['extra_mb']:+.0f} MB ({100 * row['extra_share']:+.0f} %)")
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    extent = f"{row['min']:.2f} to {row['max']:.2f}"
    model = "" if row.get("predicted") is None else f"{1 + row['predicted']:.3f}"
    return [row["title"], f"{row['ms']:.1f}", f"{row['median']:.3f}", model, interval, extent,
            memory, error]
