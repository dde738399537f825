"""Online selection of the batch size: one loaded batch, split into parts of each candidate size; the size with the smallest (or largest) mean loss steps.

The parts of a candidate make up the whole batch, so that the candidates' mean losses differ only where the loss of a sample depends on the batch it is in:
batch normalisation in training mode, dropout's random masks. Without such layers all candidates tie, and the largest is taken.

Legend: N samples in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch._checks import choice, integers
from adabatch._tree import map_tensors, tensors
from adabatch.scheduler.lr import StepFactor

CANDIDATES = (256, 128, 64)
TIED = 1e-5  # relative: what rounding makes of equal losses in float32

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class OnlineStep:
    """What online_step did.

    Attributes:
        batch_size: the size chosen.
        losses_by_size: mean loss of the batch in parts of each size, before the steps.
        loss: mean loss of the batch during the steps, each part's before its own step.
        n_steps: optimizer steps taken.
    """

    batch_size: int
    losses_by_size: dict[int, float]
    loss: float
    n_steps: int


def select_batch_size(losses_by_size: Mapping[int, float], pick: str = "smallest") -> int:
    """The size with the smallest or the largest loss; of sizes within rounding of it (1e-5, relative), the largest.

    Args:
        losses_by_size: {candidate size: mean loss}. Losses that are NaN are passed over.
        pick: 'smallest' or 'largest'.

    Raises:
        ValueError: no loss, or nothing but NaN; another pick.

    Example:
        >>> select_batch_size({256: 0.70, 128: 0.68, 64: 0.71}), select_batch_size({256: 0.70, 128: 0.68, 64: 0.71}, pick="largest")
        (128, 64)
    """
    choice("pick", pick, ("smallest", "largest"))
    losses = {size: float(loss) for size, loss in losses_by_size.items() if loss == loss}
    if not losses:
        raise ValueError(f"losses_by_size must hold at least one loss that is a number, got {dict(losses_by_size)!r}")
    best = (min if pick == "smallest" else max)(losses.values())
    return max(size for size, loss in losses.items() if loss == best or abs(loss - best) <= TIED * abs(best))


def split_losses(model: nn.Module, loss_fn: LossFunction, batch: Any, candidates: Sequence[int] = CANDIDATES) -> dict[int, float]:
    """{candidate size: mean loss of the batch when split into parts of that size}, in the model's present mode and without gradients.

    Parts count by their samples. Buffers that a forward pass changes (running statistics) are put back.

    Args:
        model: in training mode, for batch normalisation and dropout to have their say.
        loss_fn: loss_fn(model, part) -> the part's mean loss, or its losses per sample [N].
        batch: a tensor, or tuples, lists, mappings or data classes of tensors whose first dimension is the sample's.
        candidates: sizes, each at least 1; where the batch is shorter it is one part.

    Raises:
        TypeError: candidates is no list or tuple of integers.
        ValueError: a candidate below 1; a batch without tensors, or whose tensors differ in length.

    Example:
        >>> split_losses(nn.Identity(), lambda model, part: model(part), torch.tensor([1.0, 2.0, 6.0]), candidates=(2, 1))
        {2: 3.0, 1: 3.0}
    """
    sizes = integers("candidates", candidates, at_least=1)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    rows = _rows(batch)
    losses = {}
    with torch.no_grad():
        for size in sizes:
            losses[size] = sum(float(loss_fn(model, part).mean()) * _rows(part) for part in _parts(batch, size)) / rows
            for buffer, before in buffers:
                buffer.copy_(before)
    return losses


def online_step(
    model: nn.Module, optimizer: Optimizer, loss_fn: LossFunction, batch: Any, candidates: Sequence[int] = CANDIDATES, pick: str = "smallest"
) -> OnlineStep:
    """Choose a size by `split_losses` and `select_batch_size`, then take one step per part of that size with lr · part / largest candidate.

    The factor lives inside optimizer.step() only, so that lr schedulers never see it; a shorter last part has a smaller one.

    Args:
        model, loss_fn, batch, candidates: as in `split_losses`; the batch should be as large as the largest candidate.
        optimizer: its gradients are cleared before each part.
        pick: 'smallest' or 'largest'.

    Returns:
        OnlineStep: size, losses and number of steps.

    Raises:
        TypeError, ValueError: as in `split_losses` and `select_batch_size`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = online_step(model, optimizer, lambda model, part: model(part).square().mean(), torch.randn(8, 2), candidates=(8, 4))
        >>> step.batch_size, step.n_steps  # no layer looks at other samples: a tie
        (8, 1)
    """
    losses_by_size = split_losses(model, loss_fn, batch, candidates)
    size, largest, total, count = select_batch_size(losses_by_size, pick), max(candidates), 0.0, 0
    part: Any = None
    factor = StepFactor(optimizer, lambda: _rows(part) / largest)
    try:
        for part in _parts(batch, size):
            optimizer.zero_grad()
            loss = loss_fn(model, part).mean()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * _rows(part)
            count += 1
    finally:
        factor.remove()
    return OnlineStep(size, losses_by_size, total / _rows(batch), count)


def _rows(batch: Any) -> int:
    lengths = {tensor.shape[0] if tensor.dim() else None for _, tensor in tensors(batch)}
    if len(lengths) != 1 or not all(lengths):
        raise ValueError(f"batch must hold tensors whose first dimension is the sample's, all of one length above 0, got lengths {sorted(map(str, lengths))}")
    return lengths.pop()


def _parts(batch: Any, size: int) -> Iterator[Any]:
    for start in range(0, _rows(batch), size):
        yield map_tensors(batch, lambda path, tensor, start=start: tensor[start : start + size])
