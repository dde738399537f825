"""Diagonal preconditioners, read from an optimizer's state, and the trace of the gradient noise in
their geometry.

Legend: P what a coordinate's gradient is multiplied by besides the lr, g_i the gradient of sample
i's loss, g their mean over the batch, m samples, s of them measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import ParamGroup, State

Preconditioner = Callable[[State, ParamGroup], Tensor]
NextState = Callable[[State, ParamGroup], State]
PRECONDITIONERS: dict[type[Optimizer], Preconditioner] = {}
NEXT_STATES: dict[Preconditioner, NextState] = {}


def register_preconditioner(
    *optimizers: type[Optimizer],
) -> Callable[[Preconditioner], Preconditioner]:
    """Decorator of a function (state of a parameter, its param group) -> P of the parameter's
    shape. It is not called before the state exists.

    P holds all that the update does besides the lr: w ← w − lr·P∘g in the long run, with momentum's
    1/(1 − momentum) and the optimizer's decay of the lr. Where P grows without bound for a
    coordinate that had no gradient yet, as 1/√v does, add a function with `register_lookahead`.

    Example:
        >>> class Scaled(torch.optim.SGD): ...
        >>> @register_preconditioner(Scaled)
        ... def scaled(state, group):
        ...     return state["scale"]
    """

    def register(function: Preconditioner) -> Preconditioner:
        PRECONDITIONERS.update(dict.fromkeys(optimizers, function))
        return function

    return register


def preconditioner_of(optimizer: Optimizer) -> Preconditioner | None:
    """The function of the optimizer's class or of its nearest base class; None if there is none."""
    kinds = type(optimizer).__mro__
    return next((PRECONDITIONERS[kind] for kind in kinds if kind in PRECONDITIONERS), None)


def register_lookahead(preconditioner: Preconditioner) -> Callable[[NextState], NextState]:
    """Decorator of a function (state, group) -> the state that the next step will leave, as far as
    P reads it, should each coordinate's squared gradient be the mean of the parameter's so far.

    In the backward pass only the last step's state is known, while the optimizer will step with a P
    that includes the coming gradient. For a coordinate without any gradient so far P would be 1/ε
    instead of about √t/|g|: rare inputs and table rows would swamp tr(PΣ), by up to a million times
    (with this state: 0.8 to 1.3 times that of the P used). A parameter without any gradient so far
    has P = 0: it counts from its next step.
    """

    def register(function: NextState) -> NextState:
        NEXT_STATES[preconditioner] = function
        return function

    return register


def _expected_square(mean_squares: Tensor) -> Tensor:
    """Of a coordinate's coming gradient; infinite, so that P is 0, where none had a gradient."""
    mean = mean_squares.mean()
    return torch.where(mean > 0, mean, torch.full_like(mean, math.inf))


@register_preconditioner(torch.optim.Adam, torch.optim.AdamW)
def adam(state: State, group: ParamGroup) -> Tensor:
    """P = 1/(√v̂ + ε), v̂ = v/(1 − β₂^t), with amsgrad its maximum so far. β₁ spreads a gradient
    over steps and leaves their sum as it is."""
    beta, step = group["betas"][1], _steps(state)
    average = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return 1 / ((average / (1 - beta**step)).sqrt() + group["eps"])


@register_lookahead(adam)
def adam_lookahead(state: State, group: ParamGroup) -> State:
    """v ← β₂v + (1 − β₂)g², t ← t + 1."""
    beta, step, average = group["betas"][1], _steps(state), state["exp_avg_sq"]
    average = beta * average + (1 - beta) * _expected_square(average / (1 - beta**step))
    following = {"step": step + 1, "exp_avg_sq": average}
    if group.get("amsgrad"):
        following["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], average)
    return following


@register_preconditioner(torch.optim.RMSprop)
def rmsprop(state: State, group: ParamGroup) -> Tensor:
    """P = 1/((√v + ε)(1 − momentum)), v − ḡ² for v where it is centered."""
    average = state["square_avg"]
    if group["centered"]:
        average = (average - state["grad_avg"].square()).clamp(min=0)
    return 1 / ((average.sqrt() + group["eps"]) * (1 - group["momentum"]))


@register_lookahead(rmsprop)
def rmsprop_lookahead(state: State, group: ParamGroup) -> State:
    """v ← αv + (1 − α)g², ḡ as it is."""
    keep, average = group["alpha"], state["square_avg"]
    square = _expected_square(average / (1 - keep ** _steps(state)))
    return {**state, "square_avg": keep * average + (1 - keep) * square}


@register_preconditioner(torch.optim.Adagrad)
def adagrad(state: State, group: ParamGroup) -> Tensor:
    """P = 1/((√Σg² + ε)(1 + (t − 1)·lr_decay))."""
    decay = 1 + (_steps(state) - 1) * group["lr_decay"]
    return 1 / ((state["sum"].sqrt() + group["eps"]) * decay)


@register_lookahead(adagrad)
def adagrad_lookahead(state: State, group: ParamGroup) -> State:
    """Σg² ← Σg² + g², t ← t + 1."""
    step, total = _steps(state), state["sum"]
    return {"step": step + 1, "sum": total + _expected_square(total / step)}


def _steps(state: State) -> Tensor | float:
    """The count of steps on its device, in float64: reading it would wait for the device."""
    return state["step"].double() if isinstance(state["step"], Tensor) else float(state["step"])


def preconditioner_reader(optimizer: Optimizer) -> Callable[[Tensor], Tensor | None]:
    """What the statistic PreconditionedTrace takes: a function parameter -> P of the next step, as
    far as the optimizer's state determines it (`register_lookahead`), None before its first step.

    Raises:
        ValueError: no preconditioner is registered for the optimizer's class.
    """
    function = _function_of(optimizer)
    following = NEXT_STATES.get(function, lambda state, group: state)
    places: dict[int, int] = {}

    def read(parameter: Tensor) -> Tensor | None:
        state = optimizer.state.get(parameter)
        if not state:
            return None
        if id(parameter) not in places:  # loading a state replaces groups but keeps their order
            for index, group in enumerate(optimizer.param_groups):
                places.update({id(each): index for each in group["params"]})
        group = optimizer.param_groups[places[id(parameter)]]
        with torch.no_grad():
            return function(following(state, group), group)

    return read


def _function_of(optimizer: Optimizer) -> Preconditioner:
    if (function := preconditioner_of(optimizer)) is None:
        raise ValueError(f"no preconditioner is known for {type(optimizer).__name__}: register one "
                         "with adabatch.preconditioners.register_preconditioner")
    return function


@torch.no_grad()
def preconditioned_trace(
    moments: GradientMoments, parameters: Mapping[str, Tensor], optimizer: Optimizer, lr: float
) -> float:
    """Σ_k (lr_k/lr)·tr(P_k Σ) over the param groups, tr(PΣ) = Σ P∘(Σ_S g_i²/s − g²)/(1 − 1/m_eff),
    unbiased; NaN before the optimizer's first step.

    Measured with PreconditionedTrace, P is that of the next step as the backward pass could know it
    (`preconditioner_reader`). Measured with second moments, P is the present one, which the step
    has left, and g comes from the parameters' .grad, its length from the moments, so that
    clipping, a loss scale and a summed loss are undone.

    Args:
        parameters: {name: parameter} of what is measured.
        lr: what the trace will be multiplied by.

    Raises:
        ValueError: moments without either, with weights, no preconditioner, or the gradients of
            the step are gone.
    """
    contracted = moments.statistics.get("preconditioned_trace")
    if not (contracted or moments.second_moment) or moments.weights is not None:
        raise ValueError(
            "tr(PΣ) needs samples of equal weight and Σ g_i²: measure with GradSampleHooks(model, "
            "statistics=[PreconditionedTrace(preconditioner_reader(optimizer))]), or with "
            "statistics=['second_moment']")
    function = _function_of(optimizer)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    rates = {name: float(groups[id(parameter)]["lr"]) / lr if lr else 0.0
             for name, parameter in parameters.items() if id(parameter) in groups}
    if contracted:
        names = [name for name in contracted.gradient if name in rates]
        variances = _measured_variances(moments, names)
    else:
        grads = {name: parameters[name].grad for name in moments.second_moment}
        present = {name: grad for name, grad in grads.items() if grad is not None}
        scale = _scale_of_gradient(moments, present.values())
        names, variances = [name for name in present if name in rates], []
        for name in names:
            state, squares = optimizer.state.get(parameters[name]), moments.second_moment[name]
            if not state:
                variances.append(math.nan)
                continue
            square = present[name].to(squares.dtype).square() * scale
            factor = function(state, groups[id(parameters[name])]).to(squares.dtype)
            variances.append(float((factor * (squares / moments.n_measured - square)).sum()))
    weighted = (rates[name] * variance for name, variance in zip(names, variances, strict=True))
    return sum(weighted) / (1 - 1 / moments.m_eff)


def _measured_variances(moments: GradientMoments, names: list[str]) -> list[float]:
    """Σ P∘(Σ_S g_i²/s − g²) of each parameter, from sums that contain P; NaN without a P."""
    contracted, terms = moments.statistics["preconditioned_trace"], []
    for name in names:
        fraction, squares = contracted.gradient[name], contracted.squares.get(name)
        mean = fraction.new_full((), math.nan)
        if squares is not None:
            mean = squares.to(fraction.device) / moments.n_measured
        terms.append((mean - fraction.to(mean.dtype) * moments.grad_sq_norm).double().cpu())
    return torch.stack(terms).tolist() if terms else []


def _scale_of_gradient(moments: GradientMoments, grads: Iterable[Tensor]) -> float:
    """What g² must be multiplied by where clipping, a loss scale or a summed loss are in .grad."""
    length = sum(float(grad.double().square().sum()) for grad in grads)
    if not length and moments.grad_sq_norm:
        raise ValueError("the gradients of this step are gone: call scheduler.step(loss) before "
                         "zero_grad(), as the preconditioned trace reads them")
    return moments.grad_sq_norm / length if length else 0.0
