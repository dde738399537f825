"""What BatchSizeScheduler accepts, and what it says to the rest."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adabatch.coupling import RULES
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.null import NullEstimator
from adabatch.interfaces import Controller, RunContext

SHORT_BATCH = ("scale", "keep", "drop")
SPILL = (None, "lr")
CHECKED_STEPS, CHECKED_EVERY = 10, 50  # measured steps whose loss graph is looked at: the first ones, and then some


def check_scalar(loss: Tensor) -> None:
    """Refuse a tensor of several values.

    Raises:
        ValueError: it is one.
    """
    if loss.numel() != 1:
        raise ValueError(f"step() takes the scalar loss of the step, got a tensor of shape {tuple(loss.shape)}: reduce it first, e.g. losses.mean()")


def scalar_loss(loss: Tensor | float) -> float:
    """A step's loss as a number.

    Raises:
        ValueError: a tensor of several values.
        TypeError: no number.

    Example:
        >>> scalar_loss(0.5)
        0.5
    """
    if isinstance(loss, Tensor):
        check_scalar(loss)
    try:
        return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(f"step() takes the loss of the step as a scalar tensor or a number, got {loss!r}") from error


def rejection_reason(moments: GradientMoments, loss: float) -> str:
    """Why a measurement cannot be used; empty where it can.

    Example:
        >>> import torch
        >>> rejection_reason(GradientMoments(batch_size=1, sq_norms=torch.ones(1), grad_sq_norm=1.0), loss=0.5)
        'batch of one'
    """
    if moments.batch_size < 2:
        return "batch of one" if moments.batch_size else "empty batch"
    if not math.isfinite(loss):
        return "non-finite loss"
    return "" if moments.is_finite else "non-finite gradient"


def epoch_samples(loader: Any) -> int | None:
    """The samples of an epoch; None where that is not known.

    Example:
        >>> epoch_samples([1, 2]) is None
        True
    """
    try:
        return loader.num_samples
    except (AttributeError, TypeError):  # a sampler of the caller's own without a length
        return None


def check_options(optimizer: Any, loader: Any, controller: Any, *, summed: bool, every: int, spill: str | None, short_batch: str) -> None:
    """Refuse what cannot work, all of it in one error.

    Raises:
        TypeError: optimizer is no torch optimizer.
        ValueError: listing all other problems.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    problems = []
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        problems.append(f"every must be a positive integer, got {every!r}")
    if spill not in SPILL:
        problems.append(f"spill must be one of {SPILL}, got {spill!r}")
    if short_batch not in SHORT_BATCH:
        problems.append(f"short_batch must be one of {SHORT_BATCH}, got {short_batch!r}")
    if not all(hasattr(loader, name) for name in ("batch_size", "drop_last", "recent", "n_batches")):
        kind = type(loader).__name__
        problems.append(f"loader must be an AdaptiveDataLoader or a ResizableBatchSampler, got {kind}: pass a plain DataLoader to adabatch.wrap")
    if summed and controller is not None and controller.needs_effective_lr:
        problems.append(
            f"{type(controller).__name__} needs the step per unit of the mean gradient. With loss_reduction='sum' that is lr times the batch size, so that a "
            "larger batch would ask for a still larger one: divide the loss by the batch size (loss_reduction='mean') and multiply the lr by a usual batch size"
        )
    if problems:
        raise ValueError("; ".join(problems))


def check_switches(**switches: bool) -> None:
    """Refuse what is neither True nor False: a string would count as true.

    Raises:
        TypeError: naming the argument.

    Example:
        >>> check_switches(inner_products=True)
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_loss(hooks: Any, loss: Tensor | float, step: int) -> None:
    """Let hooks that can look whether the loss uses parameters where no tap sees it, at the first steps and at some later ones.

    Example:
        >>> check_loss(None, 0.5, step=0)
    """
    looks = step < CHECKED_STEPS or step % CHECKED_EVERY == 0
    if looks and isinstance(loss, Tensor) and loss.grad_fn is not None and hasattr(hooks, "check_loss"):
        hooks.check_loss(loss)


def bind_controller(controller: Any, context: RunContext) -> None:
    """Let the controller see the run.

    Raises:
        TypeError: no controller, or a class instead of an object.
    """
    if isinstance(controller, Controller):
        if isinstance(context.optimizer, Optimizer):
            controller.bind(context)
    elif controller is not None:
        fix = "such as adabatch.CABS(), or a subclass of adabatch.controllers.Controller"
        fix = f"make one, {controller.__name__}()" if isinstance(controller, type) else fix
        raise TypeError(f"controller must be an object with propose(moments, *, loss, lr), got {controller!r}: {fix}")


def needs_moments(controller: Controller | None, coupling: Any) -> bool:
    """Whether the controller (None: not chosen yet) or the coupling reads gradient moments.

    Example:
        >>> needs_moments(None, "seesaw"), needs_moments(None, "none")
        (False, True)
    """
    rule = RULES.get(coupling, lambda: coupling)() if isinstance(coupling, str) else coupling
    reads = coupling != "seesaw" if controller is None else controller.needs_moments
    return reads or getattr(rule, "needs_moments", False)


def check_measured(hooks: Any, controller: Controller, coupling: Any) -> None:
    """Refuse to measure nothing where moments are needed.

    Raises:
        ValueError: the hooks measure nothing, but controller or coupling needs moments.
    """
    if isinstance(hooks, NullEstimator) and needs_moments(controller, coupling):
        name = type(controller).__name__ if controller.needs_moments else f"coupling={coupling!r}"
        raise ValueError(
            f"{name} needs gradient moments, but hooks is None: pass adabatch.GradSampleHooks(model), or use what needs none, as controllers.Scheduled(...)"
        )
    missing = sorted(controller.requires - getattr(hooks, "measures", controller.requires))
    if missing:
        cures = {"preconditioned_trace": "preconditioner=adabatch.preconditioners.preconditioner_reader(optimizer)"}
        options = ", ".join(cures.get(name, f"{name}=True") for name in missing)
        raise ValueError(
            f"{type(controller).__name__} with this optimizer needs {' and '.join(missing)}: measure with GradSampleHooks(model, {options}), as adabatch.wrap "
            "does; or pass CABS(effective_lr=...), a callable of a param group"
        )
