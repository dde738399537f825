"""Which probe row each parameter's norms go to: one row for all, or one per parameter group or parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class ProbeRows:
    """The assignment of parameters to probe rows.

    Args:
        parameters: the measured parameters by name.
        param_groups: lists of parameters, or None for one group.
        per_parameter: give each parameter a row of its own.

    Attributes:
        row_of: {parameter name: row}.
        groups: the parameters of each row.
        group_of_row: the parameter group of each row.
        names: the parameter name of each row, or None if rows hold several parameters.
    """

    def __init__(self, parameters: dict[str, Tensor], param_groups: Sequence[Sequence[Tensor]] | None, per_parameter: bool):
        group_of = {id(parameter): index for index, group in enumerate(param_groups or ()) for parameter in group}
        groups = [group_of.get(id(parameter), 0) for parameter in parameters.values()]
        self.names = list(parameters) if per_parameter else None
        if per_parameter:
            rows = list(range(len(parameters)))
            self.group_of_row = groups
        else:
            self.group_of_row = sorted(set(groups))
            rows = [self.group_of_row.index(group) for group in groups]
        self.row_of = dict(zip(parameters, rows, strict=True))
        self.groups: list[list[Tensor]] = [[] for _ in self.group_of_row]
        for parameter, row in zip(parameters.values(), rows, strict=True):
            self.groups[row].append(parameter)

    def __len__(self) -> int:
        return len(self.groups)
