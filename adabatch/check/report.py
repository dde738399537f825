"""CheckReport: what adabatch.check found, as rows, as layouts for the hooks, and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from adabatch._table import aligned, html
from adabatch.grad_sample.layout import BatchSizeSource, Layout
from adabatch.interfaces import State

STATUSES = ("exact", "contribution", "refused")
_HEAD = ("layer", "type", "rule", "parameters", "layout", "variance", "cost", "error", "status")


@dataclass
class CheckRow:
    """One layer that owns trainable parameters."""

    name: str  # in the model, '' for the model itself
    type: str  # its class
    # 'rule' (a registered one), 'generic' (the vjp of the layer's own forward pass), 'none' (it
    # cannot be measured).
    rule: str
    n_parameters: int  # trainable ones; a shared one counts with the first layer that uses it
    layout: Layout | None  # which rows belong to which sample; None: not found, or no gradient came
    # The layer's part of the variance trace Σ_i ‖g_i − ḡ‖² / (n − 1) of the samples compared.
    variance_share: float = math.nan
    # Of measuring the layer relative to training it, by the cost model; NaN where not known.
    cost: float = math.nan
    # Of the taps' ‖g_i‖² relative to exact ones, the largest; NaN where not compared.
    error: float = math.nan
    # 'exact' (per-sample gradients), 'contribution' (what sample i adds to the batch's gradient:
    # train-mode batch norm makes samples depend on each other), 'refused'.
    status: str = "exact"
    reason: str = ""  # why it is refused, or a remark
    parameters: tuple[str, ...] = ()  # names in the model of its trainable parameters

    def refuse(self, reason: str) -> None:
        """Set the status to refused; the first reason stays."""
        if self.status != "refused":
            self.status, self.reason = "refused", reason

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        share = "-" if math.isnan(self.variance_share) else f"{self.variance_share:.1%}"
        cost, error = ("-" if math.isnan(value) else format(value, form)
                       for value, form in ((self.cost, ".2g"), (self.error, ".0e")))
        return (self.name or "(model)", self.type, self.rule, f"{self.n_parameters:,}",
                str(self.layout or "-"), share, cost, error, self.status)


@dataclass
class CheckReport:
    """The result of adabatch.check; pass it to GradSampleHooks(layout=) or PerSample(layout=).

    Example:
        >>> row = CheckRow("fc", "Linear", "rule", 6, Layout("batch_second"))
        >>> report = CheckReport([row], BatchSizeSource(0, "inputs", (), 1), 8, 4)
        >>> report.ok, report.layouts["fc"].value, str(report.batch_size_source)
        (True, 'batch_second', 'inputs.shape[1]')
    """

    rows: list[CheckRow]  # of the layers with trainable parameters, as in model.named_modules()
    batch_size_source: BatchSizeSource | None  # where the model's inputs count the samples
    n_samples: int  # used for the layouts
    n_compared: int  # with a backward pass each; variance shares are over these
    notes: list[str] = field(default_factory=list)  # what concerns no layer in particular
    # Of inputs whose samples the data flow does not show: {(of what, number of the call): whether
    # they carry samples}.
    roles: dict[tuple[str, int], bool] = field(default_factory=dict)

    @property
    def layouts(self) -> dict[str, Layout]:
        """{layer's name: its layout}, where one was found."""
        return {row.name: row.layout for row in self.rows if row.layout is not None}

    @property
    def refused(self) -> dict[str, str]:
        """{layer's name: why} of the refused layers."""
        return {row.name: row.reason for row in self.rows if row.status == "refused"}

    @property
    def ok(self) -> bool:
        """Whether every layer can be measured and nothing else stands in the way."""
        return not self.refused and not self.notes

    def __getitem__(self, name: str) -> CheckRow:
        """The row of a layer, by its name."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise KeyError(f"no layer {name!r} with trainable parameters; there are {list(rows)}")
        return rows[name]

    def to_dict(self) -> State:
        """Plain values, with a version."""
        rows = [{**asdict(row), "layout": row.layout and row.layout.value} for row in self.rows]
        source = self.batch_size_source and self.batch_size_source.to_dict()
        return {"version": 1, "rows": rows, "batch_size_source": source, "ok": self.ok,
                "roles": [[*key, carries] for key, carries in self.roles.items()],
                "n_samples": self.n_samples, "n_compared": self.n_compared, "notes": [*self.notes]}

    def remarks(self) -> list[str]:
        """The lines below the table: totals, where N is read, and the reasons, each once."""
        total = sum(row.n_parameters for row in self.rows)
        counts = ((sum(row.status == each for row in self.rows), each) for each in STATUSES)
        listed = ", ".join(f"{count} {status}" for count, status in counts if count)
        lines = [f"{len(self.rows)} layers with {total:,} trainable parameters: {listed}; "
                 f"{self.n_samples} samples, {self.n_compared} compared one by one",
                 f"number of samples read from: {self.batch_size_source or 'not found'}"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.reason:
                key = row.status, row.reason
                reasons.setdefault(key, []).append(row.name or "the model itself")
        for (status, reason), names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 4 else ""
            lines.append(f"  {status}: {', '.join(names[:3] if more else names)}{more}: {reason}")
        return [*lines, *(f"  {note}" for note in self.notes)]

    def __str__(self) -> str:
        table = aligned([_HEAD, *(row.cells() for row in self.rows)], left=(0, 1, 2, 4, 8))
        return "\n".join([*table, *self.remarks()])

    def _repr_html_(self) -> str:
        return html([_HEAD, *(row.cells() for row in self.rows)], self.remarks())
