"""What the scheduler accepts: a controller, an estimator and a loader, users' own included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from adabatch.coupling import RULES, smoothing_of
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.null import NullEstimator
from adabatch.interfaces import (NO_INTERVAL, BatchSource, Controller, EffectiveLr, Estimator,
                                 RunContext, State)

SOURCE = ("batch_size", "drop_last", "num_samples", "position", "n_batches", "n_iterations",
          "recent", "runs_ahead", "micro_batches")
ESTIMATOR = ("observe", "cost", "check_loss", "reset", "remove", "state_dict", "load_state_dict",
             "enabled", "loss_reduction", "accumulate", "parameters", "statistics", "samples",
             "shard", "on_backward_end")


class PlainController(Controller):
    """A user's object with propose(), with the defaults for every method that it lacks."""

    def __init__(self, given: Any):
        self.given = given

    def _call(self, name: str, default: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.given, name, None)
        return default if method is None else method(*args, **kwargs)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(getattr(self.given, "requires", ()))

    @property
    def needs_moments(self) -> bool:  # type: ignore[override]
        return bool(getattr(self.given, "needs_moments", True))

    @property
    def needs_effective_lr(self) -> bool:  # type: ignore[override]
        return bool(getattr(self.given, "needs_effective_lr", False))

    @property
    def effective_lr(self) -> EffectiveLr | None:
        return getattr(self.given, "effective_lr", None)

    @property
    def first_batch_size(self) -> float | None:
        return getattr(self.given, "first_batch_size", None)

    def bind(self, context: RunContext) -> None:
        self._call("bind", None, context)

    def on_step(self, *, samples: int, epoch: int) -> None:
        self._call("on_step", None, samples=samples, epoch=epoch)

    def on_optimizer_step(self, lr: float) -> None:
        self._call("on_optimizer_step", None, lr)

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        return float(self.given.propose(moments, loss=loss, lr=lr))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        return self._call("interval", NO_INTERVAL, level)

    def metrics(self) -> dict[str, float]:
        return self._call("metrics", {})

    def lr_factor(self) -> Callable[[int], float] | None:
        return self._call("lr_factor", None)

    def state_dict(self) -> State:
        return self._call("state_dict", {"version": 1})

    def load_state_dict(self, state: State) -> None:
        self._call("load_state_dict", None, state)


def as_controller(given: Any) -> Controller:
    """A Controller as it is; a user's object with propose() with the defaults it lacks.

    Raises:
        TypeError: an object that proposes nothing, or a class instead of an object.
    """
    if isinstance(given, Controller):
        return given
    if isinstance(given, type) or not callable(getattr(given, "propose", None)):
        fix = "such as adabatch.CABS(), or controllers.Scheduled(...)"
        fix = f"make one, {given.__name__}()" if isinstance(given, type) else fix
        raise TypeError("controller must be an object with propose(moments, *, loss, lr), got "
                        f"{given!r}: {fix}")
    return PlainController(given)


def check_parts(optimizer: Any, loader: BatchSource, estimator: Estimator) -> None:
    """Refuse parts that cannot work.

    Raises:
        TypeError: listing what is missing.
    """
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    missing = [name for name in SOURCE if not hasattr(loader, name)]
    if missing:
        raise TypeError(
            "loader must be an AdaptiveDataLoader or a ResizableBatchSampler, got "
            f"{type(loader).__name__} without {', '.join(missing)}: pass a plain DataLoader to "
            "adabatch.wrap"
        )
    missing = [name for name in ESTIMATOR if not hasattr(estimator, name)]
    if missing:
        raise TypeError(
            "estimator must be None or an Estimator, such as adabatch.GradSampleHooks(model), got "
            f"{type(estimator).__name__} without {', '.join(missing)}: derive it from "
            "adabatch.interfaces.Estimator"
        )


def check_summed(controller: Controller, summed: bool) -> None:
    """Refuse a summed loss where the controller needs the step per unit of the mean gradient.

    Raises:
        ValueError: it does.
    """
    if summed and controller.needs_effective_lr:
        raise ValueError(
            f"{name_of(controller)} needs the step per unit of the mean gradient. With "
            "loss_reduction='sum' that is lr times the batch size, so that a larger batch would ask "
            "for a still larger one: divide the loss by the batch size (loss_reduction='mean') and "
            "multiply the lr by a usual batch size"
        )


def needs_moments(controller: Controller | None, rule: Any) -> bool:
    """Whether the controller (None: not chosen yet) or the coupling reads gradient moments.

    Example:
        >>> needs_moments(None, "seesaw"), needs_moments(None, "none")
        (False, True)
    """
    reads = rule != "seesaw" if controller is None else controller.needs_moments
    if isinstance(rule, str):
        return reads or (rule in RULES and smoothing_of(RULES[rule]()) is not None)
    return reads or smoothing_of(rule) is not None


def check_measured(estimator: Estimator, controller: Controller, rule: Any) -> None:
    """Refuse to measure too little.

    Raises:
        ValueError: nothing is measured, but controller or coupling needs moments; or a statistic
            that the controller requires is missing.
    """
    name = name_of(controller)
    if not estimator.enabled and isinstance(estimator, NullEstimator) and needs_moments(controller, rule):
        name = name if controller.needs_moments else f"coupling={rule!r}"
        raise ValueError(
            f"{name} needs gradient moments, but nothing is measured (estimator or measure is None): "
            "pass adabatch.GradSampleHooks(model), or use a controller that needs none, such as "
            "controllers.Scheduled(...)"
        )
    missing = sorted(controller.requires - estimator.statistics)
    if missing and not isinstance(estimator, NullEstimator):
        raise ValueError(
            f"{name} with this optimizer needs {' and '.join(missing)}, which the estimator does not "
            "measure: let adabatch.wrap make it, or pass the statistics to GradSampleHooks; or, for "
            "CABS, pass effective_lr=, a callable of a param group"
        )


def name_of(controller: Controller) -> str:
    """The class's name, of a user's own object too."""
    return type(controller.given if isinstance(controller, PlainController) else controller).__name__

