"""Squared norms of finished gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from adabatch.kernels.chunks import LONGEST_SUM

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def grad_sq_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ over the group's parameters of ‖p.grad‖², one value per group, [K], float32 at least; a parameter without a gradient counts 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> grad_sq_norms([[p], []])
        tensor([25.,  0.])
    """
    norms = _stacked([_group_norm([parameter.grad for parameter in group if parameter.grad is not None]) for group in groups])
    return norms * norms


def parts_of_grad_sq_norms(groups: Sequence[Sequence[Tensor]], world_size: int) -> Tensor:
    """What this process adds to Σ ‖p.grad‖² of each group, [K]: the parts of all `world_size` processes add up to it, without a collective per parameter.

    A gradient that every process holds whole counts 1/world_size on each. Of a sharded one (a DTensor of fully_shard) the own shard counts, divided by the
    number of processes that hold the same one: the replicas of a hybrid mesh, and other meshes of the same kind where this one has fewer processes (the
    data-parallel ones beside tensor parallelism). Partial sums are gathered to their norm, by a collective.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> parts_of_grad_sq_norms([[p], []], world_size=2)
        tensor([12.5000,  0.0000])
    """
    parts = []
    for group in groups:
        whole: dict[float, list[Tensor]] = {}
        for grad in (parameter.grad for parameter in group if parameter.grad is not None):
            local, share = _own_part(grad, world_size)
            whole.setdefault(share, []).append(local)
        squares = [_group_norm(grads).square() * share for share, grads in whole.items()]
        parts.append(sum(squares[1:], squares[0]) if squares else torch.zeros(()))
    return _stacked(parts)


def replicated_sq_norms(groups: Sequence[Sequence[Tensor]], replica: Collection[int]) -> Tensor:
    """‖g‖² of the gradients that this process holds whole, and of its pieces of those that the processes `replica` hold together, [2].

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> replicated_sq_norms([[p], []], replica=[0, 1])
        tensor([25.,  0.])
    """
    grads = [parameter.grad for group in groups for parameter in group if parameter.grad is not None]
    whole = [grad for grad in grads if not is_sharded(grad)]
    split = [grad for grad in grads if is_sharded(grad) and not any(placement.is_partial() for placement in grad.placements)]
    pieces = [grad for grad in split if set(grad.device_mesh.mesh.flatten().tolist()) == set(replica)]
    return _stacked([_group_norm(whole), _group_norm([grad.to_local() for grad in pieces])]).square()


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a part.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def _own_part(grad: Tensor, world_size: int) -> tuple[Tensor, float]:
    """(a tensor whose squared norm counts, the factor by which it counts)."""
    if not is_sharded(grad):
        return grad, 1 / world_size
    mesh = grad.device_mesh
    if any(placement.is_partial() for placement in grad.placements) or mesh.size() > world_size:
        return _group_norm([grad]), 1 / world_size
    replicas = math.prod(mesh.size(dim) for dim, placement in enumerate(grad.placements) if placement.is_replicate())
    return grad.to_local(), mesh.size() / (world_size * replicas)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    device = next((value.device for value in values if value.numel() and value.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([value.to(device) for value in values])


def _shortened(grad: Tensor) -> Tensor:
    """A tensor of the same norm: on a CPU one float32 sum of a large gradient's squares loses the small ones, two stages do not, and cost no more."""
    if grad.dim() < 2 or grad.numel() <= LONGEST_SUM:
        return grad
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def _dense(grad: Tensor) -> Tensor:
    """The values of the gradient, in float32 at least."""
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def _group_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    grads = [_dense(grad) for grad in grads]
    plain = [grad.is_cpu and type(grad) is Tensor for grad in grads]
    grads = [_shortened(grad) if is_plain else grad for grad, is_plain in zip(grads, plain, strict=True)]
    if all(plain):  # what the library does in ten times the calls
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    norm = get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
