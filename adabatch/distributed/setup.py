"""What adabatch.wrap does where several processes share each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from adabatch._types import Processes
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.estimators.gradients import is_sharded
from adabatch.distributed.group import (
    HostGroup, canonical_repr, check_same, find_group, model_fingerprint,
)
from adabatch.distributed.reduction import MomentReduction
from adabatch.distributed.shard import BatchShard, OutputWeights
from adabatch.distributed.tensor_parallel import TensorParallel
from adabatch.grad_sample import GradSampleHooks
from adabatch.interfaces import Estimator
from adabatch.scheduler.decision import as_controller
from adabatch.scheduler.scheduler import BatchSizeScheduler

WRONG_PART = (
    "the loader gives this process part {rank} of {world_size}, but it is number {own_rank} of the "
    "{own_size} that share each batch: build it with AdaptiveDataLoader(..., rank={own_rank}, "
    "world_size={own_size}), or pass a plain DataLoader to adabatch.wrap")
ANOTHER_WRONG = (
    "another process's loader was built for a different process or number of processes: see its "
    "error")
WRONG_MESH = (
    "these parameters are sharded over a different number of processes than the {world} that share "
    "each batch, as tensor parallelism does, and their gradients cannot be measured: {names}. Use "
    "a controller that measures nothing (controllers.Scheduled), or shard over the processes of "
    "process_group= alone (fully_shard)")
ONE_PROCESS = (
    "estimator=MicroBatch() is for one process, and {world} share each batch: use CrossRank()")


class DistributedSetup:
    """Several processes, one batch, one decision: `data` are the processes among which batches are
    divided, `shard` is this one's part, once there is a loader; with `tensor_parallel` several of
    the `group` hold one replica of the model together and get the same samples."""

    def __init__(self, group: HostGroup, tensor_parallel: TensorParallel | None = None):
        self.group, self.tensor_parallel = group, tensor_parallel
        self.data = group if tensor_parallel is None else tensor_parallel.data
        self._replica: Sequence[int] = () if tensor_parallel is None else tensor_parallel.replica
        self.shard = BatchShard(self.data.world_size, replica_ranks=self._replica)

    @classmethod
    def find(cls, group: Processes, estimator: str, model: nn.Module) -> DistributedSetup | None:
        """The processes that share each batch; None where this one is alone. Errors: see
        `find_group` and `TensorParallel.find`; ValueError for an estimator of one process."""
        tensor_parallel = TensorParallel.find(model, group, estimator)
        if tensor_parallel is not None:
            return cls(tensor_parallel.everyone, tensor_parallel)
        found = find_group(group, required=estimator == "cross_rank")
        if found is not None and estimator == "micro_batch":
            raise ValueError(ONE_PROCESS.format(world=found.world_size))
        return None if found is None else cls(found)

    def take_loader(self, loader: DataLoader[object] | AdaptiveDataLoader, summed: bool
                    ) -> AdaptiveDataLoader:
        """The adaptive loader of this process, whose order is the same on all. ValueError for an
        AdaptiveDataLoader built for another process or number of processes."""
        data = self.data
        adopted = not isinstance(loader, AdaptiveDataLoader)
        adaptive = loader if isinstance(loader, AdaptiveDataLoader) else (
            AdaptiveDataLoader.from_loader(loader, rank=data.rank, world_size=data.world_size))
        sampler, built_for = adaptive.batch_sampler, adaptive.batch_sampler.shard
        rank, world_size = built_for.rank, built_for.world_size
        wrong = (rank, world_size) != (data.rank, data.world_size)
        # Together, as an error on one process only would leave the others waiting.
        if any(self.group.gather(wrong)):
            mine = WRONG_PART.format(rank=rank, world_size=world_size, own_rank=data.rank,
                                     own_size=data.world_size)
            raise ValueError(mine if wrong else ANOTHER_WRONG)
        if adopted and sampler.shuffle:
            # Drawn from a generator, which each process may have seeded differently.
            sampler.seed = self.group.broadcast_from_first(sampler.seed)
        broadcast = self.group.broadcast_from_first
        self.shard = BatchShard(data.world_size, sampler, summed, broadcast, self._replica)
        return adaptive

    def check_same(self, model: nn.Module, optimizer: Optimizer, loader: AdaptiveDataLoader,
                   settings: Mapping[str, object]) -> None:
        """Compare the set-ups of all processes before anything is put on the model; ValueError on
        every process, with all that differs."""
        sampler = loader.batch_sampler
        facts = {name: canonical_repr(value) for name, value in settings.items()}
        facts["parameters"] = model_fingerprint(model)
        facts["optimizer"] = _optimizer_fingerprint(optimizer)
        try:
            facts["samples of an epoch"] = str(sampler.num_samples)
        except TypeError:
            facts["samples of an epoch"] = "unknown"
        for name in ("batch_size", "drop_last", "shuffle", "seed"):
            facts[f"loader's {name}"] = canonical_repr(getattr(sampler, name))
        check_same(self.group, facts)

    def samples_here(self, samples: int | None) -> int | None:
        """How many samples this process measures, of `samples` of the whole batch."""
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            return samples  # None, or refused where it is checked
        return -(-samples // self.data.world_size)

    def agree_on_limit(self, loader: AdaptiveDataLoader) -> None:
        """Set the smallest of the limits on micro-batches that the processes found: all must cut
        their batches into equally many parts."""
        found = self.group.gather(loader.micro_batches.limit)
        limits = [limit for limit in found if limit is not None]
        loader.micro_batches.limit = min(limits, default=None)

    def join(self, model: nn.Module, hooks: Estimator, scheduler: BatchSizeScheduler, *,
             between_processes: bool) -> None:
        """Weight the model's outputs, and let the scheduler decide on the sums of all processes."""
        world, tensor_parallel = self.group.world_size, self.tensor_parallel
        foreign = [name for name, parameter in hooks.parameters.items()
                   if is_sharded(parameter) and parameter.device_mesh.size() != world]
        if tensor_parallel is not None and isinstance(hooks, GradSampleHooks):
            hooks.set_norm_weights(tensor_parallel.norm_weights(hooks))
        elif foreign:
            raise ValueError(WRONG_MESH.format(world=world, names=", ".join(foreign[:10])))
        hooks.shard = self.shard
        if tensor_parallel is not None:
            scheduler.process_group = self.group.ranks

        loader = scheduler.loader
        assert isinstance(loader, AdaptiveDataLoader)

        def decision() -> dict[str, object]:
            return {"step": scheduler.step_count, "batch size": scheduler.get_last_batch_size(),
                    "samples seen": scheduler.samples_seen, "batches": loader.n_batches,
                    "epoch": loader.batch_sampler.epoch, "position": loader.position,
                    "measured next": hooks.enabled}

        reduction = MomentReduction(
            self.group, self.shard, batches=scheduler.accumulate, decision=decision,
            parts=hooks.n_parts if isinstance(hooks, GradSampleHooks) else (0, 0),
            over_samples=hooks.tensors_over_samples,
            summed=hooks.loss_reduction == "sum", between_processes=between_processes,
            weights=OutputWeights(model, self.shard), tensor_parallel=tensor_parallel,
            waits=any(parameter.device.type != "cpu" for parameter in model.parameters()))
        context = replace(scheduler.context, clock=lambda: reduction.seconds)
        as_controller(scheduler.controller).bind(context)
        scheduler.add_stage(reduction)


def _optimizer_fingerprint(optimizer: Optimizer) -> str:
    lines = [type(optimizer).__name__]
    for group in optimizer.param_groups:
        plain = [f"{name}={canonical_repr(value)}" for name, value in sorted(group.items())
                 if name != "params" and isinstance(value, (int, float, str))]
        lines.append(f"{len(group['params'])} parameters, {', '.join(plain)}")
    return "\n".join(lines)
