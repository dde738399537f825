"""Layers of which this process holds a part (tensor parallelism): the part of a tap's tensors that
belongs to its piece.

Legend: N samples, I in, O out, T tensor-parallel processes.

The gradient of some rows of W in y = x Wᵀ + b needs these rows' output gradients and the whole
input; that of some columns the whole output gradient and these columns' input. The pieces' squared
norms add up over the T processes; what each of them computes whole counts 1/T on each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adabatch.estimators.gradients import is_sharded

ALONE = (
    "{name} is sharded over several processes (tensor parallel), each of which sees its own part "
    'only: let adabatch.wrap measure it, with process_group=mesh["dp"], the processes that share '
    "each batch, or pass ignore=[{name!r}]")
COMPILED = (
    "{name} is sharded over several processes (tensor parallel), which cannot be measured under "
    "torch.compile: run the model uncompiled")


def is_parallel(layer: nn.Module) -> bool:
    """Whether the layer computes with DTensors: under tensor parallelism, not under fully_shard."""
    return any(is_sharded(parameter) for parameter in layer._parameters.values())


def check_parallel(name: str, layer: nn.Module, measured: bool) -> bool:
    """Whether the layer is parallel; RuntimeError where nothing adds its pieces up (it is not
    `measured` by wrap), or where it is compiled."""
    if not is_parallel(layer):
        return False
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED.format(name=name))
    if not measured:
        raise RuntimeError(ALONE.format(name=name))
    return True


def own_activations(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The part of the input that this process's piece needs, [N, ..., I or a part of it]."""
    by_columns = isinstance(layer, nn.Linear) and _sharded_dim(layer.weight) == 1
    return _local(inputs.detach(), layer, split=by_columns)


def own_backprops(layer: nn.Module, backprops: Tensor) -> Tensor:
    """The part of the output gradient that it needs, [N, ..., O or a part of it]."""
    split = False
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        split = _sharded_dim(layer.weight) == (0 if isinstance(layer, nn.Linear) else 1)
    return _local(backprops, layer, split)


def _sharded_dim(weight: Tensor) -> int | None:
    from torch.distributed.tensor import Shard

    placements = weight.placements if is_sharded(weight) else ()
    return next((each.dim for each in placements if isinstance(each, Shard)), None)


def _local(tensor: Tensor, layer: nn.Module, split: bool) -> Tensor:
    """The local part, whole or split along the last dimension. Communicates only where the layer
    left it otherwise (sequence parallel)."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = next(each.device_mesh for each in layer._parameters.values() if is_sharded(each))
    if not is_sharded(tensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placement = Shard(tensor.dim() - 1) if split else Replicate()
    with torch.no_grad():
        return tensor.redistribute(mesh, [placement] * mesh.ndim).to_local()
