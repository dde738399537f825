"""Squared norms of finished gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def grad_sq_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ over the group's parameters of ‖p.grad‖², one value per group, [K], float32 at least; a parameter without a gradient counts 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> grad_sq_norms([[p], []])
        tensor([25.,  0.])
    """
    norms = [_group_norm([parameter.grad for parameter in group if parameter.grad is not None]) for group in groups]
    device = next((norm.device for norm in norms if norm.numel() and norm.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([norm.to(device) for norm in norms]).square()


def _group_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    grads = [grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad for grad in grads]
    norm = get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
