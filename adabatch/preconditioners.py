"""Diagonal preconditioners, read from the state of an optimizer, and the trace of the gradient noise in their geometry.

Legend: P what a coordinate's gradient is multiplied by beside the lr, g_i the gradient of sample i's loss, g their mean over the batch, m samples, s measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.estimators.moments import GradientMoments

Preconditioner = Callable[[dict[str, Any], dict[str, Any]], Tensor]
NextState = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
PRECONDITIONERS: dict[type[Optimizer], Preconditioner] = {}
NEXT_STATES: dict[Preconditioner, NextState] = {}


def register_preconditioner(*optimizers: type[Optimizer]) -> Callable[[Preconditioner], Preconditioner]:
    """Decorator of a function (state of a parameter, its param group) -> P of the parameter's shape. It is not asked before the state exists.

    P takes in what the update does beside the lr: w ← w − lr·P∘g in the long run, with momentum's 1/(1 − momentum) and a decay of the lr of its own.
    Where P grows without bound for a coordinate that had no gradient yet, as 1/√v does, add a function with `register_lookahead`.

    Example:
        >>> class Scaled(torch.optim.SGD): ...
        >>> @register_preconditioner(Scaled)
        ... def scaled(state, group):
        ...     return state["scale"]
        >>> del PRECONDITIONERS[Scaled]
    """

    def register(function: Preconditioner) -> Preconditioner:
        PRECONDITIONERS.update(dict.fromkeys(optimizers, function))
        return function

    return register


def preconditioner_of(optimizer: Optimizer) -> Preconditioner | None:
    """The function of the optimizer's class, or of the nearest class it is derived from; None if there is none.

    Example:
        >>> preconditioner_of(torch.optim.AdamW([torch.zeros(1)])) is adam
        True
    """
    return next((PRECONDITIONERS[kind] for kind in type(optimizer).__mro__ if kind in PRECONDITIONERS), None)


def register_lookahead(preconditioner: Preconditioner) -> Callable[[NextState], NextState]:
    """Decorator of a function (state, group) -> the state that the step to come will leave, as far as P reads it, should each coordinate's squared gradient be
    the mean of the parameter's so far.

    Inside the backward pass only the state of the step before is known, while the optimizer steps with a P that holds the coming gradient. For a coordinate
    without a gradient so far that P would be 1/ε instead of about √t/|g|: inputs and table rows that are rarely there then swamp tr(PΣ) (a million times
    too large in the first steps of a linear model with forty inputs, some in 5 % of the samples; with this state .8 to 1.3 times that of the P used).
    A parameter without any gradient so far has P = 0: it counts from its next step on.

    Example:
        >>> NEXT_STATES[adam] is adam_lookahead
        True
    """

    def register(function: NextState) -> NextState:
        NEXT_STATES[preconditioner] = function
        return function

    return register


def _expected_square(mean_squares: Tensor) -> Tensor:
    """Of a coordinate's coming gradient; infinite, and P then 0, where none had a gradient so far."""
    mean = mean_squares.mean()
    return torch.where(mean > 0, mean, torch.full_like(mean, math.inf))


@register_preconditioner(torch.optim.Adam, torch.optim.AdamW)
def adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/(√v̂ + ε), v̂ = v/(1 − β₂^t), with amsgrad its maximum so far. β₁ spreads a gradient over steps and leaves their sum as it is."""
    beta, step = group["betas"][1], _steps(state)
    average = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return 1 / ((average / (1 - beta**step)).sqrt() + group["eps"])


@register_lookahead(adam)
def adam_lookahead(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """v ← β₂v + (1 − β₂)g², t ← t + 1."""
    beta, step, average = group["betas"][1], _steps(state), state["exp_avg_sq"]
    average = beta * average + (1 - beta) * _expected_square(average / (1 - beta**step))
    largest = {"max_exp_avg_sq": torch.maximum(state["max_exp_avg_sq"], average)} if group.get("amsgrad") else {}
    return {"step": step + 1, "exp_avg_sq": average, **largest}


@register_preconditioner(torch.optim.RMSprop)
def rmsprop(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/((√v + ε)(1 − momentum)), v − ḡ² for v where it is centered."""
    average = state["square_avg"]
    if group["centered"]:
        average = (average - state["grad_avg"].square()).clamp(min=0)
    return 1 / ((average.sqrt() + group["eps"]) * (1 - group["momentum"]))


@register_lookahead(rmsprop)
def rmsprop_after(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """v ← αv + (1 − α)g², ḡ as it is."""
    keep, average = group["alpha"], state["square_avg"]
    return {**state, "square_avg": keep * average + (1 - keep) * _expected_square(average / (1 - keep ** _steps(state)))}


@register_preconditioner(torch.optim.Adagrad)
def adagrad(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/((√Σg² + ε)(1 + (t − 1)·lr_decay))."""
    return 1 / ((state["sum"].sqrt() + group["eps"]) * (1 + (_steps(state) - 1) * group["lr_decay"]))


@register_lookahead(adagrad)
def adagrad_after(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Σg² ← Σg² + g², t ← t + 1."""
    step, total = _steps(state), state["sum"]
    return {"step": step + 1, "sum": total + _expected_square(total / step)}


def _steps(state: dict[str, Any]) -> Tensor | float:
    """The count of steps where it lies, in float64: reading it from a device would wait for that."""
    return state["step"].double() if isinstance(state["step"], Tensor) else float(state["step"])


def preconditioner_reader(optimizer: Optimizer) -> Callable[[Tensor], Tensor | None]:
    """A function parameter -> P of the step to come, as far as the optimizer's state tells it (`register_lookahead`), None before the parameter's first step:
    what the statistic PreconditionedTrace takes.

    Raises:
        ValueError: no preconditioner is registered for the optimizer's class.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> print(preconditioner_reader(torch.optim.Adam([weight]))(weight))
        None
    """
    function = _function_of(optimizer)
    following = NEXT_STATES.get(function, lambda state, group: state)
    places: dict[int, int] = {}

    def read(parameter: Tensor) -> Tensor | None:
        state = optimizer.state.get(parameter)
        if not state:
            return None
        if id(parameter) not in places:  # groups are replaced when a state is loaded, but keep their order
            places.update({id(each): index for index, group in enumerate(optimizer.param_groups) for each in group["params"]})
        group = optimizer.param_groups[places[id(parameter)]]
        with torch.no_grad():
            return function(following(state, group), group)

    return read


def _function_of(optimizer: Optimizer) -> Preconditioner:
    function = preconditioner_of(optimizer)
    if function is None:
        raise ValueError(f"no preconditioner is known for {type(optimizer).__name__}: register one with adabatch.preconditioners.register_preconditioner")
    return function


@torch.no_grad()
def preconditioned_trace(moments: GradientMoments, parameters: Mapping[str, Tensor], optimizer: Optimizer, lr: float) -> float:
    """Σ_k (lr_k/lr)·tr(P_k Σ) over the param groups, tr(PΣ) = Σ P∘(Σ_S g_i²/s − g²)/(1 − 1/m_eff), unbiased; NaN before the optimizer's first step.

    Measured with a preconditioner, P is that of the step to come as the backward pass could tell it (`preconditioner_reader`). Measured with second_moment, it
    is the present one, which the step has left, and g is taken from the parameters' .grad, its length from the moments, so that clipping, a loss scale and a
    summed loss are undone.

    Args:
        moments: with a preconditioner, or with second_moment.
        parameters: {name: parameter} of what is measured.
        optimizer: one with a registered preconditioner.
        lr: what the trace is to be multiplied by.

    Raises:
        ValueError: measured without either, with weights, no preconditioner, or the gradients of the step are gone.
    """
    contracted = moments.statistics.get("preconditioned_trace")
    if not (contracted or moments.second_moment) or moments.weights is not None:
        raise ValueError(
            "tr(PΣ) needs samples of equal weight and Σ g_i²: measure with GradSampleHooks(model, statistics=[PreconditionedTrace("
            "preconditioner_reader(optimizer))]), or with statistics=['second_moment']"
        )
    function = _function_of(optimizer)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    rates = {name: float(groups[id(parameter)]["lr"]) / lr if lr else 0.0 for name, parameter in parameters.items() if id(parameter) in groups}
    if contracted:
        names = [name for name in contracted.gradient if name in rates]
        variances = _measured_variances(moments, names)
    else:
        present = {name: parameters[name] for name in moments.second_moment if parameters[name].grad is not None}
        scale = _scale_of_gradient(moments, present)
        names = [name for name in present if name in rates]
        variances = [_present_variance(moments, name, present[name], scale, function, groups, optimizer) for name in names]
    return sum(rates[name] * variance for name, variance in zip(names, variances, strict=True)) / (1 - 1 / moments.m_eff)


def _measured_variances(moments: GradientMoments, names: list[str]) -> list[float]:
    """Σ P∘(Σ_S g_i²/s − g²) of each parameter, from numbers that P has weighed; NaN where there was no P."""
    contracted, terms = moments.statistics["preconditioned_trace"], []
    for name in names:
        share = contracted.gradient[name]
        squares = contracted.squares.get(name)
        mean = share.new_full((), math.nan) if squares is None else squares.to(share.device) / moments.n_measured
        terms.append((mean - share.to(mean.dtype) * moments.grad_sq_norm).double().cpu())
    return torch.stack(terms).tolist() if terms else []


def _scale_of_gradient(moments: GradientMoments, parameters: Mapping[str, Tensor]) -> float:
    """What g² has to be multiplied by where clipping, a loss scale or a summed loss are in the parameters' gradients."""
    length = sum(float(parameter.grad.double().square().sum()) for parameter in parameters.values())
    if not length and moments.grad_sq_norm:
        raise ValueError("the gradients of this step are gone: call scheduler.step(loss) before zero_grad(), as the preconditioned trace reads them")
    return moments.grad_sq_norm / length if length else 0.0


def _present_variance(
    moments: GradientMoments, name: str, parameter: Tensor, scale: float, function: Preconditioner, groups: Mapping[int, Any], optimizer: Optimizer
) -> float:
    """The same from Σ g_i² elementwise, the gradient and the optimizer's state as they are now."""
    squares, state = moments.second_moment[name], optimizer.state.get(parameter)
    if not state:
        return math.nan
    variance = squares / moments.n_measured - parameter.grad.to(squares.dtype).square() * scale
    return float((function(state, groups[id(parameter)]).to(squares.dtype) * variance).sum())
