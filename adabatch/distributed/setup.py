"""What adabatch.wrap does where several processes share each batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from adabatch.data.loader import AdaptiveDataLoader
from adabatch.distributed.agreement import check_same, facts_of_model, plain
from adabatch.distributed.grad_norms import is_sharded
from adabatch.distributed.group import Ranks, ranks_of
from adabatch.distributed.reduction import GlobalSums
from adabatch.distributed.shard import BatchShard
from adabatch.distributed.tensor_parallel import TensorParallel
from adabatch.distributed.weights import OutputWeights

OTHER_SHARE = (
    "the loader gives this process part {rank} of {world_size}, but it is number {own_rank} of the {own_size} that share each batch: build it with "
    "AdaptiveDataLoader(..., rank={own_rank}, world_size={own_size}), or pass a plain DataLoader to adabatch.wrap"
)
SHARDED_OTHERWISE = (
    "these parameters are sharded over another number of processes than the {world} that share each batch, as tensor parallelism does, and their gradients "
    "cannot be measured: {names}. Use a controller that measures nothing (controllers.Scheduled), or shard over the processes of group= alone (fully_shard)"
)


class DataParallel:
    """Several processes, one batch, one decision.

    Args:
        ranks: the processes.
        tensor_parallel: where several of them hold one replica of the model together and get the same samples.

    Attributes:
        sharing: this one's shares, once there is a loader.
    """

    def __init__(self, ranks: Ranks, tensor_parallel: TensorParallel | None = None):
        self.ranks, self.tensor_parallel = ranks, tensor_parallel
        self.data, self._replica = (ranks, ()) if tensor_parallel is None else (tensor_parallel.data, tensor_parallel.replica)
        self.sharing = BatchShard(self.data.world_size, replica_ranks=self._replica)

    @classmethod
    def find(cls, group: Any, estimator: str, model: nn.Module) -> DataParallel | None:
        """The processes that share each batch; None where this one is alone.

        Raises:
            RuntimeError, ValueError: see `ranks_of` and `TensorParallel.find`; an estimator that is for one process.
        """
        tensor_parallel = TensorParallel.find(model, group, estimator)
        if tensor_parallel is not None:
            return cls(tensor_parallel.everyone, tensor_parallel)
        ranks = ranks_of(group, required=estimator == "cross_rank")
        if ranks is None:
            return None
        if estimator == "micro_batch":
            raise ValueError(f"estimator='micro_batch' is for one process, and {ranks.world_size} share each batch: use 'cross_rank'")
        return cls(ranks)

    def take_loader(self, loader: DataLoader | AdaptiveDataLoader, summed: bool) -> AdaptiveDataLoader:
        """The adaptive loader of this process, whose order is that of all.

        Raises:
            ValueError: an AdaptiveDataLoader built for another process or number of them.
        """
        own = {"rank": self.data.rank, "world_size": self.data.world_size}
        adopted = not isinstance(loader, AdaptiveDataLoader)
        adaptive = AdaptiveDataLoader.from_loader(loader, **own) if adopted else loader
        processes = adaptive.batch_sampler.processes
        # Together, as an error on one process only would leave the others waiting.
        wrong = [(processes.rank, processes.world_size) != (own["rank"], own["world_size"])]
        if any(self.ranks.gather(wrong[0])):
            raise ValueError(
                OTHER_SHARE.format(rank=processes.rank, world_size=processes.world_size, own_rank=own["rank"], own_size=own["world_size"])
                if wrong[0]
                else "another process's loader was built for another process or number of them: see its error"
            )
        if adopted and adaptive.batch_sampler.shuffle:
            # Drawn from a generator, which each process may have seeded in its own way.
            adaptive.batch_sampler.seed = self.ranks.gather(adaptive.batch_sampler.seed)[0]
        own = {"broadcast_from_first": lambda value: self.ranks.gather(value)[0], "replica_ranks": self._replica}
        self.sharing = BatchShard(self.data.world_size, adaptive.batch_sampler, summed, **own)
        return adaptive

    def check_same(self, model: nn.Module, optimizer: Optimizer, loader: AdaptiveDataLoader, settings: Mapping[str, Any]) -> None:
        """Compare the set-ups of all processes before anything is put on the model.

        Raises:
            ValueError: on every process, with all that differs.
        """
        sampler = loader.batch_sampler
        facts = {name: plain(value) for name, value in settings.items()}
        facts |= {"parameters": facts_of_model(model), "optimizer": _facts_of_optimizer(optimizer)}
        try:
            facts["samples of an epoch"] = str(sampler.num_samples)
        except TypeError:
            facts["samples of an epoch"] = "unknown"
        facts |= {f"loader's {name}": plain(getattr(sampler, name)) for name in ("batch_size", "drop_last", "shuffle", "seed")}
        check_same(self.ranks, facts)

    def samples_here(self, samples: int | None) -> int | None:
        """How many samples this process measures, of `samples` of the whole batch."""
        return -(-samples // self.data.world_size) if isinstance(samples, int) and not isinstance(samples, bool) and samples > 0 else samples

    def agree_on_limit(self, loader: AdaptiveDataLoader) -> None:
        """The smallest of the limits on micro-batches that the processes found."""
        limits = [limit for limit in self.ranks.gather(loader.micro_batches.limit) if limit is not None]
        loader.micro_batches.limit = min(limits, default=None)

    def join(self, model: nn.Module, hooks: Any, scheduler: Any, *, of_processes: bool) -> None:
        """Let the model's outputs be weighed, and the scheduler decide on the sums over all processes."""
        sizes = {name: parameter.device_mesh.size() for name, parameter in hooks.parameters.items() if is_sharded(parameter)}
        foreign = [name for name, size in sizes.items() if size != self.ranks.world_size]
        if self.tensor_parallel is not None and hooks.parameters:
            hooks.set_norm_weights(self.tensor_parallel.shares(hooks))
        elif foreign:
            raise ValueError(SHARDED_OTHERWISE.format(world=self.ranks.world_size, names=", ".join(foreign[:10])))
        weights = OutputWeights(model, self.sharing)
        hooks.sharing = self.sharing

        def decision() -> dict[str, Any]:
            loader, sampler = scheduler.loader, scheduler.loader.batch_sampler
            numbers = {"step": scheduler.step_count, "batch size": scheduler.get_last_batch_size(), "samples seen": scheduler.samples_seen}
            return numbers | {"batches": loader.n_batches, "epoch": sampler.epoch, "position": loader.position, "measured next": hooks.enabled}

        on_host = all(parameter.device.type == "cpu" for parameter in model.parameters())
        options = {"batches": scheduler.accumulate, "summed": hooks.loss_reduction == "sum", "of_processes": of_processes, "waits": not on_host}
        options |= {"tensor_parallel": self.tensor_parallel}
        stage = GlobalSums(self.ranks, self.sharing, decision=decision, weights=weights, **options)
        _share_clock(scheduler.controller, stage)
        scheduler.add_stage(stage)


def _facts_of_optimizer(optimizer: Optimizer) -> str:
    lines = [type(optimizer).__name__]
    for group in optimizer.param_groups:
        values = ", ".join(f"{name}={plain(value)}" for name, value in sorted(group.items()) if name != "params" and isinstance(value, (int, float, str)))
        lines.append(f"{len(group['params'])} parameters, {values}")
    return "\n".join(lines)


def _share_clock(controller: Any, stage: GlobalSums) -> None:
    """Controllers that time steps read the processes' mean clock, as their own ones differ."""
    for part in (controller, *getattr(controller, "parts", ())):
        if getattr(part, "_clock", None) is time.perf_counter:
            part._clock = lambda: stage.seconds
        if part is not controller:
            _share_clock(part, stage)
