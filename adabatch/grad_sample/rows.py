"""Which rows of a batch are measured: random, seeded, drawn again for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adabatch._transfers import to_device
from adabatch.interfaces import State


class RowSampler:
    """Chooses S of N rows (None: all): those with the S smallest of N random keys.

    The keys, `capacity` of them, are drawn outside the model's graph, the choice is pure tensor
    work inside it: no batch size causes a recompilation, and all layers agree.
    """

    def __init__(self, samples: int | None, seed: int, capacity: int):
        self.samples = samples
        self._generator = torch.Generator().manual_seed(seed)
        self._capacity = capacity
        self._host_keys = torch.zeros(0)
        self._keys: dict[torch.device, Tensor] = {}
        # By (N, S, device), so that the layers need not choose again.
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
            # Drawn keys stay: graphs whose backward pass is still to come have used them.
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

    def state_dict(self) -> State:
        """The generator's state before the present keys, and the sizes of their draws: fewer
        numbers than the keys."""
        return {"generator": self._before_draws.clone(), "draws": list(self._draws)}

    def load_state_dict(self, state: State) -> None:
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
    """Which probe row each parameter's per-sample values go to: one for all (param_groups=None),
    one per parameter group, or one per parameter.

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
