"""The registry of layer families: rule, fused backward pass and cost of every layer type.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from adabatch.grad_sample.agreement import agrees_with_autograd
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.layout import Layout

if TYPE_CHECKING:
    from adabatch.grad_sample.cost import LayerCost

__all__ = [
    "FusedBackward", "FusedResult", "GradSampler", "find_grad_sampler", "register_grad_sampler",
    "registered_layer_types",
]

Layer: TypeAlias = Any  # an instance of the registered type, whose attributes are used
Rule = Callable[..., dict[str, Factor]]  # (layer, activations, backprops)
CostFunction = Callable[..., "LayerCost"]  # (layer, input_shape, output_shape)
Example = Callable[..., tuple[nn.Module, Tensor]]  # (layer): a small copy of it, and its input
RuleT = TypeVar("RuleT", bound=Rule)
Tensors = dict[str, Tensor]

# A subclass that overrides one of these computes something that its base's rule does not know.
_COMPUTING_METHODS = ("forward", "_conv_forward")

_SAMPLERS: dict[type[nn.Module], GradSampler] = {}
_BY_NAME: list[tuple[str, GradSampler]] = []
_AGREEMENTS: WeakKeyDictionary[type[nn.Module], dict[tuple[object, ...], bool]]
_AGREEMENTS = WeakKeyDictionary()


@dataclass
class FusedResult:
    """What a fused backward pass gives.

    Attributes:
        grad_inputs: gradient of the layer's input, or None.
        grads: {own parameter name: its gradient}, in the weight's type.
        sq_norms, second_moments: {own parameter name: ‖G_n‖² [N] or Σ_n G_n²}, where requested.
    """

    grad_inputs: Tensor | None
    grads: Tensors
    sq_norms: Tensors = field(default_factory=dict)
    second_moments: Tensors = field(default_factory=dict)


class FusedBackward:
    """A layer's whole backward pass: its parameters' gradients come out of the per-sample ones.

    It replaces the layer's own backward node where all its parameters are trainable and measured,
    all samples together, and `cost` says that this is cheaper. A subclass has no state.

    Class attributes:
        always: used whatever the cost model says, but not in what activation checkpointing runs
            again.
        from_node: what backward() needs besides weight and input, detached, read from the layer's
            output with its grad_fn; None for nothing.
    """

    always: bool = False
    from_node: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def supports(
        self, layer: Layer, inputs: Tensor, output: Tensor, layout: Layout, all_rows: bool
    ) -> bool:
        """Whether the call's backward pass can be computed here; all_rows: all samples are
        measured."""
        raise NotImplementedError

    def backward(
        self, layer: Layer, saved: tuple[Tensor, ...], weight: Tensor, backprops: Tensor,
        n_samples: int, layout: Layout, *, needs_inputs: bool, norms: bool = True,
        second_moment: bool = False,
    ) -> FusedResult:
        """The backward pass of one call.

        Args:
            saved: the layer's input, in the type of its output (autocast may have chosen it), and
                what from_node gave.
            weight: the layer's weight as the forward pass used it.
            backprops: gradient of the output.
            layout: of the samples in saved[0] and backprops.
            needs_inputs: whether the input's gradient is needed.
            norms, second_moment: what to compute besides the gradients.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class GradSampler:
    """What is registered for a layer type, see register_grad_sampler; `may_mix`: whether its layers
    can mix samples at all; `example`: for types registered by name."""

    rule: Rule
    full_batch: Callable[..., bool]
    unsupported: Callable[..., str | None]
    parameters: frozenset[str] | None
    fused: FusedBackward | None
    cost: CostFunction | None
    may_mix: bool
    example: Example | None = None

    def serves(self, layer: nn.Module) -> bool:
        """Whether a layer found by its class's name computes what the rule knows, compared once for
        every class and its options."""
        options = tuple(sorted((name, repr(value)) for name, value in vars(layer).items()
                               if isinstance(value, bool | int | float | str | tuple)))
        known = _AGREEMENTS.setdefault(type(layer), {})
        key = self.rule, options
        if key not in known:
            assert self.example is not None
            known[key] = agrees_with_autograd(layer, self.rule, self.fused, self.example)
        return known[key]


def register_grad_sampler(
    *layer_types: type[nn.Module] | str,
    full_batch: Callable[..., bool] | None = None,
    unsupported: Callable[..., str | None] | None = None,
    parameters: Collection[str] | None = None,
    fused: FusedBackward | None = None,
    cost: CostFunction | None = None,
    example: Example | None = None,
) -> Callable[[RuleT], RuleT]:
    """Decorator that makes a function the rule of layer types; a later one replaces an earlier one.

    The rule is a pure function `rule(layer, activations, backprops) -> {parameter name: factor}`:
    activations are the layer's first input, backprops the gradient of its output, both with the
    measured samples along dimension 0; under autocast their types may differ. The factors hold
    each sample's contribution to the gradient: the 1/m of a mean loss stays in. Only parameters
    that require a gradient belong in the result.

    Args:
        layer_types: subclasses of torch.nn.Module; their subclasses are covered as long as they do
            not override forward. Or classes' full names, such as
            "transformers.pytorch_utils.Conv1D", with * for any part: nothing is imported. Several
            rules may have one name: a layer gets the last one that agrees with autograd on
            `example`, or none.
        full_batch: layer -> whether it mixes samples as it is now (train-mode batch norm): then
            the rule gets all rows of the batch, and rows are picked from its factors.
        unsupported: layer -> why the rule cannot serve it, with the fix, or None.
        parameters: names that the layer's own parameters must have. A layer with other ones was
            changed from outside (parametrization, pruning, weight norm) and is not covered.
        fused: computes the layer's whole backward pass.
        cost: (layer, input shape, output shape), samples first -> LayerCost; None: one pass over
            the elements of input and output.
        example: layer -> (a small copy of it, an input [N, ...]), with which the layers of a name
            are compared, as another version of their package may compute something else.

    Raises:
        TypeError: no layer type, one that is not a subclass of torch.nn.Module, or a name without
            an example.

    Example:
        >>> import torch
        >>> from adabatch.grad_sample.factors.base import Dense
        >>> class Shift(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.zeros(3))
        ...     def forward(self, inputs):
        ...         return inputs + self.shift
        >>> @register_grad_sampler(Shift)
        ... def shift_rule(layer, activations, backprops):
        ...     return {"shift": Dense(backprops)} if layer.shift.requires_grad else {}
        >>> find_grad_sampler(Shift()).rule is shift_rule
        True
    """
    if not layer_types:
        raise TypeError(
            "register_grad_sampler() got no layer type: write @register_grad_sampler(MyLayer)")
    wrong = [repr(each) for each in layer_types
             if not (isinstance(each, str) or (isinstance(each, type)
                     and issubclass(each, nn.Module)))]
    if wrong:
        raise TypeError(f"register_grad_sampler() takes subclasses of torch.nn.Module or their "
                        f"full names, got {', '.join(wrong)}. Pass the layer's class.")
    by_name = [each for each in layer_types if isinstance(each, str)]
    if by_name and example is None:
        raise TypeError(
            f"register_grad_sampler() got names of classes ({', '.join(by_name)}) and no example. "
            "Pass example=, a function of the layer that returns a small copy of it and an input: "
            "the rule is compared with autograd on it.")
    names = None if parameters is None else frozenset(parameters)

    def register(rule: RuleT) -> RuleT:
        sampler = GradSampler(
            rule, full_batch or (lambda layer: False), unsupported or (lambda layer: None), names,
            fused, cost, may_mix=full_batch is not None, example=example)
        _SAMPLERS.update({each: sampler for each in layer_types if not isinstance(each, str)})
        _BY_NAME.extend((name, sampler) for name in by_name)
        return rule

    return register


def find_grad_sampler(layer: nn.Module) -> GradSampler | None:
    """What is registered for the layer's type, or for the nearest base class whose computation the
    layer still performs: neither its class nor the layer itself overrides forward, and its own
    parameters are those that the rule was registered for.

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
    own = type(layer)
    for layer_type in own.__mro__:
        sampler, named = _SAMPLERS.get(layer_type), [*_samplers_by_name(layer_type)]
        if sampler is None and not named:
            continue
        same_computation = all(getattr(own, method, None) is getattr(layer_type, method, None)
                               for method in _COMPUTING_METHODS)
        if not same_computation:
            return None
        own_names = layer._parameters.keys()
        if sampler is not None:
            return sampler if sampler.parameters in (None, own_names) else None
        return next((each for each in named
                     if each.parameters in (None, own_names) and each.serves(layer)), None)
    return None


def _samplers_by_name(layer_type: type) -> Iterator[GradSampler]:
    """What is registered for the class's name, the latest first."""
    full_name = f"{layer_type.__module__}.{layer_type.__qualname__}"
    return (sampler for name, sampler in reversed(_BY_NAME) if fnmatchcase(full_name, name))


def registered_layer_types() -> tuple[type[nn.Module], ...]:
    """Every layer type with a rule, in the order of registration."""
    return tuple(_SAMPLERS)
