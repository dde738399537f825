"""Tensor parallelism: which processes share each batch, which share each layer, what pieces count.

Legend: D processes that share each batch, T that hold one replica of the model together, D·T total.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from adabatch._types import Processes
from adabatch.estimators.gradients import is_sharded
from adabatch.distributed.group import HostGroup, is_initialized, ranks_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

    from adabatch.grad_sample import GradSampleHooks
    from adabatch.grad_sample.taps.base import TapSite

GROUP = (
    "these parameters are split over processes that do not share each batch but hold one replica "
    "of the model together (tensor parallel): {names}. Pass the processes that do share each batch "
    'to adabatch.wrap: process_group=mesh["dp"], the data-parallel part of the device mesh')
CANNOT = (
    "these tensor-parallel layers cannot be measured:\n{problems}\nPass ignore=[...], or use a "
    "controller that measures nothing (controllers.Scheduled)")
NORMS_ONLY = (
    "tensor-parallel layers are measured without {statistics}, which the controller, coupling or "
    "argument needs: use one that needs norms alone (CABS with SGD, NoiseScale), one that measures "
    "nothing (controllers.Scheduled), or omit PerSample(inner_products=)")
ESTIMATOR = (
    "the {estimator} estimator does not support tensor-parallel layers ({names}): use PerSample()")
DIFFER = (
    "gradients that should be equal differ between processes when the backward pass ends (squared "
    "norms by rank: {values}): {cause}")
PARTLY_USED = (
    "a parameter that is not split is used on a part of the samples' activations, or nothing "
    "averages gradients over the processes of process_group=")
NOT_AVERAGED = (
    "nothing averages them over the processes of process_group= (wrap the model in fully_shard "
    "over that part of the mesh)")
TOLERANCE = 1e-5  # relative spread of squared norms of gradients that should be equal
SHOWN = 10  # names in an error


@dataclass(frozen=True)
class TensorParallel:
    """How a model is split."""

    data: HostGroup  # the D processes that share each batch
    everyone: HostGroup  # all D·T
    replica: list[int]  # ranks in the default group of the T that hold this process's replica

    @classmethod
    def find(cls, model: nn.Module, group: Processes, estimator: str) -> TensorParallel | None:
        """None where no parameter is split over processes that hold one replica together.
        ValueError on every process, where the group does not say which share each batch."""
        sharded = _sharded(model)
        if not is_initialized() or not sharded:
            return None
        data = ranks_of(group) if group is not None else _default_data_ranks(model, sharded)
        lines = {name: _replica_line(parameter, data) for name, parameter in sharded.items()}
        split = {name: frozenset(own) for name, (own, _) in lines.items() if len(own) > 1}
        wrong = [name for name, (_, fits) in lines.items() if not fits]
        wrong += [name for name in _split_over(model, sharded, data) if name not in wrong]
        if len(set(split.values())) > 1 or wrong:
            raise ValueError(GROUP.format(names=", ".join((wrong or list(split))[:SHOWN])))
        if not split:
            return None
        if estimator != "per_sample":
            names = ", ".join(list(split)[:SHOWN])
            raise ValueError(ESTIMATOR.format(estimator=estimator, names=names))
        data_group = HostGroup(data)
        own = sorted(next(iter(split.values())))
        everyone = {rank for ranks in data_group.gather(own) for rank in ranks}
        return cls(data_group, HostGroup(sorted(everyone)), own)

    def norm_weights(self, hooks: GradSampleHooks) -> dict[str, float]:
        """The factor on each parameter's norms: 1 for pieces, 1/T for what all T compute whole.
        ValueError listing the layers for which neither holds."""
        statistics = sorted(hooks.statistics)
        if statistics:
            raise ValueError(NORMS_ONLY.format(statistics=", ".join(statistics)))
        parameters = hooks.parameters
        split = {name: self._split_dim(parameter) for name, parameter in parameters.items()}
        tapped = {full for site in hooks.sites for full in site.parameters.values()}
        problems = [f"{name}: used outside a layer" for name, dim in split.items()
                    if dim is not None and name not in tapped]
        users: dict[str, int] = {}
        weights = dict.fromkeys(parameters, 1 / len(self.replica))
        for site in hooks.sites[:-1]:
            names = site.parameters
            own = {name: split[full] for name, full in names.items()}
            is_split = any(self._is_split(parameters[full]) for full in names.values())
            problem = _problem(site, own, is_split)
            if problem is not None:
                problems.append(f"{site.name} ({type(site.layer).__name__}): {problem}")
            whole = isinstance(site.layer, nn.Embedding) and own.get("weight") == 0
            for name, full in names.items():
                users[full] = users.get(full, 0) + 1
                if own[name] is not None and not whole:
                    weights[full] = 1.0
        problems += [f"{name}: split, and shared by {n} layers" for name, n in users.items()
                     if n > 1 and split[name] is not None]
        if problems:
            raise ValueError(CANNOT.format(problems="\n".join(f"  - {each}" for each in problems)))
        return weights

    def check_reduced(self, whole: float, pieces: float) -> bool:
        """Compare ‖g‖² over all processes: of whole gradients, and of pieces that D hold alike.
        Whether they could be compared: all are finite. RuntimeError on every process, where they
        differ."""
        found = self.everyone.gather((whole, pieces, tuple(self.data.ranks)))
        wholes, own_pieces, _ = zip(*found, strict=True)
        if not all(map(math.isfinite, (*wholes, *own_pieces))):
            return False
        if _differ(wholes):
            raise RuntimeError(DIFFER.format(values=self._by_rank(wholes), cause=PARTLY_USED))
        groups: dict[tuple[int, ...], list[float]] = {}
        for _, piece, members in found:
            groups.setdefault(members, []).append(piece)
        if any(map(_differ, groups.values())):
            raise RuntimeError(DIFFER.format(values=self._by_rank(own_pieces), cause=NOT_AVERAGED))
        return True

    def _by_rank(self, values: tuple[float, ...]) -> str:
        pairs = zip(self.everyone.ranks, values, strict=True)
        return ", ".join(f"{rank}: {value:.6g}" for rank, value in pairs)

    def _is_split(self, parameter: Tensor) -> bool:
        return is_sharded(parameter) and len(_replica_line(parameter, self.data.ranks)[0]) > 1

    def _split_dim(self, parameter: Tensor) -> int | None:
        """The dimension of which the processes of a replica hold parts."""
        lines = _mesh_lines(parameter, self.data.ranks) if is_sharded(parameter) else ()
        dims = [p.dim for p, _, shares_batch in lines if not shares_batch and hasattr(p, "dim")]
        return dims[0] if dims else None


def _sharded(model: nn.Module) -> dict[str, DTensor]:
    return {name: each for name, each in model.named_parameters() if is_sharded(each)}


def _default_data_ranks(model: nn.Module, sharded: Mapping[str, DTensor]) -> list[int]:
    """Without a group: this process alone where all hold one replica, not by fully_shard."""
    world = dist.get_world_size()
    meshes = [parameter.device_mesh for parameter in sharded.values()]
    one_replica = all(mesh.size() == world and mesh.ndim == 1 for mesh in meshes)
    if world > 1 and one_replica and not _fully_sharded(model):
        return [dist.get_rank()]
    return list(range(world))


def _fully_sharded(model: nn.Module) -> set[int]:
    """ids of the parameters that fully_shard holds."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _mesh_lines(parameter: DTensor, data: list[int]) -> Iterator[tuple[Placement, list[int], bool]]:
    """(placement, ranks in this process's line, whether these share each batch) per dimension."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate() or ()
    for dim, placement in enumerate(parameter.placements):
        index = tuple(slice(None) if at == dim else here for at, here in enumerate(coordinate))
        line = mesh.mesh[index].tolist()
        yield placement, line, set(line) <= set(data)


def _replica_line(parameter: DTensor, data: list[int]) -> tuple[list[int], bool]:
    """(ranks that hold one replica of the parameter with this one, whether the mesh fits: each of
    its dimensions lies either within the processes of a batch or across them)."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate() or ()
    lines = list(_mesh_lines(parameter, data))
    index = tuple(here if shares_batch else slice(None)
                  for here, (_, _, shares_batch) in zip(coordinate, lines, strict=True))
    fits = all(shares_batch or len(set(line) & set(data)) == 1 for _, line, shares_batch in lines)
    return sorted(mesh.mesh[index].flatten().tolist()), fits


def _split_over(model: nn.Module, sharded: Mapping[str, DTensor], data: list[int]) -> Iterator[str]:
    """Names of parameters split over processes said to share each batch, not by fully_shard alone,
    which leaves [Shard] or [Replicate, Shard]."""
    held = _fully_sharded(model)
    for name, parameter in sharded.items():
        lines = list(_mesh_lines(parameter, data))
        within = [placement for placement, line, shares in lines if shares and len(line) > 1]
        splits = [hasattr(placement, "dim") for placement in within]
        allowed = splits in ([], [True], [False, True], [False])
        if not allowed if id(parameter) in held else any(splits):
            yield name


def _problem(site: TapSite, split: Mapping[str, int | None], is_split: bool) -> str | None:
    """Why a site's pieces cannot be measured; None where they can."""
    dims = {name: dim for name, dim in split.items() if dim is not None}
    layer = site.layer
    if not is_split:
        return None
    if site.sampler is None or site.mixes_samples:
        return "it has no rule for a part of it"
    if not dims or (isinstance(layer, nn.Embedding) and layer.weight.dim() == 2):
        return None
    if isinstance(layer, nn.Linear) and "weight" in split:
        if dims == (dict.fromkeys(split, 0) if dims.get("weight") == 0 else {"weight": 1}):
            return None
        return f"its parameters are split along {dims}; use ColwiseParallel or RowwiseParallel"
    return "only Linear and Embedding are known where parameters are split"


def _differ(values: tuple[float, ...] | list[float]) -> bool:
    return max(values) - min(values) > TOLERANCE * max(values)
