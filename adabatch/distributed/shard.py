"""What is known of a batch that several processes share while this one runs its part.

Legend: W processes; of the m samples of a batch this one has m_r.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adabatch.distributed.grad_norms import grad_sq_norms, is_sharded, parts_of_grad_sq_norms, replicated_sq_norms


class BatchShard:
    """Shares of the batches, and how ‖g‖² is made of the processes' parts. Without arguments: one process that has all.

    DistributedDataParallel and fully_shard average the gradients of the processes' own losses with weight 1/W each. For their sum to be the gradient of the
    mean over all m samples, each is multiplied by `weight` = W·m_r/m before; under a loss that is a sum, by W.

    Args:
        world_size: W.
        sampler: has `share` (m_r) and `last_size` (m) of the last batch delivered, and `n_batches`.
        summed: the loss is a sum over the samples.
        broadcast_from_first: value -> that of the first process; called by all of them at once.
        replica_ranks: of the T processes that hold one replica of the model together (tensor parallel) and have the same samples; empty for one alone.

    Attributes:
        has_shards: whether any gradient was sharded when ‖g‖² was last taken.
        replica: T.
        compares: whether `alike` is taken too: ‖g‖² of the gradients that all processes hold whole, and of the pieces that W of them hold alike.

    Example:
        >>> sharing = BatchShard()
        >>> sharing.share, sharing.weight
        (1.0, 1.0)
    """

    def __init__(
        self,
        world_size: int = 1,
        sampler: Any = None,
        summed: bool = False,
        broadcast_from_first: Callable[[Any], Any] | None = None,
        replica_ranks: Sequence[int] = (),
    ):
        self.world_size, self._sampler, self._summed = world_size, sampler, summed
        self._replica_ranks, self.replica = replica_ranks, max(1, len(replica_ranks))
        self.compares, self.alike = self.replica > 1, None
        self.broadcast_from_first = broadcast_from_first or _as_it_is
        self._noted: deque[tuple[int, int]] = deque(maxlen=4096)
        self._batch, self.has_shards = -1, False

    @property
    def share(self) -> float:
        """m_r/m of the batch at hand; 1/W for data that does not come from the loader."""
        size = getattr(self._sampler, "last_size", 0)
        return self._sampler.share / size if size else 1 / self.world_size

    @property
    def weight(self) -> float:
        """The factor on the gradient of this process's loss."""
        if self.world_size == 1:
            return 1.0
        if self._summed:
            return float(self.world_size)
        size = getattr(self._sampler, "last_size", 0)
        return self.world_size * self._sampler.share / size if size else 1.0

    def note(self) -> None:
        """A forward pass on the batch at hand: remember its share, once a batch."""
        if self._sampler is not None and self._sampler.n_batches != self._batch:
            self._batch = self._sampler.n_batches
            self._noted.append((self._sampler.share, self._sampler.last_size))

    def share_of(self, batches: int) -> float:
        """Σ m_r/Σ m of the last so many batches that were noted."""
        last = [self._noted[-back] for back in range(1, min(batches, len(self._noted)) + 1)]
        whole = sum(size for _, size in last)
        return sum(share for share, _ in last) / whole if whole else 1 / self.world_size

    def size_of(self, batches: int) -> int:
        """Σ m of them.

        Raises:
            RuntimeError: no batch of the loader was run.
        """
        if not self._noted:
            raise RuntimeError("no batch of the loader was run forward since adabatch.wrap, so that the size of the step is not known: train on its batches")
        return sum(self._noted[-back][1] for back in range(1, min(batches, len(self._noted)) + 1))

    def grad_sq_norms(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """This process's part of each group's ‖g‖², [K]; the parts of all add up to it."""
        self.has_shards = any(is_sharded(parameter) for group in groups for parameter in group)
        if self.compares:
            self.alike = replicated_sq_norms(groups, self._replica_ranks)
        processes = self.world_size * self.replica
        return grad_sq_norms(groups) if processes == 1 else parts_of_grad_sq_norms(groups, processes)


def _as_it_is(value: Any) -> Any:
    return value
