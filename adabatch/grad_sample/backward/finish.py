"""When the results of a backward pass are taken, and the checks of it that may have to wait for an accelerator."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adabatch._engine import at_backward_end, running_backward
from adabatch._transfers import HostCopies, is_remote
from adabatch.grad_sample.backward.passes import REENTRANT, batch_size_of, check_all_seen, check_gradients_left, reported_parameters, warn_of_mixing
from adabatch.grad_sample.backward.recorder import ParameterUse
from adabatch.grad_sample.taps.base import TapSite


def queue_finish(reference: weakref.ref[Any], reports: Tensor) -> None:
    """Called when the reports' gradient is complete. The parameters' gradients may not be: DDP's own last callback is queued before the second of ours."""
    hooks = reference()
    task = running_backward()
    if hooks is None or not hooks._attached or task == hooks._harvested_task:
        return
    recomputing, hooks._placer.recomputing_task = hooks._placer.recomputing_task, -1
    if recomputing not in (-1, task):
        hooks.reset()
        raise RuntimeError(REENTRANT)
    hooks._harvested_task = task
    at_backward_end(hooks._harvest)


class ForwardSizes:
    """N of the forward passes since the last backward pass, which tells what that one had without a look at the device.

    Example:
        >>> sizes = ForwardSizes()
        >>> sizes.note(8)
        >>> print(sizes.known_batch_size(torch.device("cuda"), first=False), sizes.known_batch_size(torch.device("cuda"), first=False))
        8 None
    """

    def __init__(self) -> None:
        self._sizes: set[int] = set()

    def note(self, n_samples: int) -> None:
        """A tap was placed, outside compiled graphs."""
        self._sizes.add(n_samples)

    def known_batch_size(self, home: torch.device, first: bool) -> int | None:
        """N of the backward pass that has ended; None where the layers' reports are to be read: on the CPU, in a first pass, and where N is not known."""
        sizes, self._sizes = self._sizes, set()
        return sizes.pop() if len(sizes) == 1 and is_remote(home) and not first else None

    def clear(self) -> None:
        """Forget them."""
        self._sizes.clear()


def check_backward(hooks: Any, reports: Sequence[Sequence[float]], uses: list[ParameterUse]) -> set[str]:
    """The checks of the backward pass that has ended, with its reports at hand: names of the parameters that took part.

    Raises:
        RuntimeError: as check_all_seen.
    """
    hooks._mixing[0] = hooks._mixing[0] or warn_of_mixing(reports, hooks.sites)
    seen = reported_parameters(reports, hooks.sites, uses)
    if not hooks._n_passes:
        check_all_seen(seen, hooks.parameters)
    hooks._seen |= seen
    if is_remote(hooks._probes.home):
        hooks._stash.witness = None  # it would wait again
    return seen


@dataclass
class BackwardChecks:
    """The checks of one backward pass that need the layers' reports, where those are still on their way.

    Attributes:
        reports: [n_layers, 2]; a tensor where compiled layers took part.
        sites: the layers.
        input_sizes: of the model's inputs.
        n_samples: N as the forward pass had it.
        used: parameters whose uses were put aside.
        has_grad: for each parameter, whether it had a gradient when the pass ended.
        nonzero: {name: number of elements of the gradient that are not zero} of parameters that no pass before had seen.
        mixing: [whether it was warned of layers that mix samples], shared by all passes.
    """

    reports: Sequence[Sequence[float]] | Tensor
    sites: Sequence[TapSite]
    input_sizes: Collection[int]
    n_samples: int
    used: Collection[str]
    has_grad: Mapping[str, bool]
    nonzero: Mapping[str, Tensor]
    mixing: list[bool]

    @classmethod
    def of(cls, reports: Sequence[Sequence[float]] | Tensor, hooks: Any, n_samples: int, used: Collection[str]) -> BackwardChecks:
        """Those of the pass that `hooks` have just taken."""
        parameters, sizes = hooks.parameters, frozenset(hooks._placer.input_sizes)
        unknown = {name: parameter.grad for name, parameter in parameters.items() if name not in hooks._seen and parameter.grad is not None}
        nonzero = {name: torch.count_nonzero(grad) for name, grad in unknown.items()}
        has_grad = {name: parameter.grad is not None for name, parameter in parameters.items()}
        return cls(reports, hooks.sites, sizes, n_samples, used, has_grad, nonzero, hooks._mixing)

    def copied(self, copies: HostCopies) -> BackwardChecks:
        """The same on the host."""
        return replace(self, reports=copies.add(self.reports), nonzero={name: copies.add(count) for name, count in self.nonzero.items()})

    def run(self) -> None:
        """Check.

        Raises:
            RuntimeError: as the backward pass itself would have, on the CPU.
        """
        reports = self.reports.tolist() if isinstance(self.reports, Tensor) else self.reports
        size = batch_size_of(reports, self.sites, self.input_sizes)
        if size != self.n_samples:
            raise RuntimeError(f"the layers saw {self.n_samples} samples forward and {size} backward: run backward() on the loss of the last forward pass")
        self.mixing[0] = self.mixing[0] or warn_of_mixing(reports, self.sites)
        used = [SimpleNamespace(parameter=name) for name in self.used]
        seen = reported_parameters(reports, self.sites, used)
        check_all_seen(seen, {name: SimpleNamespace(grad=count) for name, count in self.nonzero.items()})
        left = {name: SimpleNamespace(requires_grad=True, grad=self if has else None) for name, has in self.has_grad.items()}
        check_gradients_left(seen, left, self.sites)
