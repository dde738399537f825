"""The error of batch norm on a single sample, with its cure."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adabatch._types import Args
from adabatch.data.split import BatchSplit

_CURES = (
    "the loader's batch has one sample only, as a last one may: leave it out (drop_last=True of "
    "the data loader, or loader.drop_last = True), or choose batch sizes of at least 2",
    "a micro-batch has one sample only: let micro-batches have 3 samples or more (of 2, an odd "
    "batch leaves one)")


def naming_batch_norm(model: nn.Module, split: BatchSplit
                      ) -> Callable[[], AbstractContextManager[None]]:
    """What to enter while a batch of one sample is out: train-mode batch norm then says what to do.

    Raises (in the layer's forward pass):
        ValueError: one value for each channel.
    """
    return partial(_named, weakref.ref(model), split)


@contextmanager
def _named(reference: weakref.ref[nn.Module], split: BatchSplit) -> Iterator[None]:
    model = reference()
    layers = [] if model is None else [
        (name, layer) for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)]
    del model
    handles = [layer.register_forward_pre_hook(partial(_check, name, split))
               for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str, split: BatchSplit, layer: _BatchNorm, inputs: Args) -> None:
    shape = tuple(inputs[0].shape) if inputs else ()
    if layer.training and len(shape) > 1 and inputs[0].numel() == shape[1]:
        raise ValueError(
            f"batch norm ({name}) in training mode needs more than one value for each channel, got "
            f"the shape {shape}: {_CURES[split.count > 1]}.")
