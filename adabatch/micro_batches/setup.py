"""How wrap lets batches come in micro-batches: the limit, the hooks' passes and the optimizer that waits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adabatch.data.loader import AdaptiveDataLoader
from adabatch.distributed.grad_norms import is_sharded
from adabatch.micro_batches.batches import MicroBatches
from adabatch.micro_batches.optimizer import AccumulatingOptimizer
from adabatch.micro_batches.search import LossFn, find_micro_batch_size

ESTIMATORS = ("per_sample", "micro_batch", "cross_rank")


class MicroBatching:
    """The micro-batches of one wrap() call.

    Args:
        loader: its micro_batches are set.
        limit: the largest micro-batch, 'auto', or None for whole batches.
        accumulate: backward passes per step in the caller's own accumulation; must be 1 with micro-batches.
        estimator: one of ESTIMATORS.
        loss_fn: for 'auto'.

    Raises:
        ValueError: arguments that do not go together.
        TypeError: a limit that is no integer.

    Example:
        >>> loader = AdaptiveDataLoader(range(8), 8)
        >>> MicroBatching(loader, 3, 1, "per_sample", None).find_limit(None, None, None, 8)
        >>> len(loader)
        3
    """

    def __init__(self, loader: AdaptiveDataLoader, limit: int | str | None, accumulate: int, estimator: str, loss_fn: LossFn | None):
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
        if isinstance(limit, str) and limit != "auto":
            raise ValueError(f"max_micro_batch_size must be a positive integer, 'auto' or None, got {limit!r}")
        self._wanted = limit is not None or estimator == "micro_batch"
        if self._wanted and accumulate != 1:
            raise ValueError(f"max_micro_batch_size accumulates by itself: leave accumulate at 1, got {accumulate}")
        if limit == "auto" and loss_fn is None:
            raise ValueError("max_micro_batch_size='auto' tries steps: pass loss_fn=, (model, batch) -> the loss that you differentiate")
        # Checked here, before hooks are put anywhere.
        self._limit: Any = limit if limit == "auto" else MicroBatches(limit).limit
        self._loader, self._loss_fn, self._accumulate = loader, loss_fn, accumulate
        micro = loader.micro_batches
        self._before = micro.limit, micro.at_least, micro.accumulates, list(micro.listeners)

    def find_limit(self, model: nn.Module, optimizer: Optimizer, hooks: Any, largest: int) -> None:
        """Set the limit, after a search for 'auto', which runs with the hooks' memory in use.

        Processes may find different limits: `DistributedSetup.agree_on_limit` takes the smallest.
        """
        limit = self._limit
        if limit == "auto":
            state = hooks.state_dict()
            limit = self._search(model, optimizer, largest)
            hooks.reset()
            hooks.load_state_dict(state)
        self._loader.micro_batches.limit = limit

    def _search(self, model: nn.Module, optimizer: Optimizer, largest: int) -> int:
        world_size = self._loader.batch_sampler.processes.world_size
        if world_size == 1:
            return find_micro_batch_size(model, optimizer, self._loader, self._loss_fn, largest=largest)
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError("max_micro_batch_size='auto' cannot try sizes on a sharded model, whose processes wait for each other: give a number")
        # No process waits for another whose memory ran out.
        with getattr(model, "no_sync", nullcontext)():
            return find_micro_batch_size(model, optimizer, self._loader, self._loss_fn, largest=-(-largest // world_size))

    def accumulating(self, optimizer: Optimizer, hooks: Any, *, grad_scaler: Any, lr_scheduler: Any, max_grad_norm: float | None) -> Optimizer:
        """The optimizer that waits for the last micro-batch, or `optimizer` itself where there is nothing to wait for or to run."""
        if not self._wanted and lr_scheduler is None and max_grad_norm is None:
            return optimizer
        micro = self._loader.micro_batches
        parts = {"grad_scaler": grad_scaler, "lr_scheduler": lr_scheduler, "max_grad_norm": max_grad_norm}
        proxy = AccumulatingOptimizer(optimizer, micro, loss_reduction=hooks.loss_reduction, **parts)
        if self._accumulate != 1:
            micro.accumulates = False  # the caller's own accumulation: batches come whole
            return proxy
        self._loader.learn_layout()
        hooks.by_samples = True
        micro.listeners.append(_PassesOfBatch(hooks, micro))
        return proxy

    def undo(self) -> None:
        """Leave the loader as it was."""
        micro = self._loader.micro_batches
        micro.limit, micro.at_least, micro.accumulates, micro.listeners = self._before


class _PassesOfBatch:
    """Tells the hooks at the start of each batch how many backward passes it takes, and has them forget an attempt that failed."""

    def __init__(self, hooks: Any, micro: MicroBatches):
        self._hooks, self._micro = hooks, micro

    def __call__(self) -> None:
        if self._micro.anew:
            self._hooks.reset()
        self._hooks.accumulate = self._micro.count
