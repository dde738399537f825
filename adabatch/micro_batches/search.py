"""The largest micro-batch that fits into memory, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from adabatch._types import Batch, LossFn, Sample, Source
from adabatch.data.rng import generators_restored
from adabatch.data.split import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from adabatch.data.loader import AdaptiveDataLoader

# Repeated to fill a batch: memory depends on shapes, and reading a large batch could take long.
_SAMPLES = 16


def find_micro_batch_size(
    model: nn.Module, optimizer: Optimizer, loader: AdaptiveDataLoader, loss_fn: LossFn, *,
    largest: int, margin: float = 0.1, samples: int = _SAMPLES,
) -> int:
    """The largest size that fits, less a margin: 2, 4, 8, … until memory runs out, then bisection.

    A trial is a whole step, because the optimizer's state takes memory too. Model, gradients,
    optimizer and random states are restored. Where samples differ in length, put loader.retrying()
    around the loop too.

    Args:
        loss_fn: (model, batch) -> the scalar loss that is differentiated; it moves the batch to
            the model's device.
        largest: the largest size tried; where it fits, it is the answer.
        margin: fraction of the largest size that fitted which is left free.
        samples: number of different samples, repeated to fill the batches.

    Raises:
        RuntimeError: memory runs out with one sample.
        ValueError: an empty data set, or a margin outside [0, 1).

    Example:
        >>> from adabatch import AdaptiveDataLoader
        >>> model = nn.Linear(2, 1)
        >>> loader = AdaptiveDataLoader(torch.randn(9, 2), batch_size=4)
        >>> def loss_fn(model, batch):
        ...     if len(batch) > 50:
        ...         raise torch.OutOfMemoryError("out of memory")
        ...     return model(batch).mean()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> find_micro_batch_size(model, optimizer, loader, loss_fn, largest=400, margin=0.0)
        50
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be a number from 0 to below 1, got {margin!r}")
    with _restored(model, optimizer):
        few = _few_samples(loader.dataset, samples)

        def fits(size: int) -> bool:
            def make_batch() -> Batch:
                return loader.collate_fn(list(islice(cycle(few), size)))

            return _fits(model, optimizer, loss_fn, make_batch)

        fitted, failed = 0, largest + 1
        # Not 1: batch norm refuses it.
        size = min(2, largest)
        while fitted < size < failed:
            if fits(size):
                fitted, size = size, min(2 * size, largest)
            else:
                failed = size
        if fitted == largest:
            return largest
        if fitted == 0:
            if size > 1 and fits(1):
                return 1
            raise RuntimeError(
                "memory runs out with a micro-batch of one sample: the model, its gradients and "
                "the optimizer's state leave no room for it")
        while failed - fitted > 1 + fitted // 32:
            middle = (fitted + failed) // 2
            if fits(middle):
                fitted = middle
            else:
                failed = middle
    return max(1, int(fitted * (1 - margin)))


def _few_samples(dataset: Source, count: int) -> list[Sample]:
    if isinstance(dataset, IterableDataset):
        # A copy, because reading may move the data set's own position.
        few = list(islice(iter(copy.deepcopy(dataset)), count))
    else:
        few = [dataset[index] for index in range(min(count, len(dataset)))]
    if not few:
        raise ValueError("micro-batches 'auto' needs a sample to try, but the data set is empty")
    return few


def _fits(
    model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, make_batch: Callable[[], Batch]
) -> bool:
    fitted = False
    try:
        _check_loss(loss := loss_fn(model, make_batch()))
        loss.backward()
        optimizer.step()
        fitted = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    optimizer.zero_grad()
    free_memory()
    return fitted


def _check_loss(loss: object) -> None:
    """Raise for what is no scalar loss with a gradient."""
    if not isinstance(loss, Tensor):
        raise TypeError("loss_fn(model, batch) must return the loss that is differentiated, a "
                        f"scalar tensor, got {type(loss).__name__}: return it")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "loss_fn(model, batch) must return the loss that is differentiated, a scalar tensor "
            f"with a gradient, got the shape {tuple(loss.shape)}, requires_grad="
            f"{loss.requires_grad}: take the mean of losses, and compute them from model(...)")


@contextmanager
def _restored(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Puts model, gradients, optimizer state and random states back."""
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()
               if isinstance(value, Tensor)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads = [parameter.grad for parameter in parameters]
    same = {id(parameter): parameter for parameter in parameters}
    state = copy.deepcopy(dict(optimizer.state.items()), memo=same)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    for parameter in parameters:
        parameter.grad = None
    try:
        with generators_restored(), torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in weights:
                    value.copy_(weights[name])
        optimizer.state.clear()
        optimizer.state.update(state)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
