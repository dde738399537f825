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
PRECONDITIONERS: dict[type[Optimizer], Preconditioner] = {}


def register_preconditioner(*optimizers: type[Optimizer]) -> Callable[[Preconditioner], Preconditioner]:
    """Decorator of a function (state of a parameter, its param group) -> P of the parameter's shape. It is not asked before the state exists.

    P takes in what the update does beside the lr: w ← w − lr·P∘g in the long run, with momentum's 1/(1 − momentum) and a decay of the lr of its own.

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


@register_preconditioner(torch.optim.Adam, torch.optim.AdamW)
def adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/(√v̂ + ε), v̂ = v/(1 − β₂^t), with amsgrad its maximum so far. β₁ spreads a gradient over steps and leaves their sum as it is."""
    beta, step = group["betas"][1], float(state["step"])
    average = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return 1 / ((average / (1 - beta**step)).sqrt() + group["eps"])


@register_preconditioner(torch.optim.RMSprop)
def rmsprop(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/((√v + ε)(1 − momentum)), v − ḡ² for v where it is centered."""
    average = state["square_avg"]
    if group["centered"]:
        average = (average - state["grad_avg"].square()).clamp(min=0)
    return 1 / ((average.sqrt() + group["eps"]) * (1 - group["momentum"]))


@register_preconditioner(torch.optim.Adagrad)
def adagrad(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """P = 1/((√Σg² + ε)(1 + (t − 1)·lr_decay))."""
    return 1 / ((state["sum"].sqrt() + group["eps"]) * (1 + (float(state["step"]) - 1) * group["lr_decay"]))


@torch.no_grad()
def preconditioned_trace(moments: GradientMoments, parameters: Mapping[str, Tensor], optimizer: Optimizer, lr: float) -> float:
    """Σ_k (lr_k/lr)·tr(P_k Σ) over the param groups, tr(PΣ) = Σ P∘(Σ_S g_i²/s − g²)/(1 − 1/m_eff), unbiased; NaN before the optimizer's first step.

    g is taken from the parameters' .grad, and its length from the moments, so that clipping, a loss scale and a summed loss are undone.

    Args:
        moments: with second_moment.
        parameters: {name: parameter} of what is measured, with their gradients of this step.
        optimizer: one with a registered preconditioner.
        lr: what the trace is to be multiplied by.

    Raises:
        ValueError: measured without second_moment, with weights, no preconditioner, or the gradients of the step are gone.
    """
    if not moments.second_moment or moments.weights is not None:
        raise ValueError("tr(PΣ) needs samples of equal weight and Σ g_i² elementwise: measure with GradSampleHooks(model, second_moment=True)")
    function = preconditioner_of(optimizer)
    if function is None:
        raise ValueError(f"no preconditioner is known for {type(optimizer).__name__}: register one with adabatch.preconditioners.register_preconditioner")
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    length = sum(float(parameters[name].grad.double().square().sum()) for name in moments.second_moment if parameters[name].grad is not None)
    if not length and moments.grad_sq_norm:
        raise ValueError("the gradients of this step are gone: call scheduler.step(loss) before zero_grad(), as the preconditioned trace reads them")
    scale = moments.grad_sq_norm / length if length else 0.0
    total = 0.0
    for name, squares in moments.second_moment.items():
        parameter, group = parameters[name], groups.get(id(parameters[name]))
        state = optimizer.state.get(parameter)
        if group is None or parameter.grad is None:
            continue
        if not state:
            return math.nan
        variance = squares / moments.n_measured - parameter.grad.to(squares.dtype).square() * scale
        total += float(group["lr"]) / lr * float((function(state, group).to(squares.dtype) * variance).sum()) if lr else 0.0
    m_eff = moments.batch_size if moments.effective_batch_size is None else moments.effective_batch_size
    return total / (1 - 1 / m_eff)
