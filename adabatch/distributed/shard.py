"""This process's part of each batch, and the weight that it gives to the process's gradient.

Legend: W processes; this one has m_r of the m samples of a batch.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten, tree_unflatten

from adabatch._hooks import UncopiedHook
from adabatch._types import Args, Batch
from adabatch.distributed.grad_norms import parts_of_grad_sq_norms, replicated_sq_norms
from adabatch.estimators.gradients import grad_sq_norms, is_sharded

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

T = TypeVar("T")
NOTHING_RUN = (
    "no batch of the loader has been run forward since adabatch.wrap, so that the size of the step "
    "is not known: train on the loader's batches")
NO_TENSOR = (
    "this process has a different number of the batch's samples than others, so that its gradient "
    "must be multiplied by {weight:.6g}, and no tensor was found in the model's output ({kind}) to "
    "do it at. Return tensors, or tuples, lists and dicts of them; register other containers with "
    "torch.utils._pytree")


class ShardedSampler(Protocol):
    """What the shard reads of a batch sampler: n_batches delivered since the start, m_r and m of
    the last one."""

    n_batches: int

    @property
    def last_local_size(self) -> int: ...
    @property
    def last_size(self) -> int: ...


class Broadcast(Protocol):
    def __call__(self, value: T, /) -> T: ...


class BatchShard:
    """The fraction m_r/m, and how ‖g‖² is composed of the processes' parts.

    DistributedDataParallel and fully_shard average the gradients of the processes' own losses with
    weight 1/W each. For the result to be the gradient of the mean over all m samples, each is
    multiplied by `weight` = W·m_r/m first; under a loss that is a sum, by W.

    Args:
        world_size: W. The default is one process that has all samples.
        sampler: of the loader; None for data from elsewhere.
        summed: the loss is a sum over the samples.
        replica_ranks: of the T processes that hold one replica of the model together (tensor
            parallel) and have the same samples; empty for one alone.

    Attributes:
        replica: T.
        has_shards: whether any gradient was sharded when ‖g‖² was last taken.
        compares_replicas: whether to take `replicated_sq_norms` with ‖g‖²: of the gradients that
            all processes hold whole, and of the pieces that W of them hold alike.
    """

    def __init__(
        self, world_size: int = 1, sampler: ShardedSampler | None = None, summed: bool = False,
        broadcast_from_first: Broadcast | None = None, replica_ranks: Sequence[int] = (),
    ):
        self.world_size, self._sampler, self._summed = world_size, sampler, summed
        self._replica_ranks, self.replica = replica_ranks, max(1, len(replica_ranks))
        self.compares_replicas = self.replica > 1
        self.replicated_sq_norms: Tensor | None = None
        self._broadcast = broadcast_from_first
        self._recorded: deque[tuple[int, int]] = deque(maxlen=4096)
        self._batch, self.has_shards = -1, False

    @property
    def fraction(self) -> float:
        """m_r/m of the current batch; 1/W for data that does not come from the loader."""
        sampler = self._sampler
        if sampler is None or not sampler.last_size:
            return 1 / self.world_size
        return sampler.last_local_size / sampler.last_size

    @property
    def weight(self) -> float:
        """The factor on the gradient of this process's loss."""
        if self._summed:
            return float(self.world_size)
        known = self._sampler is not None and self._sampler.last_size
        return self.world_size * self.fraction if known else 1.0

    def broadcast_from_first(self, value: T) -> T:
        """The first process's value; all processes call this at once."""
        return value if self._broadcast is None else self._broadcast(value)

    def record(self) -> None:
        """Record m_r and m of the current batch, once per batch; called in the forward pass."""
        if self._sampler is not None and self._sampler.n_batches != self._batch:
            self._batch = self._sampler.n_batches
            self._recorded.append((self._sampler.last_local_size, self._sampler.last_size))

    def fraction_of(self, batches: int) -> float:
        """Σ m_r/Σ m of the last `batches` recorded batches."""
        last = self._last(batches)
        whole = sum(size for _, size in last)
        return sum(own for own, _ in last) / whole if whole else 1 / self.world_size

    def size_of(self, batches: int) -> int:
        """Σ m of them; RuntimeError where no batch of the loader was run."""
        if not self._recorded:
            raise RuntimeError(NOTHING_RUN)
        return sum(size for _, size in self._last(batches))

    def _last(self, batches: int) -> list[tuple[int, int]]:
        return list(islice(reversed(self._recorded), batches))

    def grad_sq_norms(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """This process's part of each group's ‖g‖², [K]; the parts of all add up to it."""
        self.has_shards = any(is_sharded(parameter) for group in groups for parameter in group)
        if self.compares_replicas:
            self.replicated_sq_norms = replicated_sq_norms(groups, self._replica_ranks)
        n = self.world_size * self.replica
        return grad_sq_norms(groups) if n == 1 else parts_of_grad_sq_norms(groups, n)


class _Weighted(FunctionCtx):
    weight: float


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: _Weighted, tensor: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: _Weighted, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.weight == 1.0 else grad * ctx.weight), None


class OutputWeights:
    """A forward hook on the outermost model: gradients of its outputs are multiplied by W·m_r/m.

    Averages over processes, taps and the optimizer then see the gradient of the mean over all m
    samples. The loss must be computed from the outputs of `model`, as the training loop calls it.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> weights = OutputWeights(model, BatchShard(world_size=2, summed=True))
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> model.weight.grad.item()
        2.0
        >>> weights.remove()
    """

    def __init__(self, model: nn.Module, shard: BatchShard):
        # Held weakly: the model would keep the owner alive.
        self._shard, owner = shard, weakref.ref(self)

        def hook(module: nn.Module, args: Args, output: Batch) -> Batch:
            weights = owner()
            return output if weights is None else weights.weighted(output)

        self._copies: list[RemovableHandle] = []
        # Outside compiled graphs, which would be compiled again for every new weight.
        own = UncopiedHook(torch.compiler.disable(hook), self._copies)
        self._handle = own.held(model.register_forward_hook(own))

    def weighted(self, output: T) -> T:
        """The output, with the weight on its gradient; RuntimeError where it holds no tensor."""
        while self._copies:
            self._copies.pop().remove()
        if not torch.is_grad_enabled():
            return output
        leaves, structure = tree_flatten(output)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        places = [place for place in tensors if leaves[place].requires_grad]
        self._shard.record()
        weight = self._shard.weight
        if not tensors and weight != 1.0:
            raise RuntimeError(NO_TENSOR.format(weight=weight, kind=type(output).__name__))
        for place in places:
            leaves[place] = _ScaleGradient.apply(leaves[place], weight)
        return tree_unflatten(leaves, structure) if places else output

    def remove(self) -> None:
        """Take the hook off the model."""
        for handle in (self._handle, *self._copies):
            handle.remove()
