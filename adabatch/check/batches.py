"""Cutting a batch down to a few samples, and finding where the model's inputs count them.

A dimension as long as the batch need not be the batch's: every guess is tried out, by running the smaller batch and comparing its losses with those of the
same samples in the larger one.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adabatch._tree import Path, map_tensors, tensors
from adabatch.check.listening import Call, LayerRecorder, LossFunction
from adabatch.check.owners import ParameterOwner
from adabatch.check.state import restored
from adabatch.grad_sample.layout import BatchSizeSource

MAX_SAMPLES = 8
_MAX_GUESSES = 64


@dataclass(eq=False)
class Trial:
    """An evaluation-mode forward pass: losses [N], the layers' calls, the model's own inputs."""

    losses: Tensor
    calls: dict[str, list[Call]]
    inputs: tuple[tuple, dict] | None


def run_trial(model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction) -> Trial:
    """Run loss_fn(model, batch) with the whole model in evaluation mode, so that sizes can be compared; state is put back.

    Raises:
        TypeError: loss_fn does not return a tensor.
        ValueError: it does not return one loss per sample, or fewer than two.
    """
    with restored(model), LayerRecorder(model, owners) as ears:
        for module in model.modules():
            module.training = False
        losses = loss_fn(model, batch)
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor of per-sample losses, got {type(losses).__name__}")
    if losses.dim() != 1:
        raise ValueError(
            f"loss_fn must return per-sample losses [N], got the shape {list(losses.shape)}: "
            "use reduction='none', and sum or average over all dimensions but that of the samples"
        )
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any trainable parameter: call the model in loss_fn with gradients on")
    return Trial(losses.detach(), ears.calls, ears.inputs)


def smaller_batch(model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction, full: Trial, n_samples: int) -> tuple[Any, Trial] | None:
    """The first n_samples of a batch, and a trial of them; None if no way of cutting gives the losses that these samples had in the whole batch.

    Every tensor is cut along a dimension as long as the batch, or not at all; the first dimension is tried first.
    """
    size = len(full.losses)
    leaves = list(tensors(batch))
    choices = [[dim for dim, length in enumerate(tensor.shape) if length == size] for _, tensor in leaves]
    for dims in itertools.islice(itertools.product(*([*dims, None] for dims in choices)), _MAX_GUESSES):
        by_path = {path: dim for (path, _), dim in zip(leaves, dims, strict=True) if dim is not None}
        cut = map_tensors(batch, lambda path, tensor, by_path=by_path: tensor.narrow(by_path[path], 0, n_samples) if path in by_path else tensor)
        try:
            trial = run_trial(model, owners, cut, loss_fn) if by_path else None
        except Exception:  # a wrong guess may fail anywhere in the user's code
            continue
        if trial is not None and _same(trial.losses, full.losses[:n_samples]):
            return cut, trial
    return None


def batch_dims(large: Trial, small: Trial) -> dict[str, list[list[frozenset[int]]]]:
    """{layer's name: per call, per output: the dimensions whose length depends on the number of samples}; layers whose calls cannot be matched are left out."""
    found = {}
    for name, calls in large.calls.items():
        pairs = list(zip(calls, small.calls[name], strict=False))
        alike = len(calls) == len(small.calls[name]) and all([len(s) for s in a.shapes] == [len(s) for s in b.shapes] for a, b in pairs)
        if alike:
            found[name] = [[_changed(*shapes) for shapes in zip(a.shapes, b.shapes, strict=True)] for a, b in pairs]
    return found


def find_batch_size_source(model: nn.Module, large: Trial, small: Trial | None) -> BatchSizeSource | None:
    """Where the model's inputs count the samples: the first dimension that has N in the large trial and n in the small one.

    Without a small trial, the only dimension of length N of some input; None if every input with such a dimension has two, or the model itself is not called.
    """
    if large.inputs is None or (small is not None and small.inputs is None):
        return None
    size = len(large.losses)
    shorter = dict(_inputs(small.inputs)) if small is not None else {}
    for path, tensor in _inputs(large.inputs):
        dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
        if small is not None:
            other = shorter.get(path)
            dims = [] if other is None or other.dim() != tensor.dim() else [dim for dim in dims if other.shape[dim] == len(small.losses)]
        if dims and (small is not None or len(dims) == 1):
            return _source(model, path, dims[0])
    return None


def _inputs(inputs: tuple[tuple, dict]) -> list[tuple[Path, Tensor]]:
    args, kwargs = inputs
    return [*tensors(args), *tensors(kwargs)]


def _source(model: nn.Module, path: Path, dim: int) -> BatchSizeSource:
    named = [name for name, kind in inspect.signature(model.forward).parameters.items() if kind.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)]
    argument, *rest = path
    if isinstance(argument, int):
        return BatchSizeSource(argument, named[argument] if argument < len(named) else None, tuple(rest), dim)
    return BatchSizeSource(named.index(argument) if argument in named else None, argument, tuple(rest), dim)


def _changed(large: torch.Size, small: torch.Size) -> frozenset[int]:
    return frozenset(dim for dim, (a, b) in enumerate(zip(large, small, strict=True)) if a != b)


def _same(losses: Tensor, expected: Tensor) -> bool:
    rtol = 1e-3 if losses.dtype in (torch.float32, torch.float64) else 5e-2
    return losses.shape == expected.shape and torch.allclose(losses.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.double().abs().mean()))


