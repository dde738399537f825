"""Unequal shares: each process's gradient weighs as its samples do.

Legend: W processes, m_r of a batch's m samples on process r.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch.distributed.shard import BatchShard

NO_TENSOR = (
    "this process has another number of the batch's samples than others, so that its gradient must be multiplied by {weight:.6g}, and no tensor was found in "
    "the model's output ({kind}) to do it at. Return tensors, or tuples, lists and dicts of them; register other containers with torch.utils._pytree"
)


class _Weigh(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.weight == 1.0 else grad * ctx.weight), None


class OutputWeights:
    """A forward hook on the outermost model: what flows back into its outputs is multiplied by the process's weight W·m_r/m.

    One place for every wrapper (DistributedDataParallel, fully_shard, torch.compile), after which the averages over processes, the taps and the optimizer
    see the gradient of the mean over all m samples. The loss must be made of the model's outputs.

    Args:
        model: as the training loop calls it.
        sharing: gives the weights.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> weights = OutputWeights(model, BatchShard(world_size=2, summed=True))
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> model.weight.grad.item()
        2.0
        >>> weights.remove()
    """

    def __init__(self, model: nn.Module, sharing: BatchShard):
        own = weakref.ref(self)
        self._sharing = sharing
        # Held weakly: a deep copy of the model would copy the owner too. Outside compiled graphs, which a weight that changes would have compiled again.
        self._handle = model.register_forward_hook(torch.compiler.disable(lambda module, args, output: _weighed(own(), output)))

    def weigh(self, output: Any) -> Any:
        """The output, weighed."""
        if not torch.is_grad_enabled():
            return output
        leaves, structure = tree_flatten(output)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._sharing.note()
        weight = self._sharing.weight
        if not places and weight != 1.0 and not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise RuntimeError(NO_TENSOR.format(weight=weight, kind=type(output).__name__))
        for place in places:
            leaves[place] = _Weigh.apply(leaves[place], weight)
        return tree_unflatten(leaves, structure) if places else output

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


def _weighed(weights: OutputWeights | None, output: Any) -> Any:
    return output if weights is None else weights.weigh(output)
