"""Squared norms of finished gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from adabatch.kernels.operators import LONGEST_SUM

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def grad_sq_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ over the group's parameters of ‖p.grad‖², one value per group, [K], at least float32.

    A parameter without a gradient counts 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> grad_sq_norms([[p], []])
        tensor([25.,  0.])
    """
    norms = _stacked([_group_norm(_grads(group)) for group in groups])
    return norms * norms


def parts_of_grad_sq_norms(groups: Sequence[Sequence[Tensor]], world_size: int) -> Tensor:
    """This process's part of Σ ‖p.grad‖² of each group, [K]: the parts of all processes add up.

    No collective per parameter: a gradient that every process holds whole counts 1/world_size on
    each; of a sharded one (a DTensor of fully_shard) the own shard counts, divided by the number of
    processes that hold the same shard: the replicas of a hybrid mesh, and other meshes of the same
    kind where this one has fewer processes (the data-parallel ones under tensor parallelism). Only
    partial sums are gathered to their norm.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> parts_of_grad_sq_norms([[p], []], world_size=2)
        tensor([12.5000,  0.0000])
    """
    parts = []
    for group in groups:
        locals_of_factor: dict[float, list[Tensor]] = {}
        for grad in _grads(group):
            local, factor = _own_part(grad, world_size)
            locals_of_factor.setdefault(factor, []).append(local)
        squares = [
            _group_norm(grads).square() * factor for factor, grads in locals_of_factor.items()
        ]
        parts.append(sum(squares[1:], squares[0]) if squares else torch.zeros(()))
    return _stacked(parts)


def replicated_sq_norms(groups: Sequence[Sequence[Tensor]], replica: Collection[int]) -> Tensor:
    """‖g‖² of gradients held whole, and of this process's pieces of those split over replica, [2].

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> replicated_sq_norms([[p], []], replica=[0, 1])
        tensor([25.,  0.])
    """
    whole, pieces = [], []
    for grad in (grad for group in groups for grad in _grads(group)):
        if not is_sharded(grad):
            whole.append(grad)
            continue
        is_partial = any(placement.is_partial() for placement in grad.placements)
        if not is_partial and set(grad.device_mesh.mesh.flatten().tolist()) == set(replica):
            pieces.append(grad.to_local())
    return _stacked([_group_norm(whole), _group_norm(pieces)]).square()


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, of which this process holds a part.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, gathered from its processes; any other as it is.

    Example:
        >>> full_tensor(torch.ones(1))
        tensor([1.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_gradient(grad: Tensor | None) -> Tensor | None:
    """A gradient gathered where it is sharded, which all processes do in the same order, and dense
    where it is sparse; None as it is."""
    if grad is None:
        return None
    return grad.to_dense() if grad.is_sparse else full_tensor(grad)


def _grads(group: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]


def _own_part(grad: Tensor, world_size: int) -> tuple[Tensor, float]:
    """(a tensor whose squared norm counts, the factor by which it counts)."""
    if not is_sharded(grad):
        return grad, 1 / world_size
    mesh, placements = grad.device_mesh, grad.placements
    if any(placement.is_partial() for placement in placements) or mesh.size() > world_size:
        return _group_norm([grad]), 1 / world_size
    sizes = [mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate()]
    return grad.to_local(), mesh.size() / (world_size * math.prod(sizes))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """On the accelerator of any of them."""
    devices = [value.device for value in values if value.numel() and value.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    return torch.stack([value.to(device) for value in values])


def _shortened(grad: Tensor) -> Tensor:
    """A tensor of the same norm.

    On a CPU one float32 sum of a large gradient's squares loses the small ones; two stages do not,
    and cost no more.
    """
    if grad.dim() < 2 or grad.numel() <= LONGEST_SUM:
        return grad
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def _dense(grad: Tensor) -> Tensor:
    """The values of the gradient, at least float32."""
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def _group_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    grads = [_dense(grad) for grad in grads]
    plain = [grad.is_cpu and type(grad) is Tensor for grad in grads]
    grads = [_shortened(grad) if local else grad for grad, local in zip(grads, plain, strict=True)]
    if all(plain):  # get_total_norm takes ten times the calls for the same
        return torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        )
    return full_tensor(get_total_norm(grads))
