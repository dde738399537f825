"""Leaving no trace: a model's state and the random states are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adabatch.data.rng import generators_restored

# Recurrent layers run on these lists, which a functional call rebuilds from its own tensors.
_FLAT_WEIGHTS = ("_flat_weights", "_flat_weight_refs")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore, bit for bit, training flags, buffers, .grad, flat weights and every random state;
    of the parameters only tables of embeddings with max_norm, which shrink in place."""
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    kept = {buffer for _, own in buffers for buffer in own.values() if buffer is not None}
    kept |= {module.weight for module in modules
             if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None}
    values = [(tensor, tensor.detach().clone()) for tensor in kept]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    attributes = [vars(module) for module in modules if isinstance(module, nn.RNNBase)]
    flat_weights = [(own, {key: own[key] for key in _FLAT_WEIGHTS if key in own})
                    for own in attributes]
    devices = {each.device for each in (*kept, *model.parameters()) if each.device.type == "cuda"}
    with generators_restored(), torch.random.fork_rng(list(devices), device_type="cuda"):
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for tensor, value in values:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
            for parameter, grad in grads:
                parameter.grad = grad
            for own, lists in flat_weights:
                own.update(lists)


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm in eval mode, with mean 0 and variance 1 where a layer keeps no statistics: it
    does not mix samples."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer, layer.training, dict(layer._buffers)) for layer in layers]
    like = next(model.parameters())
    try:
        for layer in layers:
            layer.training = False
            if layer.running_mean is None and layer.running_var is None:
                layer._buffers["running_mean"] = like.new_zeros(layer.num_features)
                layer._buffers["running_var"] = like.new_ones(layer.num_features)
        yield
    finally:
        for layer, training, buffers in before:
            layer.training = training
            layer._buffers.update(buffers)


def mixing_batch_norm(model: nn.Module) -> bool:
    """Whether some batch norm, as it is now, normalizes by the statistics of the batch."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return any(layer.training or (layer.running_mean is None and layer.running_var is None)
               for layer in layers)


@contextmanager
def plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Autocast off, gradients on, compiled parts run eagerly, so that hooks are seen."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device in {parameter.device.type for parameter in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def no_gradients_yet(model: nn.Module) -> Iterator[None]:
    """For a real backward pass inside `restored`: .grad empty, and no hook after accumulation that
    could step an optimizer."""
    hooks = [own for parameter in model.parameters()
             if parameter.is_leaf and (own := parameter._post_accumulate_grad_hooks)]
    before = [dict(own) for own in hooks]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        for own in hooks:
            own.clear()  # emptied, not removed: the engine holds the dictionary itself
        yield
    finally:
        for own, functions in zip(hooks, before, strict=True):
            own.update(functions)
