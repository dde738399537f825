"""One forward and backward pass with ears on every layer that owns parameters: what gradient its outputs got, and what gradient its parameters got through it.

While a layer runs, its parameters are replaced by aliases (views), whose gradient is that of this call alone: what a parameter's whole gradient has beyond
that of its aliases comes from a use outside the layer. An alias's gradient and an output's are taken by tensor hooks on views and copies of their own, so that
in-place operations before and after the layer do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adabatch._engine import running_backward
from adabatch._tree import holds_packed_sequence, map_tensors
from adabatch.check.owners import ParameterOwner
from adabatch.check.state import restored

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        shapes: of its outputs that need a gradient, in order.
        backprops: {index of the output: its gradient}, as far as any came.
        packed: whether a PackedSequence went in or out.
    """

    shapes: list[torch.Size] = field(default_factory=list)
    backprops: dict[int, Tensor] = field(default_factory=dict)
    packed: bool = False


@dataclass(eq=False)
class PassRecord:
    """What one pass has shown.

    Attributes:
        losses: per-sample losses [N], detached.
        calls: {layer's name: its calls, in order}.
        grads: {parameter's name: gradient of Σ w_i l_i, or None}.
        inside: {parameter's name: {layer's name: the part of it that came through calls of this layer}}.
        uses: {parameter's name: how many calls that part came from}.
        inputs: (args, kwargs) of the model's own first call, or None.
    """

    losses: Tensor
    calls: dict[str, list[Call]]
    grads: dict[str, Tensor | None]
    inside: dict[str, dict[str, Tensor]]
    uses: dict[str, int]
    inputs: tuple[tuple, dict] | None


class LayerRecorder:
    """Hooks on the layers and on the model. A context manager: everything is put back on leaving it."""

    def __init__(self, model: nn.Module, owners: list[ParameterOwner]):
        self.model, self.owners = model, owners
        self.calls: dict[str, list[Call]] = {owner.name: [] for owner in owners}
        self.inside: dict[str, dict[str, Tensor]] = {}
        self.uses: dict[str, int] = {}
        self.inputs: tuple[tuple, dict] | None = None
        self._places = [(place.holder, place.key, place.holder._parameters[place.key]) for owner in owners for place in owner.places]
        self._open: dict[nn.Module, list[Callable[[], None]]] = {owner.module: [] for owner in owners}

    def __enter__(self) -> LayerRecorder:
        self._handles = [self.model.register_forward_pre_hook(self._take_inputs, prepend=True, with_kwargs=True)]
        for owner in self.owners:
            self._handles.append(owner.module.register_forward_pre_hook(lambda module, args, owner=owner: self._enter_layer(owner), prepend=True))
            self._handles.append(owner.module.register_forward_hook(self._leaver(owner), prepend=True, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for undos in self._open.values():  # calls that an error cut short
            while undos:
                undos.pop()()
        for holder, key, parameter in self._places:
            holder._parameters[key] = parameter

    def _take_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.inputs is None:
            self.inputs = args, kwargs

    def _enter_layer(self, owner: ParameterOwner) -> None:
        if not torch.is_grad_enabled():
            self._open[owner.module].append(lambda: None)
            return
        module = owner.module
        aliases = {id(parameter): parameter.view_as(parameter) for parameter in owner.parameters.values()}
        if not _recomputing():
            for name, parameter in owner.parameters.items():
                aliases[id(parameter)].register_hook(self._alias_listener(name, owner.name))
        if isinstance(module, nn.RNNBase) and not hasattr(module, "parametrizations"):
            before = module._flat_weights  # it runs on this list, and would rebuild it if _parameters changed
            module.__dict__["_flat_weights"] = [aliases.get(id(weight), weight) for weight in before]
            self._open[module].append(lambda: module.__dict__.__setitem__("_flat_weights", before))
            return
        current = [(place, place.holder._parameters[place.key]) for place in owner.places]
        for place in owner.places:
            place.holder._parameters[place.key] = aliases[id(place.parameter)]
        self._open[module].append(lambda: [place.holder._parameters.__setitem__(place.key, tensor) for place, tensor in current] and None)

    def _alias_listener(self, parameter: str, layer: str) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            parts = self.inside.setdefault(parameter, {})
            wide = grad.detach().to_dense().to(torch.promote_types(grad.dtype, torch.float32))
            parts[layer] = parts[layer] + wide if layer in parts else wide
            self.uses[parameter] = self.uses.get(parameter, 0) + 1

        return add

    def _leaver(self, owner: ParameterOwner) -> Callable[..., Any]:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            self._open[module].pop()()
            if not torch.is_grad_enabled():
                return None
            call = Call(packed=holds_packed_sequence((args, kwargs, output)))
            if not _recomputing():
                self.calls[owner.name].append(call)
            return map_tensors(output, lambda path, tensor: _overheard(tensor, call))

        return leave


def _recomputing() -> bool:
    """Whether a backward pass is running the layer again, under activation checkpointing."""
    return running_backward() != -1


def _overheard(tensor: Tensor, call: Call) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    index = len(call.shapes)
    call.shapes.append(tensor.shape)
    copied = tensor.clone()
    copied.register_hook(lambda grad: call.backprops.__setitem__(index, grad.detach()))
    return copied


def listen(model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction, weights: Tensor) -> PassRecord:
    """Run loss_fn(model, batch) and the backward pass of Σ w_i l_i, with the model's state put back afterwards.

    Args:
        weights: w, [N], moved to the losses' device and type.
    """
    named = {place.name: place.parameter for owner in owners for place in owner.places}
    with restored(model), LayerRecorder(model, owners) as ears:
        losses = loss_fn(model, batch)
        grads = torch.autograd.grad(losses, list(named.values()), grad_outputs=weights.to(losses), allow_unused=True)
    return PassRecord(losses.detach(), ears.calls, dict(zip(named, grads, strict=True)), ears.inside, ears.uses, ears.inputs)
