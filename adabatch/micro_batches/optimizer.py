"""Batches larger than memory: micro-batches come through the training loop one by one, and the optimizer steps on the last one.

Legend: m_j samples in micro-batch j of k, m = Σ m_j samples in the batch, g_j the gradient of micro-batch j's loss.

With a loss that is a mean, loss.backward() adds g_j, and the batch's gradient is Σ_j (m_j/m) g_j. The share m_j/m is put on each parameter's gradient by a
tensor hook before it is accumulated. So p.grad is right as soon as the last backward pass has ended, for equal and unequal micro-batches alike, and clipping,
a GradScaler and measurements see the gradient they would see without micro-batches. A loss that is a sum needs no share.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adabatch._engine import at_backward_end
from adabatch.micro_batches.batches import MicroBatches

CHANGED = (
    "the gradients were changed between two micro-batches of one batch: by clipping, scaler.unscale_ or scaler.step, or model.zero_grad(). Clip by "
    "wrap(max_grad_norm=), give the scaler to wrap(grad_scaler=), clear gradients with optimizer.zero_grad(); or do it only if loader.is_last_micro_batch."
)
LR_CHANGED = (
    "the learning rate changed between two micro-batches of one batch: an lr_scheduler that is stepped for each of them moves too fast. "
    "Give it to wrap(lr_scheduler=), or step it only if loader.is_last_micro_batch."
)
CLOSURE = "step(closure) would evaluate one micro-batch only: call loss.backward() and optimizer.step() in the loop, or leave max_micro_batch_size away"
SCALER = "scaler.unscale_ or scaler.step on a micro-batch that is not the batch's last: give the scaler to wrap(grad_scaler=) and call optimizer.step()"
TWO_SCALERS = "optimizer.step() runs the scaler that was given to wrap(grad_scaler=), its unscale_ and update() too: leave scaler.step(optimizer) and them away"
UNWEIGHED = (
    "no gradient passed the hooks that give each micro-batch its share: backward() was not called, or gradients do not go through the parameters' own "
    "autograd nodes (fully_shard). Train without max_micro_batch_size."
)


class AccumulatingOptimizer(Optimizer):
    """An optimizer that waits for a batch's last micro-batch; param_groups, state and everything else are the inner one's.

    step() steps on the last micro-batch and does nothing on the others; zero_grad() does nothing while gradients are being accumulated, so it may stand
    before backward() or after step(). On the last micro-batch, in this order: grad_scaler.unscale_, clipping, the step, grad_scaler.update, lr_scheduler.step
    (not where the scaler skipped the step). While a batch is being accumulated torch.autograd.grad with respect to parameters gives shares as well.

    Args:
        optimizer: the one that steps.
        micro_batches: of the loader.
        loss_reduction: 'mean' or 'sum', of the loss over a micro-batch.
        grad_scaler: a torch.amp.GradScaler; loss.backward() is then scaler.scale(loss).backward().
        lr_scheduler: stepped after each step of the optimizer.
        max_grad_norm: clips the whole batch's gradient to this norm.

    Attributes:
        optimizer: the inner one.

    Raises:
        TypeError: an lr_scheduler that is none, or needs a metric.
        ValueError: max_grad_norm not above 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> micro = MicroBatches(limit=2)
        >>> optimizer = AccumulatingOptimizer(torch.optim.SGD([weight], lr=1.0), micro)
        >>> for part, size in enumerate(micro.start(3)):
        ...     micro.advance(part, size)
        ...     optimizer.zero_grad()
        ...     (weight * float(part)).backward()
        ...     optimizer.step()
        >>> round(weight.item(), 4)
        -0.3333
    """

    def __init__(
        self,
        optimizer: Optimizer,
        micro_batches: MicroBatches,
        *,
        loss_reduction: str = "mean",
        grad_scaler: Any = None,
        lr_scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
    ):
        if lr_scheduler is not None and (not isinstance(lr_scheduler, LRScheduler) or isinstance(lr_scheduler, ReduceLROnPlateau)):
            kind = type(lr_scheduler).__name__
            raise TypeError(f"lr_scheduler must be a torch LRScheduler whose step() takes no metric, got {kind}: step ReduceLROnPlateau in your own loop")
        if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm must be a number > 0 or None, got {max_grad_norm!r}")
        # Not super().__init__(): there is one set of param_groups and of hooks, the inner optimizer's.
        self.optimizer, self._micro = optimizer, micro_batches
        self._weighs = loss_reduction == "mean"
        self._grad_scaler, self._lr_scheduler, self._max_grad_norm = grad_scaler, lr_scheduler, max_grad_norm
        self._handles: list[Any] = []
        self._pending = False
        self._forget()
        for group in optimizer.param_groups:
            self._watch(group["params"])
        micro_batches.accumulates = True
        micro_batches.listeners.append(self._start)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"AccumulatingOptimizer({self.optimizer!r})"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer."""
        # GradScaler.unscale_ asks an optimizer for nothing else, and leaves no mark on the gradients that could be seen afterwards.
        if self._micro.count > 1 and sys._getframe(1).f_code.co_name == "_unscale_grads_":
            self._check_scaler()
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """That of the inner optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the inner optimizer."""
        return self.optimizer.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler asks for this attribute at the start of its step().
        self._check_scaler()
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless a batch is being accumulated in them."""
        if not self._pending:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        """Step if the batch is complete.

        Args:
            closure: must be None.
            kwargs: handed on to the inner step, for a GradScaler of the caller's own.

        Raises:
            RuntimeError: a closure; gradients or learning rates that were changed between micro-batches.
        """
        if closure is not None:
            raise RuntimeError(CLOSURE)
        if self._micro.count > 1:
            self._check_lrs()
            if not self._micro.is_last:
                self._check_untouched()
                return
            if self._weighs and not self._pending:
                raise RuntimeError(UNWEIGHED)
        # From here on the batch cannot be tried again, whatever fails.
        self._micro.stepped = True
        self._step(kwargs)
        self._pending = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)
        self._watch(self.optimizer.param_groups[-1]["params"])

    def state_dict(self) -> dict[str, Any]:
        """That of the inner optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state."""
        self.optimizer.load_state_dict(state_dict)

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- parts of a step

    def _step(self, kwargs: dict[str, Any]) -> None:
        scaler, skipped = self._grad_scaler, False
        if self._max_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([parameter for group in self.param_groups for parameter in group["params"]], self._max_grad_norm)
        if scaler is None:
            self.optimizer.step(**kwargs)
        else:
            before = scaler.get_scale()
            scaler.step(self.optimizer)
            scaler.update()
            skipped = scaler.get_scale() < before
        if self._lr_scheduler is not None and not skipped:
            self._lr_scheduler.step()

    def _start(self) -> None:
        """A batch begins, perhaps anew: what an unfinished one left in the gradients is dropped."""
        if self._pending:
            self.optimizer.zero_grad()
            self._pending = False
        self._forget()

    def _check_scaler(self) -> None:
        if self._grad_scaler is not None:
            raise RuntimeError(TWO_SCALERS)
        if not self._micro.is_last:
            raise RuntimeError(SCALER)

    def _forget(self) -> None:
        self._lrs: list[float] | None = None
        self._watched: Tensor | None = None
        self._noted: tuple[Tensor | None, int] | None = None

    def _watch(self, parameters: list[Tensor]) -> None:
        self._handles += [parameter.register_hook(functools.partial(self._weigh, parameter)) for parameter in parameters if parameter.requires_grad]

    def _weigh(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        if self._micro.count == 1:
            return None
        self._pending = True
        if self._watched is None:
            self._watched = parameter
        if parameter is self._watched:
            self._check_untouched()
            at_backward_end(self._note)
        return grad * self._micro.share if self._weighs else None

    def _note(self) -> None:
        if self._watched is not None:
            grad = self._watched.grad
            self._noted = grad, -1 if grad is None else grad._version

    def _check_untouched(self) -> None:
        """One parameter is looked at: clipping and unscaling change all."""
        if self._noted is None:
            return
        grad, version = self._noted
        if self._watched.grad is not grad or (grad is not None and grad._version != version):
            raise RuntimeError(CHANGED)

    def _check_lrs(self) -> None:
        lrs = [float(group["lr"]) for group in self.param_groups]
        if self._lrs is not None and self._lrs != lrs:
            raise RuntimeError(LR_CHANGED)
        self._lrs = lrs
