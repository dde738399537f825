"""CheckReport: what adabatch.check found, as rows, as layouts for the hooks, and as a table to read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from adabatch.grad_sample.layout import BatchSizeSource, Layout

STATUSES = ("exact", "contribution", "refused")

_HEAD = ("layer", "type", "rule", "parameters", "layout", "variance", "cost", "error", "status")
_TEXT = (0, 1, 2, 4, 8)


@dataclass
class CheckRow:
    """One layer that owns trainable parameters.

    Attributes:
        name: its name in the model, '' for the model itself.
        type: its class.
        rule: 'rule' (a registered one), 'generic' (the vjp of the layer's own forward pass), 'none' (it cannot be measured).
        n_parameters: trainable ones; a shared parameter counts with the first layer that uses it.
        layout: which rows belong to which sample; None where no layout was found or no gradient came.
        variance_share: the layer's part of the variance trace Σ_i ‖g_i − ḡ‖² / (n − 1) of the samples compared, in [0, 1].
        cost: of its norms relative to its own weight gradient, an estimate; NaN where not known.
        error: of the taps' squared norms ‖g_i‖² relative to exact ones, the largest over samples and parameters; NaN where not compared.
        status: 'exact' (per-sample gradients), 'contribution' (the layer's part of what sample i adds to the gradient of the batch: train-mode batch norm makes
            samples depend on each other), 'refused'.
        reason: why it is refused, or a remark.
    """

    name: str
    type: str
    rule: str
    n_parameters: int
    layout: Layout | None
    variance_share: float = math.nan
    cost: float = math.nan
    error: float = math.nan
    status: str = "exact"
    reason: str = ""

    def refuse(self, reason: str) -> None:
        """Set the status to refused; the first reason stays."""
        if self.status != "refused":
            self.status, self.reason = "refused", reason


@dataclass
class CheckReport:
    """The result of adabatch.check; hand it to GradSampleHooks(layout=report) or wrap(layout=report).

    Attributes:
        rows: one CheckRow per layer that owns trainable parameters, in the order of model.named_modules().
        batch_size_source: where the model's inputs count the samples; None if that was not found.
        n_samples: samples used for the layouts.
        n_compared: samples compared with a backward pass each; the variance shares are over these.
        notes: what concerns no layer in particular.

    Example:
        >>> report = CheckReport([CheckRow("fc", "Linear", "rule", 6, Layout("batch_second"))], BatchSizeSource(0, "inputs", (), 1), 8, 4)
        >>> report.ok, report.layouts["fc"].value, str(report.batch_size_source)
        (True, 'batch_second', 'inputs.shape[1]')
    """

    rows: list[CheckRow]
    batch_size_source: BatchSizeSource | None
    n_samples: int
    n_compared: int
    notes: list[str] = field(default_factory=list)

    @property
    def layouts(self) -> dict[str, Layout]:
        """{layer's name: its layout}, where one was found."""
        return {row.name: row.layout for row in self.rows if row.layout is not None}

    @property
    def refused(self) -> dict[str, str]:
        """{layer's name: why}, of the refused layers."""
        return {row.name: row.reason for row in self.rows if row.status == "refused"}

    @property
    def ok(self) -> bool:
        """Whether every layer can be measured, exactly or as contributions, and nothing else stands in the way."""
        return not self.refused and not self.notes

    def __getitem__(self, name: str) -> CheckRow:
        """The row of a layer, by its name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer {name!r} with trainable parameters; there are {[row.name for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: layouts by name, NaN as it is."""
        rows = [{**asdict(row), "layout": None if row.layout is None else row.layout.value} for row in self.rows]
        source = self.batch_size_source and self.batch_size_source.to_dict()
        values = {"n_samples": self.n_samples, "n_compared": self.n_compared, "notes": list(self.notes), "ok": self.ok}
        return {"version": 1, "rows": rows, "batch_size_source": source, **values}

    def __str__(self) -> str:
        """The table, then the reasons."""
        lines = _align([_HEAD, *(_cells(row) for row in self.rows)])
        total = sum(row.n_parameters for row in self.rows)
        counts = [(status, sum(row.status == status for row in self.rows)) for status in STATUSES]
        listed = ", ".join(f"{count} {status}" for status, count in counts if count)
        lines.append(f"{len(self.rows)} layers with {total:,} trainable parameters: {listed}; {self.n_samples} samples, {self.n_compared} compared one by one")
        lines.append(f"number of samples read from: {self.batch_size_source or 'not found'}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.reason:
                reasons.setdefault((row.status, row.reason), []).append(row.name or "the model itself")
        lines += [f"  {status}: {_listed(names)}: {reason}" for (status, reason), names in reasons.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _cells(row: CheckRow) -> tuple[str, ...]:
    share = "-" if math.isnan(row.variance_share) else f"{row.variance_share:.1%}"
    layout = "-" if row.layout is None else row.layout.value
    return row.name or "(model)", row.type, row.rule, f"{row.n_parameters:,}", layout, share, _number(row.cost, ".2g"), _number(row.error, ".0e"), row.status


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    padded = ([cell.ljust(width) if index in _TEXT else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
