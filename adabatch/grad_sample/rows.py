"""Which rows of a batch are measured: random, seeded, drawn again for each step, without a draw
inside a compiled graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing import Any

import torch
from torch import Tensor

from adabatch._transfers import to_device


class RowSampler:
    """Chooses S of N rows as those with the S smallest of N random keys.

    The keys are drawn outside the model's graph, the choice is pure tensor work inside it: any
    batch size can follow without recompiling, and all layers agree.

    Args:
        samples: S, or None for all rows.
        seed: of the generator of the keys.
        capacity: the largest N.

    Example:
        >>> sampler = RowSampler(samples=2, seed=0, capacity=8)
        >>> rows = sampler.rows(5, torch.device("cpu"))
        >>> len(rows), sampler.rows(2, torch.device("cpu"))
        (2, None)
    """

    def __init__(self, samples: int | None, seed: int, capacity: int):
        self.samples = samples
        self._generator = torch.Generator().manual_seed(seed)
        self._capacity = capacity
        self._host_keys = torch.zeros(0)
        self._keys: dict[torch.device, Tensor] = {}
        # By (N, S, device), of the present keys, so that layers need not choose again.
        self._chosen: dict[tuple[int, int, torch.device], Tensor] = {}
        self._before_draws = self._generator.get_state()
        self._draws: list[int] = []
        self.redraw()

    def rows(self, n_samples: int, device: torch.device) -> Tensor | None:
        """The measured rows [S] of a batch of `n_samples`, or None for all of them."""
        if self.samples is None or n_samples <= self.samples:
            return None
        if torch.compiler.is_compiling():
            return self._keys[device][:n_samples].argsort()[: self.samples]
        key = n_samples, self.samples, device
        if key not in self._chosen:
            self.reserve(n_samples, device)
            self._chosen[key] = self._keys[device][:n_samples].argsort()[: self.samples]
        return self._chosen[key]

    def reserve(self, capacity: int, device: torch.device) -> None:
        """Make sure that keys for `capacity` rows lie on the device."""
        if self.samples is None:
            return
        if capacity > self._capacity:
            # Drawn keys stay: a graph that is still to be differentiated, or checkpointed, has
            # chosen its rows by them.
            more = self._draw(capacity - self._capacity)
            self._set_keys(torch.cat((self._host_keys, more)))
            self._capacity = capacity
        if device not in self._keys:
            self._keys[device] = to_device(self._host_keys, device)

    def choose(self, samples: int | None) -> None:
        """Measure `samples` rows from now on."""
        self.samples = samples
        if not self._draws:
            self.redraw()

    def redraw(self) -> None:
        """Draw new keys, for the next step."""
        if self.samples is None:
            return
        self._before_draws, self._draws = self._generator.get_state(), []
        self._chosen.clear()
        self._set_keys(self._draw(self._capacity))

    def _set_keys(self, keys: Tensor) -> None:
        self._host_keys = keys
        self._keys = {device: to_device(keys, device) for device in self._keys}

    def _draw(self, count: int) -> Tensor:
        self._draws.append(count)
        return torch.rand(count, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state from before the present keys were drawn, and how many were drawn
        at a time: the keys themselves grow with the batch."""
        return {"generator": self._before_draws.clone(), "draws": list(self._draws)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the saved sequence of draws."""
        capacity = self._capacity
        self._generator.set_state(state["generator"])
        self._before_draws, self._draws = state["generator"].clone(), []
        if not state["draws"]:
            self.redraw()
            return
        self._chosen.clear()
        self._set_keys(torch.cat([self._draw(count) for count in state["draws"]]))
        self._capacity = len(self._host_keys)
        for device in self._keys:
            self.reserve(capacity, device)


class ProbeRows:
    """Which probe row each parameter's per-sample values go to: one row for all, or one per
    parameter group or parameter.

    Args:
        parameters: the measured parameters by name.
        param_groups: lists of parameters, or None for one group.
        per_parameter: give each parameter its own row.

    Attributes:
        row_of: {parameter name: row}.
        groups: the parameters of each row.
        group_of_row: the parameter group of each row.
        names: the parameter name of each row, or None if rows hold several parameters.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], param_groups: Sequence[Sequence[Tensor]] | None,
        per_parameter: bool,
    ):
        group_of = {id(parameter): index for index, group in enumerate(param_groups or ())
                    for parameter in group}
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
