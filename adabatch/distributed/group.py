"""The processes that share each batch: small collectives on the host, checks that they agree."""

from __future__ import annotations

import os
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adabatch._types import Processes
from adabatch.controllers.base import Controller

T = TypeVar("T")
NOT_INITIALISED = (
    "{why}, but torch.distributed has no process group: call "
    "torch.distributed.init_process_group() (and wrap the model in DistributedDataParallel or "
    "fully_shard) before adabatch.wrap")
CHANGED = (
    "this run was wrapped with {before} processes, and the process group {now}: call adabatch.wrap "
    "again in the new group and load the last checkpoint (it fits any number of processes)")
ALONE = (
    "estimator=CrossRank() compares the gradients of at least 2 processes, and there is one: "
    "launch more processes, or omit estimator=")
DIVERGED = (
    "the processes decided differently, although all were given the same numbers:\n{lines}\nA "
    "controller, a schedule or a training loop that uses a clock, a random number or numbers of "
    "one process makes them differ: use those of scheduler.diagnostics, which are the same "
    "everywhere")
UNREGISTERED = (
    "a checkpoint of the processes {ranks} alone needs torch's own group of them: on every process "
    "of the world call group = torch.distributed.new_group({ranks}), and on these set "
    "scheduler.process_group = group")
SHOWN = 200  # characters of a value in an error
CHECKSUM = 4  # numbers that a checksum adds to a vector

# {ranks: (the default group it was made in, the group)}, and how many were made, which names the
# next one.
_host_groups: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}
_made: Counter[tuple[int, ...]] = Counter()


class HostGroup:
    """Processes, and a gloo group for small vectors of theirs on the host, separate from the
    gradients' communication. All of them must make their HostGroup; RuntimeError without a default
    group.

    Attributes:
        rank, world_size: of this process in the group, and the number of processes.
        ranks: of all of them, as numbered in the default group.

    Example:
        >>> import tempfile
        >>> init = f"file://{tempfile.mktemp()}"
        >>> dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
        >>> group = HostGroup()
        >>> group.start_sum([1.0, 2.0])(), group.gather("a")
        ([1.0, 2.0], ['a'])
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: Processes = None, timeout: timedelta | None = None):
        if not is_initialized():
            raise RuntimeError(NOT_INITIALISED.format(why="several processes share each batch"))
        self._default = dist.group.WORLD
        self.ranks = ranks_of(group)
        self.world_size, self.rank = len(self.ranks), self.ranks.index(dist.get_rank())
        self._group = _host_group(tuple(self.ranks), timeout)

    def start_sum(self, values: list[float]) -> Callable[[], list[float]]:
        """Start adding up the vectors of all processes, in float64: a function that waits for the
        sum, the same bits on each, and returns it."""
        vector = torch.tensor(values, dtype=torch.float64)
        work = self._group.allreduce([vector])

        def wait() -> list[float]:
            work.wait()
            return vector.tolist()

        return wait

    def gather(self, value: T) -> list[T]:
        """The objects of all processes, in the order of their ranks."""
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(packed)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(packed)] = packed
        parts = zip(self._all_gather(padded), sizes, strict=True)
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in parts]

    def broadcast_from_first(self, value: T) -> T:
        """The first process's object."""
        return self.gather(value)[0]

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Add up tensors of all processes in place, through the host."""
        if not tensors:
            return
        flat = torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])
        self._group.allreduce([flat]).wait()
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def check_unchanged(self) -> None:
        """Raise RuntimeError where the default group was destroyed, or created again."""
        if dist.is_initialized() and dist.group.WORLD is self._default:
            return
        again = dist.is_initialized()
        now = f"was created again, with {dist.get_world_size()}" if again else "is gone"
        raise RuntimeError(CHANGED.format(before=self.world_size, now=now))

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._group.allgather([gathered], [tensor]).wait()
        return gathered


def is_initialized() -> bool:
    """Whether torch.distributed has a process group."""
    return dist.is_available() and dist.is_initialized()


def ranks_of(group: Processes = None) -> list[int]:
    """Their ranks in the default group, in order."""
    if group is None:
        return list(range(dist.get_world_size()))
    if isinstance(group, list):
        return sorted(group)
    if isinstance(group, dist.ProcessGroup):
        return sorted(dist.get_process_group_ranks(group))
    return sorted(group.mesh.flatten().tolist())


def find_group(group: Processes = None, *, required: bool = False) -> HostGroup | None:
    """The processes that share each batch; None where this one is alone.

    Raises:
        RuntimeError: a launcher started several processes, or a group is given, but there is no
            process group.
        ValueError: several are `required`, and this one is alone.
    """
    if not is_initialized():
        launched = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
        if launched.isdigit() and int(launched) > 1:
            why = f"{launched} processes were launched (WORLD_SIZE)"
            raise RuntimeError(NOT_INITIALISED.format(why=why))
        if group is not None:
            raise RuntimeError(NOT_INITIALISED.format(why="process_group= is given"))
    alone = not is_initialized() or len(ranks_of(group)) == 1
    if alone and required:
        raise ValueError(ALONE)
    return None if alone else HostGroup(group)


def registered_group(group: Processes = None) -> dist.ProcessGroup | None:
    """torch's own group of these processes, for its collectives; None for the default group.
    RuntimeError where there is none: a mesh of several dimensions over a part of all processes."""
    ranks = ranks_of(group)
    if len(ranks) == dist.get_world_size():
        return None
    if isinstance(group, dist.ProcessGroup):
        return group
    if group is None or isinstance(group, list) or group.ndim > 1:
        raise RuntimeError(UNREGISTERED.format(ranks=ranks))
    return group.get_group()


def _host_group(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    """A gloo group of these processes. Not by torch.distributed.new_group, which numbers the groups
    that the process has created: all processes, members or not, would have to call it."""
    world, group = _host_groups.get(ranks, (None, None))
    if group is None or world is not dist.group.WORLD:
        # torchrun may keep its store, with the addresses of processes that are gone, from one
        # attempt to the next.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"adabatch/{attempt}/{zlib.crc32(repr(ranks).encode())}/{_made[ranks]}"
        store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        _made[ranks] += 1
        timeout = timeout or dist.default_pg_timeout
        rank = ranks.index(dist.get_rank())
        gloo = dist.ProcessGroupGloo(store, rank, len(ranks), timeout=timeout)
        group = cast("dist.ProcessGroup", gloo)  # torch's stubs call it a Backend
        _host_groups[ranks] = dist.group.WORLD, group
    return group


# -- agreement: what differs between processes raises the same error on every one of them


def check_same(group: HostGroup, facts: Mapping[str, str]) -> None:
    """Compare facts over all processes. Checksums are exchanged; values only where these differ.
    ValueError, on every process the same, with what differs, the values and the ranks."""
    sums = group.gather({name: zlib.crc32(value.encode()) for name, value in facts.items()})
    names = {name for each in sums for name in each}
    differing = sorted(name for name in names if len({each.get(name) for each in sums}) > 1)
    if differing:
        values = group.gather({name: facts.get(name, "nothing") for name in differing})
        lines = _differences(group, differing, values)
        raise ValueError(f"the {group.world_size} processes are set up differently; give each the "
                         f"same:\n{lines}")


def model_fingerprint(model: nn.Module) -> str:
    """Names, shapes, dtypes and requires_grad of all parameters, one per line."""
    lines = []
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        frozen = "" if parameter.requires_grad else " frozen"
        lines.append(f"{name} {tuple(parameter.shape)} {dtype}{frozen}")
    return "\n".join(lines)


def canonical_repr(value: object) -> str:
    """A value as text that is the same in every process; objects by type and arguments.

    Example:
        >>> canonical_repr(0.5), canonical_repr(nn.ReLU), canonical_repr([1, None])
        ('0.5', 'ReLU', '[1, None]')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        values = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return f"[{', '.join(map(canonical_repr, values))}]"
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=repr)
        return f"{{{', '.join(f'{key!r}: {canonical_repr(each)}' for key, each in pairs)}}}"
    names: Sequence[str] = ()
    arguments = []
    if isinstance(value, Controller):
        names, arguments = value.init_args, [canonical_repr(each) for each in value.children]
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
    arguments += [f"{name}={canonical_repr(getattr(value, name))}" for name in names]
    if arguments:
        return f"{type(value).__name__}({', '.join(arguments)})"
    return getattr(value, "__name__", type(value).__name__)


def checksum(decision: object) -> list[float]:
    """CHECKSUM numbers to add up over the processes: two halves h of a CRC, each with its square.
    Σh² = (Σh)²/W only if all h are equal; with 16 bits the sums are exact in float64 for millions
    of processes."""
    code = zlib.crc32(repr(decision).encode())
    return [float(part) for half in (code >> 16, code & 0xFFFF) for part in (half, half * half)]


def checksums_agree(sums: Sequence[float], world_size: int) -> bool:
    """Whether all processes added the same checksum."""
    return all(sums[at] ** 2 == world_size * sums[at + 1] for at in range(0, CHECKSUM, 2))


def raise_divergence(group: HostGroup, decision: Mapping[str, object]) -> NoReturn:
    """Raise RuntimeError on every process, with what differs and on which ranks."""
    values = group.gather({name: canonical_repr(value) for name, value in decision.items()})
    names = [name for name in decision if len({each[name] for each in values}) > 1]
    raise RuntimeError(DIVERGED.format(lines=_differences(group, names, values)))


def _differences(group: HostGroup, names: Sequence[str], values: Sequence[dict[str, str]]) -> str:
    """A line per name: 'a on ranks 0, 2; b on rank 1', long values by the line that differs."""
    lines = []
    for name in names:
        ranks_of_value: dict[str, list[int]] = {}
        shown = _first_difference([each[name] for each in values])
        for rank, value in zip(group.ranks, shown, strict=True):
            ranks_of_value.setdefault(value, []).append(rank)
        parts = [f"{value[:SHOWN]} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                 for value, ranks in ranks_of_value.items()]
        lines.append(f"  - {name}: {'; '.join(parts)}")
    return "\n".join(lines)


def _first_difference(values: Sequence[str]) -> list[str]:
    lines = [value.split("\n") for value in values]
    longest = max(map(len, lines))
    if longest == 1:
        return list(values)
    padded = [own + ["nothing"] * (longest - len(own)) for own in lines]
    return list(next(line for line in zip(*padded, strict=True) if len(set(line)) > 1))
