"""The processes that share each batch, as one of them sees the others."""

from __future__ import annotations

import os
import pickle
import zlib
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NOT_INITIALISED = (
    "{why}, but torch.distributed has no process group: call torch.distributed.init_process_group() (and wrap the model in DistributedDataParallel or "
    "fully_shard) before adabatch.wrap"
)
CHANGED = (
    "this run was wrapped with {before} processes, and the process group {now}: call adabatch.wrap again in the new group and load the last checkpoint "
    "(load_state_dict takes one of any number of processes)"
)


# {ranks: (the default group it was made in, the group)}, and how many were made, which names the next one.
_host_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}
_made: Counter[tuple[int, ...]] = Counter()


class Ranks:
    """A data-parallel group and a gloo group of its own beside it, for small vectors of numbers on the host: neither mixes with the gradients' communication.

    Args:
        group: a ProcessGroup, a DeviceMesh all of whose processes share each batch (that of HSDP, or the data-parallel part of a larger one), a list of ranks
            in the default group, or None for all of it. All its processes must make their Ranks.
        timeout: of the collectives; None for torch's default.

    Attributes:
        rank, world_size: of this process in the group, and the number of them.
        ranks: all, as numbered in the default group.

    Raises:
        RuntimeError: no process group.

    Example:
        >>> import tempfile
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        >>> ranks = Ranks()
        >>> ranks.sum([1.0, 2.0]), ranks.gather("a")
        ([1.0, 2.0], ['a'])
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: Any = None, timeout: timedelta | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(NOT_INITIALISED.format(why="several processes are to share each batch"))
        self._default = dist.group.WORLD
        if group is None:
            self.ranks = list(range(dist.get_world_size()))
        elif isinstance(group, list):
            self.ranks = sorted(group)
        elif hasattr(group, "mesh"):
            self.ranks = sorted(group.mesh.flatten().tolist())
        else:
            self.ranks = sorted(dist.get_process_group_ranks(group))
        self.world_size, self.rank = len(self.ranks), self.ranks.index(dist.get_rank())
        self._group = _host_group(tuple(self.ranks), timeout)

    def sum(self, values: list[float]) -> list[float]:
        """The vectors of all processes added up, in float64: the same bits on each."""
        return self.start_sum(values)()

    def start_sum(self, values: list[float]) -> Any:
        """The same, without waiting: a callable that waits for the sum and gives it."""
        vector = torch.tensor(values, dtype=torch.float64)
        work = self._group.allreduce([vector])

        def wait() -> list[float]:
            work.wait()
            return vector.tolist()

        return wait

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes, in the order of their ranks."""
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._all_gather(torch.tensor([len(packed)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(packed)] = packed
        return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(self._all_gather(padded), sizes, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._group.allgather([gathered], [tensor]).wait()
        return gathered

    def sum_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Add up tensors of all processes in place, through the host where they are on an accelerator."""
        if not tensors:
            return
        flat = torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])
        self._group.allreduce([flat]).wait()
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def check_unchanged(self) -> None:
        """Refuse to go on in another process group than the one this was made in.

        Raises:
            RuntimeError: it was destroyed, or made anew.
        """
        if not dist.is_initialized():
            raise RuntimeError(CHANGED.format(before=self.world_size, now="is gone"))
        if dist.group.WORLD is not self._default:
            raise RuntimeError(CHANGED.format(before=self.world_size, now=f"was made anew, with {dist.get_world_size()}"))


def _host_group(ranks: tuple[int, ...], timeout: timedelta | None) -> Any:
    """A gloo group of these processes.

    Not by torch.distributed.new_group, which all processes must call in one order, also those outside: it names groups by how many a process has made.
    """
    world, group = _host_groups.get(ranks, (None, None))
    if world is not dist.group.WORLD:
        # torchrun may keep its store, with the addresses of processes that are gone, from one attempt to the next.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"adabatch/{attempt}/{zlib.crc32(repr(ranks).encode())}/{_made[ranks]}", dist.distributed_c10d._get_default_store())
        _made[ranks] += 1
        group = dist.ProcessGroupGloo(store, ranks.index(dist.get_rank()), len(ranks), timeout=timeout or dist.default_pg_timeout)
        _host_groups[ranks] = dist.group.WORLD, group
    return group


def ranks_of(group: Any = None, *, required: bool = False) -> Ranks | None:
    """The processes that share each batch; None where this one is alone.

    Args:
        group: as for Ranks.
        required: several are needed.

    Raises:
        RuntimeError: a launcher started several processes, or a group is given, but there is no process group.
        ValueError: several are needed, and this one is alone.

    Example:
        >>> ranks_of() is None
        True
    """
    if not (dist.is_available() and dist.is_initialized()):
        launched = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
        if launched.isdigit() and int(launched) > 1:
            raise RuntimeError(NOT_INITIALISED.format(why=f"{launched} processes were launched (WORLD_SIZE)"))
        if group is not None:
            raise RuntimeError(NOT_INITIALISED.format(why="group= is given"))
        alone = True
    else:
        alone = (dist.get_world_size() if group is None else group.size()) == 1
    if alone and required:
        raise ValueError("estimator='cross_rank' compares the gradients of at least 2 processes, and there is one: launch more, or leave estimator= away")
    return None if alone else Ranks(group)
