"""What is measured of a model, settled once, when hooks are attached; everything that cannot be is listed in one error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from adabatch.grad_sample.compat import is_compiled_wrapper
from adabatch.grad_sample.layers.attention import unsupported_attention
from adabatch.grad_sample.registry import GradSampler, find_grad_sampler


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer with its rule, or None where it is run again sample by sample, and its trainable parameters {own name: name in the model}."""

    name: str
    layer: nn.Module
    sampler: GradSampler | None
    parameters: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The layers to measure, and all measured parameters by name; `shared` names those with more than one owner, `traced` those of no layer of their own."""

    layers: list[MeasuredLayer]
    parameters: dict[str, Tensor]
    shared: frozenset[str]
    traced: frozenset[str]


def plan_layers(model: nn.Module, ignore: Collection[str] = (), only: Collection[int] | None = None) -> Plan:
    """Find every layer that owns trainable parameters and its rule.

    Args:
        model: the model; compiled or wrapped in DistributedDataParallel it is looked through.
        ignore: names of modules to leave out of the measurement, with all that lies below them; a parameter they share with others is left out everywhere.
        only: ids of the parameters to measure; None for all that require grad.

    Raises:
        TypeError: ignore is no list of names.
        ValueError: listing all layers that cannot be measured, each with the cure.
    """
    if isinstance(ignore, str) or not isinstance(ignore, Collection) or not all(isinstance(name, str) for name in ignore):
        raise TypeError(f"ignore must be a list of module names, as model.named_modules() gives them, got {ignore!r}")
    model = unwrap(model)
    problems = [*_model_problems(model), *_unknown_names(model, ignore)]
    layers: list[MeasuredLayer] = []
    parameters = _Parameters(_parameters_below(model, ignore), only)
    traced: set[str] = set()
    inside: set[int] = set()
    for name, layer in _measurable(model, ignore):
        if id(layer) in inside:
            continue
        sampler = find_grad_sampler(layer)
        if sampler is None and owns_children_parameters(layer):
            inside.update(id(part) for part in layer.modules())
            own = parameters.take(name, layer.named_parameters(), problems)
        else:
            own = parameters.take(name, layer._parameters.items(), problems)
        if not own:
            continue
        problem = _layer_problem(name, layer, sampler)
        if problem:
            problems.append(problem)
        elif sampler is None and not uses_generic_rule(layer):
            traced.update(own.values())
        else:
            layers.append(MeasuredLayer(name, layer, sampler, own))
    if not parameters.by_name and not problems:
        where = "" if only is None else ", or the optimizer (param_groups) holds none of them: build it from the parameters of this very model"
        problems.append(f"the model has no trainable parameters to measure{where}")
    if problems:
        raise ValueError("per-sample gradients cannot be measured exactly on this model:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Plan(layers, parameters.by_name, frozenset(parameters.shared), frozenset(traced))


class _Parameters:
    """Collects the parameters to measure by their name in the model; one with several owners keeps the first owner's name."""

    def __init__(self, left_out: Collection[int], only: Collection[int] | None):
        self._left_out, self._only = left_out, only
        self._names: dict[int, str] = {}
        self.by_name: dict[str, Tensor] = {}
        self.shared: set[str] = set()

    def take(self, owner: str, parameters: Iterable[tuple[str, Tensor | None]], problems: list[str]) -> dict[str, str]:
        """{own name: name in the model} of the owner's parameters that are to be measured."""
        own = {}
        for own_name, parameter in parameters:
            if parameter is None or not parameter.requires_grad or id(parameter) in self._left_out:
                continue
            if self._only is not None and id(parameter) not in self._only:
                continue
            if isinstance(parameter, UninitializedParameter):
                problems.append(f"{_full(owner, own_name)} is not initialized: run one batch through the lazy module first")
            name = self._names.setdefault(id(parameter), _full(owner, own_name))
            if name in self.by_name:
                self.shared.add(name)
            self.by_name[name] = parameter
            own[own_name] = name
        return own


def owns_children_parameters(layer: nn.Module) -> bool:
    """Whether the layer uses the parameters of its parts without calling them, so that it is measured as a whole."""
    return isinstance(layer, nn.RNNBase) or (isinstance(layer, nn.MultiheadAttention) and type(layer).forward is nn.MultiheadAttention.forward)


def uses_generic_rule(layer: nn.Module) -> bool:
    """Whether a layer without a rule is run again sample by sample: one without parts. The parameters of a container are traced instead, as only what
    depends on them need be repeated; so are those that a forward pre-hook works on, as weight norm's does."""
    return owns_children_parameters(layer) or not (any(True for _ in layer.children()) or layer._forward_pre_hooks)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module below torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(model, DistributedDataParallel) or is_compiled_wrapper(model):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def _full(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own


def _clean(name: str) -> str:
    """A module's name as the user knows it, without the wrappers of torch.compile, DistributedDataParallel and checkpointing."""
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _measurable(model: nn.Module, ignore: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        name = _clean(name)
        if not _is_below(name, ignore):
            yield name, layer


def _parameters_below(model: nn.Module, ignore: Collection[str]) -> set[int]:
    """ids of the parameters of ignored modules."""
    named = model.named_modules(remove_duplicate=False)
    return {id(parameter) for name, layer in named if _is_below(_clean(name), ignore) for parameter in layer._parameters.values()}


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _model_problems(model: nn.Module) -> Iterator[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        yield "nn.DataParallel copies the layers at every step, which hides them from the hooks; use DistributedDataParallel, or the bare module on one device"


def _unknown_names(model: nn.Module, ignore: Collection[str]) -> Iterator[str]:
    known = {_clean(name) for name, _ in model.named_modules()}
    yield from (f"ignore names no module of the model: {name!r}" for name in ignore if name not in known)


def _layer_problem(name: str, layer: nn.Module, sampler: GradSampler | None) -> str | None:
    reason = sampler.unsupported(layer) if sampler is not None else _generic_problem(layer)
    return f"{type(layer).__name__} ({name or 'the model itself'}): {reason}" if reason else None


def _generic_problem(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.RNNBase) and layer.dropout and layer.num_layers > 1:
        return "its dropout between layers cannot be drawn again for one sample: stack single-layer modules with nn.Dropout between them"
    return unsupported_attention(layer) if isinstance(layer, nn.MultiheadAttention) else None


def bound(method: Callable, first: Any, owner: object) -> Callable:
    """The method with its first argument given, as a plain function that keeps `owner` alive."""

    def hook(*args: Any) -> Any:
        return method(first, *args)

    hook.owner = owner
    return hook
