"""Copies of an accelerator's numbers on the host that nothing on the step path waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from torch.amp import GradScaler

if TYPE_CHECKING:
    from adabatch.estimators.moments import GradientMoments

T = TypeVar("T")
# Set by tests: treat the CPU as an accelerator, whose numbers may only be read a step later.
LAGS_ON_CPU = False


def is_remote(value: object) -> bool:
    """Whether reading the value, or what lies on a device, makes the host wait for it."""
    if isinstance(value, Tensor):
        return LAGS_ON_CPU or not value.is_cpu
    return isinstance(value, torch.device) and (LAGS_ON_CPU or value.type != "cpu")


class HostCopies:
    """Copies that are under way: started at once, to be read after wait()."""

    def __init__(self) -> None:
        self.under_way = False
        self._events: dict[torch.device, torch.cuda.Event] = {}

    def add(self, value: T) -> T:
        """The value on the host, valid after wait(); itself if it is there, or is no tensor."""
        if not isinstance(value, Tensor) or not is_remote(value):
            return value
        self.under_way = True
        if not value.is_cuda:
            return cast(T, value.detach().to("cpu", copy=True))
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        # After the last copy on each device; an event is cheap.
        self._events[value.device] = torch.cuda.current_stream(value.device).record_event()
        return cast(T, host)

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        for event in self._events.values():
            event.synchronize()
        self._events.clear()


class DelayedMoments:
    """A `PendingMoments` that is computed when the copies that it needs have arrived.

    copies: all that `compute` reads; compute: called once, after they have arrived."""

    def __init__(self, copies: HostCopies, compute: Callable[[], GradientMoments]):
        self.lags, self._copies, self._compute = copies.under_way, copies, compute

    def moments(self) -> GradientMoments:
        """The moments; waits for copies that are under way."""
        self._copies.wait()
        return self._compute()


def scale_of(grad_scaler: GradScaler) -> Tensor | float:
    """A GradScaler's scale at this moment; on an accelerator a copy of the tensor that holds it,
    as get_scale() would wait."""
    has_scale = isinstance(grad_scaler, GradScaler) and grad_scaler.is_enabled()
    held = grad_scaler._scale if has_scale else None
    if held is not None and is_remote(held):
        return held.detach().clone()
    return float(grad_scaler.get_scale())


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device, without waiting."""
    pins = device.type == "cuda"
    return host.pin_memory().to(device, non_blocking=True) if pins else host.to(device)
