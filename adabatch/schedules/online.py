"""Online selection of the batch size: one loaded batch, split into parts of each candidate size;
the size with the smallest (or largest) mean loss is stepped with.

The candidates' mean losses differ only where the loss of a sample depends on its batch: batch
normalisation in training mode, dropout's masks. Otherwise all tie, and the largest is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch._checks import choice, integers
from adabatch._tree import map_tensors, tensors
from adabatch._types import Batch, LossFn
from adabatch.scheduler.lr import StepFactor

CANDIDATES = (256, 128, 64)
TIED = 1e-5  # relative: what rounding makes of equal losses in float32


@dataclass(frozen=True)
class OnlineStep:
    """The outcome of online_step."""

    batch_size: int  # the size chosen
    losses_by_size: dict[int, float]  # mean loss of the batch in parts of each size, before
    loss: float  # mean loss of the batch, each part's before its own step
    n_steps: int  # optimizer steps taken


def select_batch_size(losses_by_size: Mapping[int, float], pick: str = "smallest") -> int:
    """The size with the smallest or the largest mean loss; of sizes within rounding of it (1e-5,
    relative), the largest. NaN losses are skipped; if all are NaN, it is a ValueError.

    Example:
        >>> losses = {256: 0.70, 128: 0.68, 64: 0.71}
        >>> select_batch_size(losses), select_batch_size(losses, pick="largest")
        (128, 64)
    """
    choice("pick", pick, ("smallest", "largest"))
    losses = {size: float(loss) for size, loss in losses_by_size.items() if loss == loss}
    if not losses:
        raise ValueError("losses_by_size must hold at least one loss that is a number, "
                         f"got {dict(losses_by_size)!r}")
    best = (min if pick == "smallest" else max)(losses.values())
    return max(size for size, x in losses.items() if x == best or abs(x - best) <= TIED * abs(best))


def split_losses(model: nn.Module, loss_fn: LossFn, batch: Batch,
                 candidates: Sequence[int] = CANDIDATES) -> dict[int, float]:
    """{candidate size: mean loss of the batch when split into parts of that size}, in the model's
    present mode and without gradients. Parts count by their samples. Buffers that a forward pass
    changes (running statistics) are restored.

    Args:
        loss_fn: loss_fn(model, part) -> the part's mean loss, or its losses per sample [N].
        batch: tensors in tuples, lists, mappings or data classes; their first dimension is the
            sample's.
        candidates: sizes, each at least 1; a batch shorter than one is one part.

    Raises:
        TypeError, ValueError: wrong candidates; tensors of several lengths, or none.

    Example:
        >>> batch = torch.tensor([1.0, 2.0, 6.0])
        >>> split_losses(nn.Identity(), lambda model, part: model(part), batch, candidates=(2, 1))
        {2: 3.0, 1: 3.0}
    """
    sizes = integers("candidates", candidates, at_least=1)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    n, losses = _length(batch), {}
    with torch.no_grad():
        for size in sizes:
            parts = _parts(batch, size)
            losses[size] = sum(float(loss_fn(model, x).mean()) * _length(x) for x in parts) / n
            for buffer, before in buffers:
                buffer.copy_(before)
    return losses


def online_step(model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batch: Batch,
                candidates: Sequence[int] = CANDIDATES, pick: str = "smallest") -> OnlineStep:
    """Choose a size by `split_losses` and `select_batch_size` (arguments and errors as there), then
    take one step per part of that size with lr · part / largest candidate.

    The factor applies inside optimizer.step() only, so that lr schedulers never see it; a shorter
    last part has a smaller one. Gradients are cleared before each part. The batch should be as
    large as the largest candidate.

    Example:
        >>> model, batch = nn.Linear(2, 1), torch.randn(8, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss_fn = lambda model, part: model(part).square().mean()
        >>> step = online_step(model, optimizer, loss_fn, batch, candidates=(8, 4))
        >>> step.batch_size, step.n_steps  # no layer looks at other samples: a tie
        (8, 1)
    """
    losses_by_size = split_losses(model, loss_fn, batch, candidates)
    size, largest = select_batch_size(losses_by_size, pick), max(candidates)
    total, count, length = 0.0, 0, 0
    factor = StepFactor(optimizer, lambda: length / largest)
    try:
        for part in _parts(batch, size):
            length = _length(part)
            optimizer.zero_grad()
            loss = loss_fn(model, part).mean()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * length
            count += 1
    finally:
        factor.remove()
    return OnlineStep(size, losses_by_size, total / _length(batch), count)


def _length(batch: Batch) -> int:
    lengths = {tensor.shape[0] if tensor.dim() else 0 for _, tensor in tensors(batch)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("batch must hold tensors whose first dimension is the sample's, all of "
                         f"one length above 0, got lengths {sorted(lengths)}")
    return lengths.pop()


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, _length(batch), size):
        yield map_tensors(batch, partial(_slice, slice(start, start + size)))


def _slice(samples: slice, path: object, tensor: Tensor) -> Tensor:
    return tensor[samples]
