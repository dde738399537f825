"""The registry of layer rules: which pure function gives the per-sample gradients of a layer's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from adabatch.grad_sample.factors.base import Factor

__all__ = ["GradSampler", "find_grad_sampler", "register_grad_sampler", "registered_layer_types"]

Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Factor]]

# A subclass that overrides one of these computes something its base's rule does not know of.
_COMPUTING_METHODS = ("forward", "_conv_forward")

_SAMPLERS: dict[type[nn.Module], GradSampler] = {}


def _never(layer: nn.Module) -> bool:
    return False


def _nothing(layer: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class GradSampler:
    """A rule with what the hooks must know before they use it.

    Args:
        rule: (layer, activations [N, ...], backprops [N, ...]) -> {parameter name: factor}, trainable parameters only.
        full_batch: layer -> whether the layer, as it is now, mixes samples, so that the rule needs all rows of the batch and gives contributions.
        unsupported: layer -> what makes the rule wrong for this layer, with the cure, or None.
        parameters: the names a layer's own parameters must have, no more and no less; None: any.
    """

    rule: Rule
    full_batch: Callable[[nn.Module], bool] = _never
    unsupported: Callable[[nn.Module], str | None] = _nothing
    parameters: frozenset[str] | None = None

    @property
    def may_mix(self) -> bool:
        """Whether a layer of this kind can mix samples at all."""
        return self.full_batch is not _never


def register_grad_sampler(
    *layer_types: type[nn.Module],
    full_batch: Callable[[nn.Module], bool] | None = None,
    unsupported: Callable[[nn.Module], str | None] | None = None,
    parameters: tuple[str, ...] | None = None,
) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of some layer types; a later registration replaces an earlier one.

    The rule is a pure function `rule(layer, activations, backprops) -> {parameter name: factor}`. activations are the layer's first input, backprops the
    gradient with respect to its output, both with the measured samples along dimension 0; under autocast their types may differ. The factors hold each sample's
    contribution to the gradient of the loss, as it is: the 1/m of a mean loss stays in. Only parameters that require a gradient belong in the result.

    Args:
        layer_types: subclasses of torch.nn.Module; their own subclasses are covered as long as they do not override forward.
        full_batch: predicate of a layer that mixes samples (train-mode batch norm): the rule is then given all rows of the batch, and the rows to be
            measured are picked from its factors.
        unsupported: for a layer that the rule cannot serve, the reason and the cure; for all others None.
        parameters: names of the layer's own parameters. A layer with others, or without one of these, is not covered: it was changed from outside, by
            torch.nn.utils.parametrize, pruning or weight norm, for instance.

    Raises:
        TypeError: a layer type that is no subclass of torch.nn.Module, or none at all.

    Example:
        >>> import torch
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> class Shift(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.zeros(3))
        ...     def forward(self, inputs):
        ...         return inputs + self.shift
        >>> import torch
        >>> @register_grad_sampler(Shift)
        ... def shift_rule(layer, activations, backprops):
        ...     return {"shift": Dense(backprops)} if layer.shift.requires_grad else {}
        >>> find_grad_sampler(Shift()).rule is shift_rule
        True
    """
    if not layer_types:
        raise TypeError("register_grad_sampler() got no layer type. Call it with them: @register_grad_sampler(MyLayer).")
    wrong = [repr(layer_type) for layer_type in layer_types if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module))]
    if wrong:
        raise TypeError(f"register_grad_sampler() takes subclasses of torch.nn.Module, got {', '.join(wrong)}. Pass the layer's class.")

    def register(rule: Rule) -> Rule:
        names = None if parameters is None else frozenset(parameters)
        for layer_type in layer_types:
            _SAMPLERS[layer_type] = GradSampler(rule, full_batch or _never, unsupported or _nothing, names)
        return rule

    return register


def find_grad_sampler(layer: nn.Module) -> GradSampler | None:
    """The sampler registered for the layer's type, or for the nearest base class whose computation the layer still performs; None if there is none.

    A rule of a base class is not used if the class, or the layer itself, overrides forward, nor if the layer's own parameters are not those that the rule was
    registered for.

    Example:
        >>> import adabatch.grad_sample.layers.linear
        >>> find_grad_sampler(nn.Linear(2, 3)).rule.__name__
        'linear_grad_sample'
        >>> class Doubled(nn.Linear):
        ...     def forward(self, inputs):
        ...         return 2 * super().forward(inputs)
        >>> find_grad_sampler(Doubled(2, 3)) is None
        True
    """
    if any(method in vars(layer) for method in _COMPUTING_METHODS):
        return None
    for layer_type in type(layer).__mro__:
        sampler = _SAMPLERS.get(layer_type)
        if sampler is None:
            continue
        same_computation = all(getattr(type(layer), method, None) is getattr(layer_type, method, None) for method in _COMPUTING_METHODS)
        same_parameters = sampler.parameters is None or sampler.parameters == layer._parameters.keys()
        return sampler if same_computation and same_parameters else None
    return None


def registered_layer_types() -> tuple[type[nn.Module], ...]:
    """Every layer type with a rule of its own, in the order of registration."""
    return tuple(_SAMPLERS)
