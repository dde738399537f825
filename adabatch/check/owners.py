"""Which layer answers for which trainable parameter."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Place:
    """One entry of a module's _parameters that a layer answers for; `name` is the parameter's name in the model, that of its first place if it has several."""

    name: str
    holder: nn.Module
    key: str
    parameter: Tensor


@dataclass(eq=False)
class ParameterOwner:
    """A layer that owns trainable parameters, itself or through parts that are never called: its parametrizations, lists of parameters, and what
    nn.MultiheadAttention holds.

    Attributes:
        name: its name in the model, '' for the model itself.
        module: the layer.
        places: where the parameters it answers for lie.
    """

    name: str
    module: nn.Module
    places: list[Place] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name for a person."""
        return self.name or "the model itself"

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by their names in the model."""
        return {place.name: place.parameter for place in self.places}


def find_owners(model: nn.Module) -> list[ParameterOwner]:
    """Every layer that owns trainable parameters, in the order of named_modules.

    Raises:
        ValueError: there is none, or a lazy module has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.MultiheadAttention(4, 1, bias=False))
        >>> [(owner.name, [place.name for place in owner.places]) for owner in find_owners(model)]
        [('0', ['0.weight', '0.bias']), ('2', ['2.in_proj_weight', '2.out_proj.weight'])]
    """
    modules = dict(model.named_modules())
    owners: dict[str, ParameterOwner] = {}
    names: dict[int, str] = {}
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            name = names.setdefault(id(parameter), clean_name(f"{path}.{key}" if path else key))
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name} is not initialized: run one batch through the lazy module first")
            owner_path = _answering(path, modules)
            owner = owners.setdefault(owner_path, ParameterOwner(clean_name(owner_path), modules[owner_path]))
            owner.places.append(Place(name, module, key, parameter))
    if not owners:
        raise ValueError("the model has no trainable parameters, so there is nothing to check")
    return list(owners.values())


def clean_name(name: str) -> str:
    """A module's or parameter's name as the user knows it, without the wrappers of torch.compile and checkpointing.

    Example:
        >>> clean_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _answering(path: str, modules: dict[str, nn.Module]) -> str:
    """The path of the module that is called when the parameters of the one at `path` are used."""
    parts = path.split(".")
    for end, part in enumerate(parts):
        above = ".".join(parts[:end])
        if type(modules[above]).forward is nn.MultiheadAttention.forward or (part == "parametrizations" and parametrize.is_parametrized(modules[above])):
            return above
    while path and type(modules[path]).forward is nn.Module.forward:  # a list of parameters, or a module that only holds them
        path = path.rpartition(".")[0]
    return path
