"""Layers of which this process holds a part, as tensor parallelism leaves them: what their taps see is made this process's own piece.

Legend: N samples, I in, O out, T tensor-parallel processes.

Of y = x Wᵀ + b the gradient of rows of W needs these rows' output gradients and the whole input, that of columns the whole output gradient and these columns'
input. The pieces' squared norms add up over the T processes; what each of them works out whole counts 1/T on each (`BackwardRecorder.shares`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adabatch.distributed.grad_norms import is_sharded

ALONE = (
    "{name} is sharded over several processes (tensor parallel), of which each sees its own part only: let adabatch.wrap measure it, with "
    'group=mesh["dp"], the processes that share each batch, or pass ignore=[{name!r}]'
)
COMPILED = "{name} is sharded over several processes (tensor parallel), which cannot be measured under torch.compile: run the model uncompiled"


def is_parallel(layer: nn.Module) -> bool:
    """Whether the layer computes with DTensors, as it does under tensor parallelism but not under fully_shard.

    Example:
        >>> is_parallel(nn.Linear(2, 1))
        False
    """
    return any(parameter is not None and is_sharded(parameter) for parameter in layer._parameters.values())


def check_parallel(name: str, layer: nn.Module, measured: bool) -> bool:
    """Whether the layer is parallel; refuses to tap such a one where nothing adds up the processes' pieces, or in a compiled graph.

    Raises:
        RuntimeError: naming the layer and the cure.
    """
    if not is_parallel(layer):
        return False
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED.format(name=name))
    if not measured:
        raise RuntimeError(ALONE.format(name=name))
    return True


def own_activations(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The part of the layer's input that this process's piece of the gradient needs, [N, ..., I or a part of it]."""
    by_columns = isinstance(layer, nn.Linear) and _sharded_dim(layer) == 1
    return _placed(inputs.detach(), layer, split=by_columns)


def own_backprops(layer: nn.Module, backprops: Tensor) -> Tensor:
    """The part of the output's gradient that it needs, [N, ..., O or a part of it]."""
    own_outputs = 0 if isinstance(layer, nn.Linear) else 1
    return _placed(backprops, layer, split=isinstance(layer, (nn.Linear, nn.Embedding)) and _sharded_dim(layer) == own_outputs)


def _sharded_dim(layer: nn.Module) -> int | None:
    return next((placement.dim for placement in layer.weight.placements if placement.is_shard()), None)


def _placed(tensor: Any, layer: nn.Module, split: bool) -> Tensor:
    """The local part, whole or split along the last dimension; communicates only where the layer left it otherwise (sequence parallel)."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = next(parameter for parameter in layer._parameters.values() if parameter is not None).device_mesh
    if not is_sharded(tensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    with torch.no_grad():
        return tensor.redistribute(mesh, [Shard(tensor.dim() - 1) if split else Replicate()] * mesh.ndim).to_local()
