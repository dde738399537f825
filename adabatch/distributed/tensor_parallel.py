"""Tensor parallelism beside data parallelism: which processes share each batch, which share each layer, and how their pieces count.

Legend: D processes that share each batch, T that hold one replica of the model together, D·T in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from adabatch.distributed.grad_norms import is_sharded
from adabatch.distributed.group import Ranks

GROUP = (
    "these parameters are split over processes that do not share each batch but hold one replica of the model together (tensor parallel): {names}. Tell "
    'adabatch.wrap which processes do share each batch: group=mesh["dp"], the data-parallel part of the device mesh'
)
CANNOT = "these tensor-parallel layers cannot be measured:\n{problems}\nPass ignore=[...], or use a controller that measures nothing (controllers.Scheduled)"
ASKED = (
    "tensor-parallel layers are measured without {asked}, which the controller, coupling or argument asks for: use one that needs norms alone (CABS with SGD, "
    "NoiseScale), one that measures nothing (controllers.Scheduled), or leave inner_products= away"
)
ESTIMATOR = "estimator={estimator!r} is not for tensor-parallel layers ({names}): leave it at 'per_sample'"
DIFFER = "gradients that should be the same differ between processes when the backward pass ends (squared norms by rank: {values}): {cause}"
TOLERATED = 1e-5  # relative spread of squared norms of gradients that are said to be the same


@dataclass(frozen=True)
class TensorParallel:
    """How a model is split.

    Attributes:
        data: the D processes that share each batch.
        everyone: all D·T.
        replica: of the T that hold this process's replica, their numbers in the default group.
    """

    data: Ranks
    everyone: Ranks
    replica: list[int]

    @classmethod
    def find(cls, model: nn.Module, group: Any, estimator: str) -> TensorParallel | None:
        """None where no parameter is split over processes that hold one replica together.

        Raises:
            ValueError: on every process alike, where group= does not say which processes share each batch.
        """
        if not (dist.is_available() and dist.is_initialized()) or not any(is_sharded(parameter) for parameter in model.parameters()):
            return None
        sharing = _sharing_ranks(model, group)
        lines = {name: _lines(parameter, sharing) for name, parameter in model.named_parameters() if is_sharded(parameter)}
        split = {name: frozenset(own) for name, (own, _) in lines.items() if len(own) > 1}
        wrong = [name for name, (own, fits) in lines.items() if not fits]
        wrong += [name for name, parameter in _split_over(model, sharing) if name not in wrong]
        if len(set(split.values())) > 1 or wrong:
            raise ValueError(GROUP.format(names=", ".join((wrong or list(split))[:10])))
        if not split:
            return None
        if estimator != "per_sample":
            raise ValueError(ESTIMATOR.format(estimator=estimator, names=", ".join(list(split)[:10])))
        data = Ranks(sharing)
        own = sorted(next(iter(split.values())))
        everyone = Ranks(sorted({rank for ranks in data.gather(own) for rank in ranks}))
        return cls(data, everyone, own)

    def shares(self, hooks: Any) -> dict[str, float]:
        """By how much a parameter's norms count on each process: 1 for pieces, 1/T for what every process of a replica works out whole.

        Raises:
            ValueError: listing the layers for which neither holds.
        """
        asked = sorted(hooks.measures & {"inner_products", "second_moment", "preconditioned_trace"})
        if asked:
            raise ValueError(ASKED.format(asked=", ".join(asked)))
        owners: dict[str, int] = {}
        split = {name: self._split_dim(parameter) for name, parameter in hooks.parameters.items()}
        problems, shares = [], {}
        tapped = {full for site in hooks.sites for full in site.parameters.values()}
        problems += [f"  - {name}: used outside a layer of its own" for name, dim in split.items() if dim is not None and name not in tapped]
        for site in hooks.sites[:-1]:
            own = {name: split[full] for name, full in site.parameters.items()}
            for full in site.parameters.values():
                owners[full] = owners.get(full, 0) + 1
            problem = _problem(site, own, any(self._is_parallel(hooks.parameters[full]) for full in site.parameters.values()))
            problems += [f"  - {site.name} ({type(site.layer).__name__}): {problem}"] if problem else []
            whole = isinstance(site.layer, nn.Embedding) and own.get("weight") == 0
            shares |= {full: 1.0 if own[name] is not None and not whole else 1 / len(self.replica) for name, full in site.parameters.items()}
        problems += [f"  - {name}: split, and shared by {count} layers" for name, count in owners.items() if count > 1 and split[name] is not None]
        if problems:
            raise ValueError(CANNOT.format(problems="\n".join(problems)))
        return {name: shares.get(name, 1 / len(self.replica)) for name in hooks.parameters}

    def check_reduced(self, whole: float, pieces: float) -> bool:
        """Compare squared norms over all processes: of gradients that each holds whole, and of pieces that D processes hold alike.

        Raises:
            RuntimeError: on every process, where they differ.
        """
        ranks = self.everyone.gather((whole, pieces, tuple(self.data.ranks)))
        if not all(math.isfinite(value) for each in ranks for value in each[:2]):
            return False
        if _differ([each[0] for each in ranks]):
            cause = "a parameter that is not split is used on a part of the samples' activations, or nothing averages gradients over the processes of group="
            raise RuntimeError(DIFFER.format(values=self._by_rank([each[0] for each in ranks]), cause=cause))
        groups: dict[tuple[int, ...], list[float]] = {}
        for _, piece, members in ranks:
            groups.setdefault(members, []).append(piece)
        if any(_differ(values) for values in groups.values()):
            cause = "nothing averages them over the processes of group= (wrap the model in fully_shard over that part of the mesh)"
            raise RuntimeError(DIFFER.format(values=self._by_rank([each[1] for each in ranks]), cause=cause))
        return True

    def _by_rank(self, values: list[float]) -> str:
        return ", ".join(f"{rank}: {value:.6g}" for rank, value in zip(self.everyone.ranks, values, strict=True))

    def _is_parallel(self, parameter: Tensor) -> bool:
        return is_sharded(parameter) and len(_lines(parameter, self.data.ranks)[0]) > 1

    def _split_dim(self, parameter: Tensor) -> int | None:
        """Along which dimension the processes of a replica hold parts of it."""
        if not is_sharded(parameter):
            return None
        along = _mesh_dims(parameter, self.data.ranks)
        dims = [placement.dim for placement, (ranks, shares) in zip(parameter.placements, along, strict=True) if not shares and hasattr(placement, "dim")]
        return dims[0] if dims else None


def _sharing_ranks(model: nn.Module, group: Any) -> list[int]:
    """The processes that share each batch; without group=, this one alone where all are one replica of a model that fully_shard does not hold."""
    if group is not None:
        return sorted(group.mesh.flatten().tolist() if hasattr(group, "mesh") else dist.get_process_group_ranks(group))
    world = dist.get_world_size()
    by_hand = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    if not _fully_sharded(model) and world > 1 and all(parameter.device_mesh.size() == world and parameter.device_mesh.ndim == 1 for parameter in by_hand):
        return [dist.get_rank()]
    return list(range(world))


def _fully_sharded(model: nn.Module) -> set[int]:
    """ids of the parameters that fully_shard holds."""
    from torch.distributed.fsdp import FSDPModule

    return {id(parameter) for module in model.modules() if isinstance(module, FSDPModule) for parameter in module.parameters()}


def _mesh_dims(parameter: Any, sharing: list[int]) -> list[tuple[list[int], bool]]:
    """Of each dimension of the parameter's mesh: the ranks in this process's line, and whether these share each batch."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    found = []
    for dim in range(mesh.ndim):
        index = tuple(slice(None) if at == dim else here for at, here in enumerate(coordinate))
        line = mesh.mesh[index].tolist()
        found.append((line, set(line) <= set(sharing)))
    return found


def _lines(parameter: Any, sharing: list[int]) -> tuple[list[int], bool]:
    """(the ranks that hold one replica of the parameter together with this one, whether each mesh dimension is either within the batch or across it)."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    along = _mesh_dims(parameter, sharing)
    index = tuple(here if shares else slice(None) for here, (_, shares) in zip(coordinate, along, strict=True))
    fits = all(shares or len(set(line) & set(sharing)) == 1 for line, shares in along)
    return sorted(mesh.mesh[index].flatten().tolist()), fits


def _split_over(model: nn.Module, sharing: list[int]) -> list[tuple[str, Tensor]]:
    """Parameters that are split over processes said to share each batch, though not by fully_shard alone, which leaves [Shard] or [Replicate, Shard]."""
    held, found = _fully_sharded(model), []
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        within = zip(parameter.placements, _mesh_dims(parameter, sharing), strict=True)
        splits = [hasattr(placement, "dim") for placement, (line, shares) in within if shares and len(line) > 1]
        if splits not in ([], [True], [False, True], [False]) if id(parameter) in held else any(splits):
            found.append((name, parameter))
    return found


def _problem(site: Any, split: Mapping[str, int | None], parallel: bool) -> str | None:
    """Why a site's pieces cannot be told; None where they can."""
    dims = {name: dim for name, dim in split.items() if dim is not None}
    if not parallel:
        return None
    if site.sampler is None or site.mixes_samples:
        return "it has no rule for a part of it"
    if not dims:
        return None
    weight = site.layer.weight
    if isinstance(site.layer, nn.Linear) and "weight" in split:
        expected = dict.fromkeys(split, 0) if dims.get("weight") == 0 else {"weight": 1}
        return None if dims == expected else f"its parameters are split along {dims}; ColwiseParallel and RowwiseParallel are known"
    if isinstance(site.layer, nn.Embedding) and weight.dim() == 2:
        return None
    return "only Linear and Embedding are known where parameters are split"


def _differ(values: list[float]) -> bool:
    return max(values) - min(values) > TOLERATED * max(values)
