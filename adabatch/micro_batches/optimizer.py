"""An optimizer that steps on a batch's last micro-batch, and what wrap sets up for micro-batches.

Legend: m_j samples in micro-batch j of k, m = Σ m_j samples in the batch, g_j the gradient of
micro-batch j's loss.

If the loss is a mean, the batch's gradient is Σ_j (m_j/m) g_j: a tensor hook multiplies each
parameter's gradient by m_j/m before it is accumulated, so that clipping, a GradScaler and
measurements see the gradient of the whole batch. A loss that is a sum needs no weights.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from adabatch._types import Argument, LossFn
from adabatch.data.split import BatchSplit
from adabatch.estimators.gradients import at_backward_end, is_sharded
from adabatch.interfaces import Estimator, State
from adabatch.micro_batches.search import find_micro_batch_size

if TYPE_CHECKING:
    from adabatch.data.loader import AdaptiveDataLoader

CHANGED = (
    "the gradients were changed between two micro-batches of one batch: by clipping, or "
    "model.zero_grad(). Clip by max_grad_norm=, clear gradients with optimizer.zero_grad(); or do "
    "it only if loader.is_last_micro_batch.")
LR_CHANGED = (
    "the learning rate changed between two micro-batches of one batch: an lr_scheduler that is "
    "stepped for each of them moves too fast. Pass it as lr_scheduler=, or step it only if "
    "loader.is_last_micro_batch.")
CLOSURE = (
    "step(closure) would evaluate one micro-batch only: call loss.backward() and optimizer.step() "
    "in the loop, or train without micro-batches")
SCALER = (
    "scaler.step on a micro-batch that is not the batch's last: pass the scaler as grad_scaler= "
    "and call optimizer.step()")
TWO_SCALERS = (
    "optimizer.step() runs the scaler that was passed as grad_scaler=, its unscale_ and update() "
    "too: omit scaler.step(optimizer) and them")
UNWEIGHTED = (
    "no gradient passed the hooks that weight each micro-batch: backward() was not called, or "
    "gradients do not go through the parameters' autograd nodes (fully_shard). Train without "
    "micro-batches.")


class AccumulatingOptimizer(Optimizer):
    """An optimizer that waits for a batch's last micro-batch; everything else is the inner one's.

    step() steps on the last micro-batch and does nothing on the others; zero_grad() does nothing
    while gradients are accumulated, so it may stand before backward() or after step(). The last
    step() runs, in this order: grad_scaler.unscale_, clipping to max_grad_norm, the step,
    grad_scaler.update, lr_scheduler.step (unless the scaler skipped the step). Each of these is
    either passed here, or called in the loop where loader.is_last_micro_batch is True.
    torch.autograd.grad with respect to parameters is weighted too while a batch is accumulated.

    Raises:
        TypeError: not an lr_scheduler, or one that needs a metric.
        ValueError: max_grad_norm is not positive, or lr_scheduler is of another optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> split = BatchSplit(limit=2)
        >>> optimizer = AccumulatingOptimizer(torch.optim.SGD([weight], lr=1.0), split)
        >>> for part, size in enumerate(split.start(3)):
        ...     split.advance(part, size)
        ...     optimizer.zero_grad()
        ...     (weight * float(part)).backward()
        ...     optimizer.step()
        >>> round(weight.item(), 4)
        -0.3333
    """

    def __init__(
        self, optimizer: Optimizer, split: BatchSplit, *, loss_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None, lr_scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
    ):
        plain = isinstance(lr_scheduler, LRScheduler)
        if lr_scheduler is not None and (not plain or isinstance(lr_scheduler, ReduceLROnPlateau)):
            raise TypeError(
                "lr_scheduler must be a torch LRScheduler whose step() takes no metric, got "
                f"{type(lr_scheduler).__name__}: step ReduceLROnPlateau in your loop")
        if (isinstance(lr_scheduler, LRScheduler)
                and lr_scheduler.optimizer.param_groups is not optimizer.param_groups):
            raise ValueError(
                "lr_scheduler must set the lr of the optimizer that is wrapped, got a "
                f"{type(lr_scheduler).__name__} of another {type(lr_scheduler.optimizer).__name__}:"
                " make it with this optimizer, before wrap")
        norm = max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise ValueError(f"max_grad_norm must be a number > 0 or None, got {norm!r}")
        # Not super().__init__(): there is one set of param_groups and of hooks, the inner one's.
        self.optimizer, self._split = optimizer, split
        self._weighted = loss_reduction == "mean"
        self._grad_scaler, self._lr_scheduler = grad_scaler, lr_scheduler
        self._max_grad_norm = max_grad_norm
        self._handles: list[RemovableHandle] = []
        self._pending = self._in_scaler = False
        self._reset()
        for group in optimizer.param_groups:
            self._watch(group["params"])
        split.accumulates = True
        split.listeners.append(self._start)

    def __getattr__(self, name: str) -> Argument:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"AccumulatingOptimizer({self.optimizer!r})"

    @property
    def _step_supports_amp_scaling(self) -> bool:  # read by a GradScaler at the start of its step()
        if not self._in_scaler:
            if self._grad_scaler is not None:
                raise RuntimeError(TWO_SCALERS)
            if not self._split.is_last:
                raise RuntimeError(SCALER)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless a batch is being accumulated in them."""
        if not self._pending:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        """Step if the batch is complete. RuntimeError for a closure, and where gradients or
        learning rates changed between micro-batches."""
        if closure is not None:
            raise RuntimeError(CLOSURE)
        if self._in_scaler:
            self.optimizer.step()
            return
        if self._split.count > 1:
            self._check_lrs()
            if not self._split.is_last:
                return self._check_untouched()
            if self._weighted and not self._pending:
                raise RuntimeError(UNWEIGHTED)
        # From here on the batch cannot be tried again, whatever fails.
        self._split.stepped = True
        self._step()
        self._pending = False

    def add_param_group(self, param_group: State) -> None:
        self.optimizer.add_param_group(param_group)
        self._watch(self.optimizer.param_groups[-1]["params"])

    def state_dict(self) -> State:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        self.optimizer.load_state_dict(state_dict)

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _step(self) -> None:
        scaler, skipped = self._grad_scaler, False
        if self._max_grad_norm is not None:
            if scaler is not None:
                # On this object, not the inner one: torch refuses it if the loop did it before.
                scaler.unscale_(self)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        if scaler is None:
            self.optimizer.step()
        else:
            before = scaler.get_scale()
            self._in_scaler = True
            try:
                scaler.step(self)
            finally:
                self._in_scaler = False
            scaler.update()
            skipped = scaler.get_scale() < before
        if self._lr_scheduler is not None and not skipped:
            self._lr_scheduler.step()

    def _start(self) -> None:
        """A batch begins: what an unfinished one left in the gradients is cleared."""
        if self._pending:
            self.optimizer.zero_grad()
            self._pending = False
        self._reset()

    def _reset(self) -> None:
        self._lrs: list[float] | None = None
        self._watched: Tensor | None = None
        self._noted: tuple[Tensor | None, int] | None = None

    def _watch(self, parameters: list[Tensor]) -> None:
        self._handles += [
            parameter.register_hook(functools.partial(self._weight, parameter))
            for parameter in parameters if parameter.requires_grad]

    def _weight(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        if self._split.count == 1:
            return None
        self._pending = True
        self._watched = parameter if self._watched is None else self._watched
        if parameter is self._watched:
            self._check_untouched()
            at_backward_end(self._note)
        return grad * self._split.fraction if self._weighted else None

    def _note(self) -> None:
        if self._watched is not None:
            grad = self._watched.grad
            self._noted = grad, -1 if grad is None else grad._version

    def _check_untouched(self) -> None:
        """Look at one parameter: clipping and zero_grad() change all of them."""
        if self._noted is None or self._watched is None:
            return
        grad, version = self._noted
        if self._watched.grad is not grad or (grad is not None and grad._version != version):
            raise RuntimeError(CHANGED)

    def _check_lrs(self) -> None:
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self._lrs is not None and self._lrs != lrs:
            raise RuntimeError(LR_CHANGED)
        self._lrs = lrs


class MicroBatching:
    """The micro-batches of one wrap() call: those of `loader` are set.

    Args:
        limit: the largest micro-batch, "auto" (needs loss_fn), or None for whole batches.
        accumulate: backward passes per step in a user's own accumulation; 1 with micro-batches.

    Raises:
        ValueError: arguments that do not go together.
        TypeError: a limit that is not an integer.
    """

    def __init__(
        self, loader: AdaptiveDataLoader, limit: int | str | None, accumulate: int, estimator: str,
        loss_fn: LossFn | None,
    ):
        if isinstance(limit, str) and limit != "auto":
            raise ValueError(
                f"the micro-batch limit must be a positive integer, 'auto' or None, got {limit!r}")
        self._wanted = limit is not None or estimator == "micro_batch"
        if self._wanted and accumulate != 1:
            raise ValueError(
                f"micro-batches are accumulated already: leave accumulate at 1, got {accumulate}")
        if limit == "auto" and loss_fn is None:
            raise ValueError(
                "micro-batches 'auto' tries steps: pass loss_fn=, (model, batch) -> the loss that "
                "you differentiate")
        # Checked here, before hooks are placed anywhere.
        self._limit = "auto" if isinstance(limit, str) else BatchSplit(limit).limit
        # Held weakly: a later wrap() calls undo(), if the loader still exists.
        self._of_loader, self._loss_fn, self._accumulate = weakref.ref(loader), loss_fn, accumulate
        split = loader.micro_batches
        self._before = (
            split.limit, split.at_least, split.accumulates, list(split.listeners), split.single)

    def find_limit(self, model: nn.Module, optimizer: Optimizer, hooks: Estimator, largest: int
                   ) -> None:
        """Set the limit; "auto" searches for it while the hooks' memory is in use."""
        limit = self._limit
        if isinstance(limit, str):
            state = hooks.state_dict()
            limit = self._search(model, optimizer, largest)
            hooks.reset()
            hooks.load_state_dict(state)
        self._loader.micro_batches.limit = limit

    def _search(self, model: nn.Module, optimizer: Optimizer, largest: int) -> int:
        loader, world_size = self._loader, self._loader.batch_sampler.shard.world_size
        assert self._loss_fn is not None
        if world_size > 1 and any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "micro-batches 'auto' cannot try sizes on a sharded model, whose processes wait "
                "for each other: pass a number")
        largest = -(-largest // world_size)
        # No process waits for another whose memory ran out.
        with getattr(model, "no_sync", nullcontext)():
            return find_micro_batch_size(model, optimizer, loader, self._loss_fn, largest=largest)

    def accumulating(
        self, optimizer: Optimizer, hooks: Estimator, *, grad_scaler: torch.amp.GradScaler | None,
        lr_scheduler: LRScheduler | None, max_grad_norm: float | None,
    ) -> Optimizer:
        """The optimizer that waits for the last micro-batch; `optimizer` where that is the same."""
        if not self._wanted and lr_scheduler is None and max_grad_norm is None:
            return optimizer
        split = self._loader.micro_batches
        accumulating = AccumulatingOptimizer(
            optimizer, split, loss_reduction=hooks.loss_reduction, grad_scaler=grad_scaler,
            lr_scheduler=lr_scheduler, max_grad_norm=max_grad_norm)
        if self._accumulate != 1:
            split.accumulates = False  # a user's own accumulation: batches come whole
            return accumulating
        self._loader.learn_layout()
        hooks.by_samples = True

        def begin() -> None:
            """Set the batch's backward passes; discard those of a failed attempt."""
            if split.is_retry:
                hooks.reset()
            hooks.accumulate = split.count

        split.listeners.append(begin)
        return accumulating

    @property
    def _loader(self) -> AdaptiveDataLoader:
        loader = self._of_loader()
        assert loader is not None
        return loader

    def undo(self) -> None:
        """Leave the loader as it was."""
        if self._of_loader() is None:
            return
        split = self._loader.micro_batches
        (split.limit, split.at_least, split.accumulates, split.listeners,
         split.single) = self._before
