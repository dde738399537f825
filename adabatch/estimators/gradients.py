"""The end of a backward pass, and ‖g‖² of the finished gradient."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Variable, forward_ad
from torch.nn.utils import get_total_norm

from adabatch.kernels.operators import LONGEST_SUM

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LOSS_REDUCTIONS = ("mean", "sum")
# The id of the backward pass that runs in this thread, -1 outside of one.
running_backward = torch._C._current_graph_task_id
_transforms = torch._C._functorch.peek_interpreter_stack


def is_transformed() -> bool:
    """Whether what runs now is transformed by torch.func or differentiated in forward mode, for
    which no backward pass tells the gradients."""
    return _transforms() is not None or forward_ad._current_level >= 0


def at_backward_end(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running has ended and the gradients are final.

    Queued twice: DistributedDataParallel writes the averaged gradients in a callback that it queues
    during the pass, so that a callback queued once may run before it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> handle = weight.register_hook(
        ...     lambda grad: at_backward_end(lambda: print(weight.grad.item())))
        >>> (3 * weight).sum().backward()
        3.0
    """
    engine = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(callback))


def check_arguments(loss_reduction: str, **counts: int | None) -> None:
    """Raise for an unknown reduction or for counts that are not positive integers; `samples` may
    be None.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_arguments("mean", samples=None, accumulate=1)
    """
    if not isinstance(loss_reduction, str) or loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {loss_reduction!r}")
    for name, value in counts.items():
        if value is None and name == "samples":
            continue
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            optional = " or None" if name == "samples" else ""
            raise ValueError(f"{name} must be a positive integer{optional}, got {value!r}")


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, of which this process holds a part."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, gathered from its processes; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_gradient(grad: Tensor | None) -> Tensor | None:
    """A gradient gathered where it is sharded, which all processes do in the same order, and dense
    where it is sparse; None as it is."""
    if grad is None:
        return None
    return grad.to_dense() if grad.is_sparse else full_tensor(grad)


def gradients(group: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]


def grad_sq_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ over the group's parameters of ‖p.grad‖², one value per group, [K], at least float32.

    A parameter without a gradient counts 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> grad_sq_norms([[p], []])
        tensor([25.,  0.])
    """
    norms = stacked([total_norm(gradients(group)) for group in groups])
    return norms * norms


def stacked(values: Sequence[Tensor]) -> Tensor:
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
    """The values of the gradient, real, at least float32."""
    grad = grad.coalesce().values() if grad.is_sparse else grad
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def total_norm(grads: Sequence[Tensor]) -> Tensor:
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
