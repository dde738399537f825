"""Squared norms of finished gradients that processes hold in parts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from adabatch.estimators.gradients import gradients, is_sharded, stacked, total_norm


def parts_of_grad_sq_norms(groups: Sequence[Sequence[Tensor]], world_size: int) -> Tensor:
    """This process's part of Σ ‖p.grad‖² of each group, [K]: the parts of all processes add up.

    No collective per parameter: a gradient that every process holds whole counts 1/world_size on
    each; of a DTensor the own shard counts, divided by the number of processes that hold the same
    shard (replicas of a hybrid mesh, and other meshes of the same kind under tensor parallelism).
    Only partial sums are gathered.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> parts_of_grad_sq_norms([[p], []], world_size=2)
        tensor([12.5000,  0.0000])
    """
    parts = []
    for group in groups:
        locals_of_factor: dict[float, list[Tensor]] = {}
        for grad in gradients(group):
            local, factor = _own_part(grad, world_size)
            locals_of_factor.setdefault(factor, []).append(local)
        squares = [total_norm(grads).square() * k for k, grads in locals_of_factor.items()]
        parts.append(sum(squares[1:], squares[0]) if squares else torch.zeros(()))
    return stacked(parts)


def replicated_sq_norms(groups: Sequence[Sequence[Tensor]], replica: Collection[int]) -> Tensor:
    """‖g‖² of gradients held whole, and of this process's pieces of those split over it, [2]."""
    whole, pieces = [], []
    for grad in (grad for group in groups for grad in gradients(group)):
        if not is_sharded(grad):
            whole.append(grad)
            continue
        is_partial = any(placement.is_partial() for placement in grad.placements)
        if not is_partial and set(grad.device_mesh.mesh.flatten().tolist()) == set(replica):
            pieces.append(grad.to_local())
    return stacked([total_norm(whole), total_norm(pieces)]).square()


def _own_part(grad: Tensor, world_size: int) -> tuple[Tensor, float]:
    """(a tensor whose squared norm counts, the factor by which it counts)."""
    if not is_sharded(grad):
        return grad, 1 / world_size
    mesh, placements = grad.device_mesh, grad.placements
    if any(placement.is_partial() for placement in placements):
        return grad.full_tensor(), 1 / world_size  # torch 2.9 takes norms of the partial sums
    if mesh.size() > world_size:
        return total_norm([grad]), 1 / world_size
    sizes = [mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate()]
    return grad.to_local(), mesh.size() / (world_size * math.prod(sizes))
