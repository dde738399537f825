"""What is measured of a model, decided once; one error lists everything that cannot be."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from adabatch.grad_sample.compat import is_compiled_wrapper
from adabatch.grad_sample.layers.generic import RecomputedCall, call_type
from adabatch.grad_sample.registry import GradSampler, find_grad_sampler

ATTACH_AGAIN = (
    "Neither the hooks nor an optimizer that was made before hold the new ones. Change the model "
    "first, then make the optimizer and attach (adabatch.wrap, or GradSampleHooks): remove() the "
    "old hooks, give the new parameters to the optimizer (add_param_group, or a new one), and "
    "attach again. load_state_dict(state, assign=True) replaces parameters too: leave assign out"
)


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer with its rule (None: it is run again sample by sample) and its trainable parameters
    {own name: name in the model}."""

    name: str
    layer: nn.Module
    sampler: GradSampler | None
    parameters: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The layers to measure and all measured parameters by name: those with more than one owner are
    `shared`, those of no layer with a tap `traced`."""

    layers: list[MeasuredLayer]
    parameters: dict[str, Tensor]
    shared: frozenset[str]
    traced: frozenset[str]


def plan_layers(
    model: nn.Module, ignore: Collection[str] = (), only: Collection[int] | None = None
) -> Plan:
    """Find every layer that owns trainable parameters and its rule.

    Args:
        model: the model, which torch.compile and DistributedDataParallel may have wrapped.
        ignore: names of modules to leave out, with all below them, or of single parameters, and
            everywhere else where these parameters are used.
        only: ids of the parameters to measure; None for all that require grad.

    Raises:
        TypeError: model is not a module, or ignore is not a list of names.
        ValueError: listing all layers that cannot be measured, each with the fix.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = isinstance(ignore, Collection) and not isinstance(ignore, str)
    if not names or not all(isinstance(name, str) for name in ignore):
        raise TypeError("ignore must be a list of names, as model.named_modules() and "
                        f"named_parameters() give them, got {ignore!r}")
    model = unwrap(model)
    problems = [*_model_problems(model, ignore)]
    layers: list[MeasuredLayer] = []
    named = model.named_modules(remove_duplicate=False)
    ignored = {id(parameter) for name, layer in named
               for own, parameter in layer._parameters.items()
               if _is_below(clean_name(name), ignore)
               or clean_name(f"{name}.{own}" if name else own) in ignore}
    parameters = _Parameters(ignored, only)
    traced: set[str] = set()
    inside: set[int] = set()
    for name, layer in model.named_modules():
        name = clean_name(name)
        if id(layer) in inside or _is_below(name, ignore):
            continue
        sampler, call = find_grad_sampler(layer), call_type(layer)
        whole = call is not RecomputedCall  # it owns its submodules' parameters
        if sampler is None and whole:
            inside.update(id(part) for part in layer.modules())
            own = parameters.collect(name, layer.named_parameters(), problems)
        else:
            own = parameters.collect(name, layer._parameters.items(), problems)
        if not own:
            continue
        problem = call.problem(layer) if sampler is None else sampler.unsupported(layer)
        if problem:
            problems.append(f"{type(layer).__name__} ({name or 'the model itself'}): {problem}")
        elif sampler is None and not whole and not _can_run_again(layer):
            traced.update(own.values())
        else:
            layers.append(MeasuredLayer(name, layer, sampler, own))
    if not parameters.by_name and not problems:
        problems.append("the model has no trainable parameters to measure" + (
            "" if only is None else ", or the optimizer (param_groups) holds none of them: build "
            "it from the parameters of this model"))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"per-sample gradients cannot be measured exactly on this model:\n{listed}")
    return Plan(layers, parameters.by_name, frozenset(parameters.shared), frozenset(traced))


class _Parameters:
    """Collects the parameters to measure by their name in the model, the first owner's."""

    def __init__(self, ignored: Collection[int], only: Collection[int] | None):
        self._ignored, self._only = ignored, only
        self._names: dict[int, str] = {}
        self.by_name: dict[str, Tensor] = {}
        self.shared: set[str] = set()

    def collect(
        self, owner: str, parameters: Iterable[tuple[str, Tensor | None]], problems: list[str]
    ) -> dict[str, str]:
        own = {}
        for own_name, parameter in parameters:
            if parameter is None or not parameter.requires_grad or id(parameter) in self._ignored:
                continue
            if self._only is not None and id(parameter) not in self._only:
                continue
            full = f"{owner}.{own_name}" if owner else own_name
            if isinstance(parameter, UninitializedParameter):
                problems.append(
                    f"{full} is not initialized: run one batch through the lazy module first")
            if parameter.is_complex():
                problems.append(
                    f"{full} is complex: hold its real and imaginary parts in a real parameter of "
                    f"shape [..., 2] and use torch.view_as_complex of it, or pass "
                    f"ignore=[{full!r}]")
            name = self._names.setdefault(id(parameter), full)
            if name in self.by_name:
                self.shared.add(name)
            self.by_name[name] = parameter
            own[own_name] = name
        return own


class ParameterIdentity:
    """Looks whether the model still has the parameters that were planned for.

    Args:
        parameters: the measured ones by name; they keep their names' objects alive.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> same = ParameterIdentity(model, dict(model.named_parameters()))
        >>> same.check()
        >>> model[0].bias = nn.Parameter(model[0].bias.detach() + 1)
        >>> same.check()
        Traceback (most recent call last):
        RuntimeError: these parameters were replaced ... 0.bias. ...
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        self._model, self._parameters = weakref.ref(model), parameters
        measured = set(map(id, parameters.values()))
        self._others = [
            weakref.ref(each) for each in model.parameters() if id(each) not in measured]

    def check(self) -> None:
        """Raise a RuntimeError listing parameters that were replaced or added and are trained."""
        model = self._model()
        if model is None:
            return
        known = {id(each) for each in self._parameters.values()}
        known.update(id(each) for each in (other() for other in self._others) if each is not None)
        new = {clean_name(name): parameter for name, parameter in model.named_parameters()
               if id(parameter) not in known}
        replaced = [name for name in new if name in self._parameters]
        added = [name for name, parameter in new.items()
                 if name not in replaced and parameter.grad is not None]
        texts = [f"these parameters were {how} since the hooks were attached: {', '.join(names)}."
                 for how, names in (("replaced", replaced), ("added", added)) if names]
        if texts:
            raise RuntimeError(f"{' '.join(texts)} {ATTACH_AGAIN}")


def _can_run_again(layer: nn.Module) -> bool:
    """Whether a layer without a rule is run again. A container's parameters are traced instead, as
    only what depends on them need be repeated; so are those that a forward pre-hook changes."""
    return not any(True for _ in layer.children()) and not layer._forward_pre_hooks


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile and DistributedDataParallel have wrapped."""
    while isinstance(model, DistributedDataParallel) or is_compiled_wrapper(model):
        wrapped = "module" if isinstance(model, DistributedDataParallel) else "_orig_mod"
        model = model.get_submodule(wrapped)
    return model


def clean_name(name: str) -> str:
    """A module's name without the wrappers of torch.compile and activation checkpointing.

    Example:
        >>> clean_name("_orig_mod.block._checkpoint_wrapped_module.linear")
        'block.linear'
    """
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _model_problems(model: nn.Module, ignore: Collection[str]) -> Iterator[str]:
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        yield (
            "nn.DataParallel copies the layers at every step, which hides them from the hooks; use "
            "DistributedDataParallel, or the bare module on one device")
    named = (*model.named_modules(), *model.named_parameters(remove_duplicate=False))
    known = {clean_name(name) for name, _ in named}
    for name in ignore:
        if name not in known:
            yield (f"ignore contains {name!r}, but the model has no module or parameter of that "
                   "name")
