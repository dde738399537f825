"""The variance of the gradient from whole processes' gradients before they are averaged.

Nothing is measured per sample, so that any model will do.

Legend: W processes, b_r of the step's m samples on process r, g_r the mean gradient of its samples,
ḡ = Σ b_r g_r / m that of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adabatch._checks import check_version
from adabatch._transfers import DelayedMoments, HostCopies
from adabatch.estimators.gradients import at_backward_end, check_arguments
from adabatch.estimators.loss_scale import StepScale, step_scale
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import Estimator, ProcessShare, State
from adabatch.kernels import accumulation_dtype

NO_WEIGHTS = "the cross-rank estimator does not support weights=: use the per-sample estimator"
CommHook = Callable[[Any, Any], Any]
NO_WRAPPER = (
    "the cross-rank estimator takes each process's gradient where it is handed over for averaging, "
    "and found neither DistributedDataParallel nor a module under fully_shard in {kind}. Wrap the "
    "model before adabatch.wrap, or use the per-sample estimator"
)
TWICE = (
    "gradients were averaged more than once in this step, so that the process's own gradient is "
    "not known: run all but the last of a step's backward passes inside model.no_sync() "
    "(fully_shard: model.set_requires_gradient_sync(False)); with micro-batches, all where "
    "loader.is_last_micro_batch is False"
)
NOTHING = (
    "no gradient was handed over for averaging since the last step: call loss.backward() outside "
    "no_sync() once before scheduler.step(loss)"
)
HAS_HOOK = (
    "the model has a communication hook already ({error}): do not register it, pass it as "
    "estimator=CrossRank(comm_hook=, comm_state=)"
)
TOO_OLD = (
    "torch {version} has no hook for fully_shard's gradients: use torch >= 2.9, or "
    "DistributedDataParallel"
)
FLOAT16 = (
    "fully_shard divides float16 gradients before it hands them over: reduce in float32 "
    "(MixedPrecisionPolicy(reduce_dtype=))"
)


class CrossRankEstimator(Estimator):
    """Squared norms of this process's gradient and of the average over all processes.

    ‖g_r‖² is taken in DistributedDataParallel's communication hook (under fully_shard in the call
    that scatters gradients), ‖ḡ‖² when the backward pass ends. MomentReduction computes
    T̂ = Σ b_r‖g_r − ḡ‖²/(W − 1) from all processes' numbers, with W − 1 degrees of freedom against
    m − 1 per sample.

    Args:
        model: in DistributedDataParallel or under fully_shard.
        shard: this process's part of the batches.
        loss_reduction: 'mean' or 'sum'.
        accumulate: batches per step.
        comm_hook, comm_state: a user-supplied communication hook (state, bucket) that does the
            averaging, a compressing one for instance; passed here, because the model takes only
            one.

    Raises:
        ValueError: a model without such a wrapper, an unknown loss_reduction, a comm_hook under
            fully_shard.
        RuntimeError: the model has a communication hook already, or torch is too old.
    """

    measures: frozenset[str] = frozenset()
    shard: ProcessShare
    _whole: Tensor | None

    def __init__(
        self,
        model: nn.Module, shard: ProcessShare, *, loss_reduction: str = "mean", accumulate: int = 1,
        comm_hook: CommHook | None = None, comm_state: object = None,
    ):
        check_arguments(loss_reduction, accumulate=accumulate)
        self.loss_reduction, self.accumulate = loss_reduction, accumulate
        named = model.named_parameters()
        self.parameters = {name: each for name, each in named if each.requires_grad}
        self.shard = shard
        self.enabled, self._removed = True, False
        self.reset()
        modules = model.modules()
        ddp = next((each for each in modules if isinstance(each, DistributedDataParallel)), None)
        if ddp is not None:
            _observe_buckets(ddp, weakref.ref(self), comm_hook, comm_state)
        else:
            _observe_shards(model, weakref.ref(self), comm_hook)

    def on_gradient(self, place: Hashable, gradient: Tensor) -> None:
        """A piece of this process's gradient is about to be averaged."""
        if not self.enabled or self._removed:
            return
        self._repeated |= place in self._sq_norms
        if not self._sq_norms:
            at_backward_end(self._end_pass)
        dtype = accumulation_dtype(gradient)
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
        self._sq_norms[place] = norm.square()

    def _end_pass(self) -> None:
        self._whole = self.shard.grad_sq_norms([list(self.parameters.values())])
        for callback in self.on_backward_end:
            callback()

    def observe(
        self, *, weights: Tensor | Sequence[float] | None = None,
        loss_scale: float | StepScale | None = None,
    ) -> DelayedMoments:
        """This process's ‖g_r‖² [1] and its part of ‖ḡ‖²; MomentReduction adds up all processes'.

        Raises:
            RuntimeError: gradients were not averaged exactly once since the last step.
            ValueError: weights, which this estimator does not support.
        """
        if weights is not None:
            raise ValueError(NO_WEIGHTS)
        try:
            if self._repeated or self._whole is None:
                raise RuntimeError(TWICE if self._repeated else NOTHING)
            return self._pending(self._whole, loss_scale)
        finally:
            self.reset()

    def _pending(self, whole: Tensor, loss_scale: float | StepScale | None) -> DelayedMoments:
        shard, copies, summed = self.shard, HostCopies(), self.loss_reduction == "sum"
        fraction, m = shard.fraction_of(self.accumulate), shard.size_of(self.accumulate)
        world, grad_sq_norm = shard.world_size, copies.add(whole)
        parts = [copies.add(part) for part in self._sq_norms.values()]
        scale = step_scale(loss_scale).copied(copies)

        def compute() -> GradientMoments:
            factor = scale.factor()
            own = 1 / (factor * world * fraction * (m if summed else 1)) ** 2
            all_samples = 1 / (factor * (m if summed else 1)) ** 2
            sq_norm = torch.tensor([sum(map(float, parts)) * own], dtype=torch.float64)
            average = float(grad_sq_norm.double().sum()) * all_samples
            return GradientMoments(m, sq_norm, average, share=fraction)

        return DelayedMoments(copies, compute)

    def reset(self) -> None:
        """Discard what was measured since the last observe()."""
        self._sq_norms: dict[Hashable, Tensor] = {}
        self._whole = None
        self._repeated = False

    def remove(self) -> None:
        """Measure no more; the communication hook, which torch cannot remove, only averages."""
        self._removed = True

    def load_state_dict(self, state: State) -> None:
        """There is nothing to load.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "CrossRankEstimator")


def _observe_buckets(
    model: DistributedDataParallel, owner: weakref.ref[CrossRankEstimator],
    comm_hook: CommHook | None, comm_state: object,
) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    state, average = (comm_state, comm_hook) if comm_hook else (model.process_group, allreduce_hook)

    def observe_and_average(state: Any, bucket: Any) -> Any:
        estimator = owner()
        if estimator is not None:
            estimator.on_gradient(bucket.index(), bucket.buffer())
        return average(state, bucket)

    # DistributedDataParallel compares the annotations themselves, not their text.
    observe_and_average.__annotations__ = {
        "bucket": torch.distributed.GradBucket, "return": torch.futures.Future[Tensor],
    }
    try:
        model.register_comm_hook(state, observe_and_average)
    except RuntimeError as error:
        raise RuntimeError(HAS_HOOK.format(error=error)) from error


def _observe_shards(
    model: nn.Module, owner: weakref.ref[CrossRankEstimator], comm_hook: CommHook | None
) -> None:
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ValueError(NO_WRAPPER.format(kind=type(model).__name__))
    if comm_hook is not None:
        raise ValueError("comm_hook= is for DistributedDataParallel, not fully_shard: omit it")
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        raise RuntimeError(TOO_OLD.format(version=torch.__version__))
    for place, module in enumerate(sharded):
        observed: Any = _ObservedReduceScatter(place, owner)
        module.set_custom_reduce_scatter(observed)


class _ObservedReduceScatter:
    """fully_shard's own reduce-scatter, which first passes the gradient to the estimator."""

    def __init__(self, place: int, owner: weakref.ref[CrossRankEstimator]):
        self._place, self._owner = place, owner
        distributed: Any = torch.distributed
        # Its name before torch 2.13 is the second.
        single = getattr(distributed, "reduce_scatter_single", None)
        self._scatter = single or distributed.reduce_scatter_tensor

    def allocate(self, size: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A plain buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: object, op: object,
        async_op: bool = False,
    ) -> Any:
        estimator = self._owner()
        if estimator is not None:
            if input_tensor.dtype == torch.float16:
                raise RuntimeError(FLOAT16)
            estimator.on_gradient(self._place, input_tensor)
        tensors = {"output": output_tensor, "input": input_tensor}
        return self._scatter(**tensors, group=group, op=op, async_op=async_op)
