"""The variance of the gradient from the gradients of whole processes, before they are averaged: nothing is measured per sample, so any model will do.

Legend: W processes, b_r of the step's m samples on process r, g_r the mean gradient of its samples, ḡ = Σ b_r g_r / m that of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from adabatch._checks import check_version
from adabatch.distributed.shard import BatchShard
from adabatch.estimators.loss_scale import LossScale
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.pooling import LOSS_REDUCTIONS

CommHook = Callable[[Any, Any], Any]
NO_WRAPPER = (
    "the cross-rank estimator takes each process's gradient where it is handed over for averaging, and found neither DistributedDataParallel nor a module "
    "under fully_shard in {kind}. Wrap the model before adabatch.wrap, or leave estimator= at 'per_sample'"
)
TWICE = (
    "gradients were averaged more than once in this step, so that those of one process cannot be told: run all but the last of a step's backward passes "
    "inside model.no_sync() (fully_shard: model.set_requires_gradient_sync(False)); with micro-batches, all where loader.is_last_micro_batch is False"
)
NOTHING = "no gradient was handed over for averaging since the last step: call loss.backward() outside no_sync() once before scheduler.step(loss)"


class CrossRankMoments:
    """What GradSampleHooks is for samples, for processes: stands in its place in BatchSizeScheduler.

    ‖g_r‖² is taken in DistributedDataParallel's communication hook (under fully_shard in the call that scatters gradients), ‖ḡ‖² when the backward pass ends.
    From all processes' numbers the scheduler's stage then makes T̂ = Σ b_r‖g_r − ḡ‖²/(W − 1), with W − 1 degrees of freedom against m − 1 per sample.

    Args:
        model: in DistributedDataParallel or under fully_shard.
        shard: this process's shares of the batches.
        loss_reduction: 'mean' or 'sum'.
        accumulate: batches per step.
        grad_scaler: the GradScaler that scales the loss.
        comm_hook, comm_state: a communication hook (state, bucket) of the caller's own that does the averaging, a compressing one for instance. Given here and
            not to the model, which takes one only.

    Raises:
        ValueError: a model without such a wrapper, an unknown loss_reduction, a comm_hook under fully_shard.
        RuntimeError: the model has a communication hook already, or torch is too old to hear fully_shard.
    """

    measures: frozenset[str] = frozenset()

    def __init__(
        self,
        model: nn.Module,
        shard: BatchShard,
        *,
        loss_reduction: str = "mean",
        accumulate: int = 1,
        grad_scaler: Any = None,
        comm_hook: CommHook | None = None,
        comm_state: Any = None,
    ):
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {loss_reduction!r}")
        self.loss_reduction, self.accumulate, self.enabled, self.by_samples = loss_reduction, accumulate, True, False
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shard, self.loss_scale = shard, LossScale(grad_scaler)
        self.reset()
        parallel = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
        if parallel is not None:
            _listen_to_buckets(parallel, weakref.ref(self), comm_hook, comm_state)
        else:
            _listen_to_shards(model, weakref.ref(self), comm_hook)

    def hear(self, place: Any, gradient: Tensor) -> None:
        """A piece of this process's gradient, about to be averaged."""
        if not self.enabled:
            return
        self._repeated |= place in self._parts
        if not self._parts:
            # Twice: DistributedDataParallel writes the averages in a last callback of its own.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._complete))
        self._parts[place] = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64 if gradient.dtype == torch.float64 else torch.float32).square()

    def _complete(self) -> None:
        self._whole = self.shard.grad_sq_norms([list(self.parameters.values())])
        self.loss_scale.read()

    def collect(self, **given: Any) -> GradientMoments:
        """This process's ‖g_r‖² [1] and its part of ‖ḡ‖²; the scheduler's stage adds up those of all.

        Raises:
            RuntimeError: gradients were not averaged once since the last step.
            ValueError: weights or loss_scale, which this estimator does not take.
        """
        if given:
            raise ValueError(f"the cross-rank estimator takes neither weights nor loss_scale, got {sorted(given)}: use GradSampleHooks")
        try:
            if self._repeated or self._whole is None:
                raise RuntimeError(TWICE if self._repeated else NOTHING)
            return self._moments()
        finally:
            self.reset()

    def _moments(self) -> GradientMoments:
        world, share, m = self.shard.world_size, self.shard.fraction_of(self.accumulate), self.shard.size_of(self.accumulate)
        summed, scale = self.loss_reduction == "sum", self.loss_scale.noted(None).factor()
        own = 1 / (scale * world * (share * m if summed else share))
        whole = 1 / (scale * (m if summed else 1))
        sq_norm = float(sum(part.double().cpu() for part in self._parts.values())) * own**2
        return GradientMoments(m, torch.tensor([sq_norm], dtype=torch.float64), float(self._whole.double().sum()) * whole**2, share=share)

    def reset(self) -> None:
        """Forget what came by since the last collect()."""
        self._parts: dict[Any, Tensor] = {}
        self._whole: Tensor | None = None
        self._repeated = False
        self.loss_scale.clear()

    def remove(self) -> None:
        """Hear no more. The communication hook stays, as the model cannot be rid of it, and does the averaging alone."""
        self.enabled = False
        self.loss_scale.remove()
        self.hear = lambda place, gradient: None  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {"version": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "CrossRankMoments")


def _listen_to_buckets(model: DistributedDataParallel, owner: weakref.ref[CrossRankMoments], comm_hook: CommHook | None, comm_state: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    average, state = (allreduce_hook, model.process_group) if comm_hook is None else (comm_hook, comm_state)

    def hear_and_average(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        own = owner()
        if own is not None:
            own.hear(bucket.index(), bucket.buffer())
        return average(state, bucket)

    # DistributedDataParallel asks for these very annotations, not for their text.
    hear_and_average.__annotations__ = {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[Tensor]}
    try:
        model.register_comm_hook(state, hear_and_average)
    except RuntimeError as error:
        cure = "do not register it, pass it to adabatch.wrap(comm_hook=, comm_state=)"
        raise RuntimeError(f"the model has a communication hook already ({error}): {cure}") from error


def _listen_to_shards(model: nn.Module, owner: weakref.ref[CrossRankMoments], comm_hook: CommHook | None) -> None:
    sharded = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "unshard")]
    if not sharded:
        raise ValueError(NO_WRAPPER.format(kind=type(model).__name__))
    if comm_hook is not None:
        raise ValueError("comm_hook= is of DistributedDataParallel; fully_shard takes none. Leave it away")
    if not all(hasattr(module, "set_custom_reduce_scatter") for module in sharded):
        raise RuntimeError(f"torch {torch.__version__} does not let fully_shard's gradients be heard: use torch >= 2.9, or DistributedDataParallel")
    for place, module in enumerate(sharded):
        module.set_custom_reduce_scatter(_HeardReduceScatter(place, owner))


class _HeardReduceScatter:
    """fully_shard's own reduce-scatter, heard."""

    def __init__(self, place: int, owner: weakref.ref[CrossRankMoments]):
        self._place, self._owner = place, owner

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A plain buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        own = self._owner()
        if own is not None:
            if input_tensor.dtype == torch.float16:
                raise RuntimeError("fully_shard divides float16 gradients before it hands them over: reduce in float32 (MixedPrecisionPolicy(reduce_dtype=))")
            own.hear(self._place, input_tensor)
        scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor  # its name before torch 2.13
        return scatter(output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op)
