"""Per-sample gradients of any function of parameters and rows: vmap of its vjp over the samples, a plain loop where vmap cannot.

Legend: S measured samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import vjp, vmap

from adabatch.kernels.chunks import CHUNK_BYTES

RANDOM = (
    "draws random numbers inside its forward pass, so that its per-sample gradients cannot be worked out again with the same draws. Put the dropout into a "
    "layer of its own behind it (nn.Dropout), set its probability to 0, or pass ignore=[...]."
)

MIXES = (
    "{name} gives {got} when it is run for one sample, where {expected} was expected: it mixes samples, or depends on the size of the batch. "
    "Give it a rule with register_grad_sampler, or pass ignore=[...]."
)

IN_PLACE = (
    "changes its input in place, so that what it was given cannot be worked out again: write `x = x + y` for `x += y`, or clone the input first, "
    "or pass ignore=[...]."
)

Function = Callable[..., Sequence[Tensor]]


def per_sample_grads(
    function: Function, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor], batched: Sequence[bool], cotangents: Sequence[Tensor], name: str
) -> dict[str, Tensor]:
    """Gradients of Σ_k ⟨cotangent_k, output_k⟩ of each sample alone, {parameter: [S, *shape]}.

    Args:
        function: (parameters, *inputs) -> outputs, where batched inputs and all outputs have a first dimension of one sample.
        parameters: what to differentiate with respect to.
        inputs: tensors; those marked in `batched` are [S, ...].
        batched: whether each input carries samples.
        cotangents: gradient with respect to each output, [S, ...].
        name: of the layer, for errors.

    Raises:
        RuntimeError: the function draws random numbers, changes its inputs in place or mixes samples.

    Example:
        >>> grads = per_sample_grads(lambda p, x: (p["scale"] * x,), {"scale": torch.ones(2)}, [torch.ones(3, 2)], [True], [torch.ones(3, 2)], "Scale")
        >>> grads["scale"].shape
        torch.Size([3, 2])
    """
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in (*parameters.values(), *cotangents)) else torch.float32
    parameters = {key: _widened(value.detach(), wide) for key, value in parameters.items()}
    inputs = [_widened(value.detach(), wide) for value in inputs]
    cotangents = [_widened(value, wide) for value in cotangents]

    def one(rows: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> dict[str, Tensor]:
        args = [row.unsqueeze(0) if each else row for row, each in zip(rows, batched, strict=True)]
        outputs, pull = vjp(lambda own: tuple(function(own, *args)), parameters)
        for grad, output in zip(outer, outputs, strict=True):
            if output.shape[1:] != grad.shape or output.shape[0] != 1:
                raise RuntimeError(MIXES.format(name=name, got=tuple(output.shape), expected=(1, *grad.shape)))
        return pull(tuple(grad.unsqueeze(0).to(output.dtype) for grad, output in zip(outer, outputs, strict=True)))[0]

    rows, outer = tuple(inputs), tuple(cotangents)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            chunk = max(1, CHUNK_BYTES // max(1, 4 * sum(math.prod(value.shape) for value in parameters.values())))
            in_dims = (tuple(0 if each else None for each in batched), (0,) * len(outer))
            return vmap(one, in_dims=in_dims, randomness="error", chunk_size=None if torch.compiler.is_compiling() else max(8, chunk))(rows, outer)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if "randomness" in str(error):
            raise RuntimeError(f"{name} {RANDOM}") from error
        if "mutate a captured Tensor" in str(error):
            raise RuntimeError(f"{name} {IN_PLACE}") from error
        if "when it is run for one sample" in str(error):
            raise
        return _loop(one, rows, batched, outer)


def _loop(one: Callable, rows: tuple[Tensor, ...], batched: Sequence[bool], outer: tuple[Tensor, ...]) -> dict[str, Tensor]:
    grads = [
        one(tuple(row[sample] if each else row for row, each in zip(rows, batched, strict=True)), tuple(grad[sample] for grad in outer))
        for sample in range(outer[0].shape[0])
    ]
    return {key: torch.stack([grad[key] for grad in grads]) for key in grads[0]}


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor
