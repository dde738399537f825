"""Backward passes that record which gradient reached each layer's outputs and parameters.

While a layer runs, its parameters are replaced by aliases (views), whose gradient is that of this
call alone: what a parameter's whole gradient has beyond that of its aliases comes from a use
outside the layer. Gradients are taken by tensor hooks on views and copies, so that in-place
operations before and after the layer do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from adabatch.estimators.gradients import running_backward
from adabatch._tree import Path, holds_packed_sequence, map_tensors, tensors
from adabatch._types import Args, Batch, Inputs, Kwargs, LossFn
from adabatch.check.isolate import restored
from adabatch.grad_sample.layers.generic import RecomputedCall, call_type
from adabatch.grad_sample.plan import clean_name


@dataclass(frozen=True)
class ParameterSlot:
    """An entry of a module's _parameters; `name` is the parameter's (first) name in the model."""

    name: str
    holder: nn.Module
    key: str
    parameter: Tensor


@dataclass(eq=False)
class ParameterOwner:
    """A layer that owns trainable parameters, itself or through parts that are never called: its
    parametrizations, lists of parameters, what nn.MultiheadAttention holds."""

    name: str
    module: nn.Module
    slots: list[ParameterSlot] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name in the model: parameter}."""
        return {slot.name: slot.parameter for slot in self.slots}

    @property
    def is_narrow(self) -> bool:
        """Whether a parameter has a type of fewer than 32 bits."""
        return any(torch.finfo(slot.parameter.dtype).bits < 32 for slot in self.slots)


@dataclass(frozen=True)
class CheckedModel:
    """A model, its layers with trainable parameters, and the function of its per-sample losses."""

    model: nn.Module
    owners: list[ParameterOwner]
    loss_fn: LossFn

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name in the model: parameter} of all owners."""
        return {name: each for owner in self.owners for name, each in owner.parameters.items()}


def find_owners(model: nn.Module) -> list[ParameterOwner]:
    """Every layer that owns trainable parameters; ValueError: none, or a lazy one without shape."""
    modules = dict(model.named_modules())
    owners: dict[str, ParameterOwner] = {}
    names: dict[int, str] = {}
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            name = names.setdefault(id(parameter), clean_name(f"{path}.{key}" if path else key))
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name} is not initialized: run one batch through the lazy "
                                 "module first")
            at = _called_path(path, modules)
            owner = owners.setdefault(at, ParameterOwner(clean_name(at), modules[at]))
            owner.slots.append(ParameterSlot(name, module, key, parameter))
    if not owners:
        raise ValueError("the model has no trainable parameters, so there is nothing to check")
    return list(owners.values())


def _called_path(path: str, modules: dict[str, nn.Module]) -> str:
    """The path of the module that is called when the parameters of the one at `path` are used."""
    parts = path.split(".")
    for end, part in enumerate(parts):
        above = ".".join(parts[:end])
        own = part == "parametrizations" and parametrize.is_parametrized(modules[above])
        if own or call_type(modules[above]) is not RecomputedCall:  # it uses its parts' parameters
            return above
    while path and type(modules[path]).forward is nn.Module.forward:  # it only holds parameters
        path = path.rpartition(".")[0]
    return path


@dataclass(eq=False)
class Call:
    """One call of a layer."""

    inputs: list[Tensor] = field(default_factory=list)  # the first tensor that went in
    output: Tensor | None = None  # the first with a gradient that came out
    shapes: list[torch.Size] = field(default_factory=list)  # of the outputs that need a gradient
    backprops: dict[int, Tensor] = field(default_factory=dict)  # {index of the output: gradient}
    packed: bool = False  # whether a PackedSequence went in or out


class PassRecord:
    """What a pass has shown; as a context manager, the hooks that record it."""

    losses: Tensor  # per sample [N], detached

    def __init__(self, model: nn.Module, owners: list[ParameterOwner]):
        # {layer's name: its calls, in order}.
        self.calls: dict[str, list[Call]] = {owner.name: [] for owner in owners}
        # {parameter's name: gradient of Σ w_i l_i, or None}; empty without a backward pass.
        self.grads: dict[str, Tensor | None] = {}
        # {parameter's name: {layer's name: the part that came through calls of this layer}}.
        self.inside: dict[str, dict[str, Tensor]] = {}
        self.uses: dict[str, int] = {}  # {parameter's name: the number of those calls}
        self.inputs: Inputs | None = None  # of the model's own first call
        self._model, self._owners = model, owners
        self._undo: dict[str, list[Callable[[], None]]] = {owner.name: [] for owner in owners}

    def __enter__(self) -> PassRecord:
        self._handles = [self._model.register_forward_pre_hook(
            self._take_inputs, prepend=True, with_kwargs=True)]
        for owner in self._owners:
            module, after = owner.module, partial(self._after, owner)
            self._handles += [
                module.register_forward_pre_hook(partial(self._before, owner), prepend=True),
                module.register_forward_hook(after, prepend=True, with_kwargs=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for owner in self._owners:
            for undo in reversed(self._undo[owner.name]):  # calls that an error cut short
                undo()
            for slot in owner.slots:
                slot.holder._parameters[slot.key] = slot.parameter  # type: ignore[assignment]

    def _take_inputs(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if self.inputs is None:
            self.inputs = args, kwargs

    def _before(self, owner: ParameterOwner, module: nn.Module, args: Args) -> None:
        """Put aliases in place of the layer's parameters."""
        if not torch.is_grad_enabled():
            self._undo[owner.name].append(lambda: None)
            return
        aliases = {id(each): each.view_as(each) for each in owner.parameters.values()}
        if not _recomputing():
            for name, parameter in owner.parameters.items():
                aliases[id(parameter)].register_hook(partial(self._add_part, name, owner.name))
        if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
            # It runs on this list, and would rebuild it if _parameters changed.
            weights = module._flat_weights
            aliased = [aliases.get(id(weight), weight) for weight in weights]
            vars(module)["_flat_weights"] = aliased
            self._undo[owner.name].append(lambda: vars(module).update(_flat_weights=weights))
            return
        current = [(slot, slot.holder._parameters[slot.key]) for slot in owner.slots]
        for slot in owner.slots:
            own: dict[str, Tensor] = slot.holder._parameters  # type: ignore[assignment]
            own[slot.key] = aliases[id(slot.parameter)]

        def undo() -> None:
            for slot, tensor in current:
                slot.holder._parameters[slot.key] = tensor

        self._undo[owner.name].append(undo)

    def _add_part(self, name: str, layer: str, grad: Tensor) -> None:
        parts = self.inside.setdefault(name, {})
        wide = grad.detach().to_dense().to(torch.promote_types(grad.dtype, torch.float32))
        parts[layer] = parts[layer] + wide if layer in parts else wide
        self.uses[name] = self.uses.get(name, 0) + 1

    def _after(
        self, owner: ParameterOwner, module: nn.Module, args: Args, kwargs: Kwargs, output: Batch
    ) -> Batch:
        """Put the parameters back, and record the call."""
        self._undo[owner.name].pop()()
        if not torch.is_grad_enabled():
            return None
        call = Call([each.detach() for _, each in tensors((args, kwargs))[:1]])
        call.packed = holds_packed_sequence((args, kwargs, output))
        if not _recomputing():
            self.calls[owner.name].append(call)

        def tap(path: Path, tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            index = len(call.shapes)
            call.shapes.append(tensor.shape)
            if call.output is None:
                call.output = tensor.detach()
            copied = tensor.clone()
            copied.register_hook(
                lambda grad: call.backprops.update({index: real_parts(grad.detach())}))
            return copied

        return map_tensors(output, tap)


def real_parts(tensor: Tensor) -> Tensor:
    """The tensor; a complex one as its real and imaginary parts [..., 2]."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _recomputing() -> bool:
    """Whether a backward pass runs the layer again, under activation checkpointing."""
    return running_backward() != -1


def record_pass(checked: CheckedModel, batch: Batch, weights: Tensor) -> PassRecord:
    """Run loss_fn(model, batch) and the backward pass of Σ w_i l_i; the model is restored."""
    model, named = checked.model, checked.parameters
    with restored(model), PassRecord(model, checked.owners) as record:
        losses = checked.loss_fn(model, batch)
        weights = weights.to(losses)
        grads = torch.autograd.grad(losses, list(named.values()), weights, allow_unused=True)
    record.losses, record.grads = losses.detach(), dict(zip(named, grads, strict=True))
    return record


def run_trial(checked: CheckedModel, batch: Batch) -> PassRecord:
    """A forward pass in evaluation mode; TypeError, ValueError: no losses [N] with a gradient."""
    model = checked.model
    with restored(model), PassRecord(model, checked.owners) as record:
        for module in model.modules():
            module.training = False
        losses = checked.loss_fn(model, batch)
    if not isinstance(losses, Tensor):
        raise TypeError("loss_fn must return a tensor of per-sample losses, got "
                        f"{type(losses).__name__}")
    if losses.dim() != 1:
        raise ValueError("loss_fn must return per-sample losses [N], got the shape "
                         f"{list(losses.shape)}: use reduction='none', and sum or average over all "
                         "dimensions but the samples'")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any trainable parameter: call the model in "
                         "loss_fn with gradients on")
    record.losses = losses.detach()
    return record
