"""What is measured of a model, settled once, when hooks are attached; everything that cannot be is listed in one error."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from adabatch.grad_sample.registry import GradSampler, find_grad_sampler


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer with a rule, and its trainable parameters {own name: name in the model}."""

    name: str
    layer: nn.Module
    sampler: GradSampler
    parameters: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The layers to measure, and the parameters they own by name; `shared` names those with more than one owner."""

    layers: list[MeasuredLayer]
    parameters: dict[str, Tensor]
    shared: frozenset[str]


def plan_layers(model: nn.Module, ignore: Collection[str] = (), only: Collection[int] | None = None) -> Plan:
    """Find every layer that owns trainable parameters and its rule.

    Args:
        model: the model; compiled or wrapped in DistributedDataParallel it is looked through.
        ignore: names of modules to leave out of the measurement, with all that lies below them; a parameter they share with others is left out everywhere.
        only: ids of the parameters to measure; None for all that require grad.

    Raises:
        ValueError: listing all layers that cannot be measured, each with the cure.
    """
    model = unwrap(model)
    problems = [*_model_problems(model), *_unknown_names(model, ignore)]
    layers: list[MeasuredLayer] = []
    names: dict[int, str] = {}
    parameters: dict[str, Tensor] = {}
    shared: set[str] = set()
    left_out = _parameters_below(model, ignore)
    for name, layer in _measurable(model, ignore):
        own = {}
        for own_name, parameter in layer._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in left_out or (only is not None and id(parameter) not in only):
                continue
            if isinstance(parameter, UninitializedParameter):
                problems.append(f"{_full(name, own_name)} is not initialized: run one batch through the lazy module first")
            full_name = names.setdefault(id(parameter), _full(name, own_name))
            if full_name in parameters:
                shared.add(full_name)
            parameters[full_name] = parameter
            own[own_name] = full_name
        if not own:
            continue
        sampler = find_grad_sampler(layer)
        problem = _layer_problem(name, layer, sampler)
        if problem:
            problems.append(problem)
        else:
            layers.append(MeasuredLayer(name, layer, sampler, own))
    if not parameters and not problems:
        problems.append("the model has no trainable parameters to measure")
    if problems:
        raise ValueError("per-sample gradients cannot be measured exactly on this model:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Plan(layers, parameters, frozenset(shared))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module below torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(model, (DistributedDataParallel, OptimizedModule)):
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
    where = f"{type(layer).__name__} ({name or 'the model itself'})"
    if sampler is None:
        return f"No grad_sample rule for {where}. Register one with register_grad_sampler, or pass ignore=[{name!r}]."
    reason = sampler.unsupported(layer)
    return f"{where}: {reason}" if reason else None
