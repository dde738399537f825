"""The four seams of adabatch: everything that crosses from one folder into another is one of these.

    layers --taps--> Statistic --> Estimator --GradientMoments--> Controller
        --proposal--> scheduler --> BatchSource

A base class gives every optional part a default, so that no caller has to ask whether it exists.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from adabatch.estimators.averages import Ratio
    from adabatch.estimators.loss_scale import StepScale
    from adabatch.estimators.moments import GradientMoments
    from adabatch.grad_sample.cost import LayerCost, StepCost
    from adabatch.grad_sample.factors.base import Factor
    from adabatch.data.split import BatchSplit

T = TypeVar("T")
State = dict[str, Any]
ParamGroup = dict[str, Any]
EffectiveLr = Callable[[ParamGroup], float]
Weights = Tensor | Sequence[float]
NO_INTERVAL = (math.nan, math.nan)


class NotMeasured(RuntimeError):
    """This step could not be measured exactly, the next ones can: a scheduler records the reason
    among the dropped measurements, and training continues.

    Args:
        reason: a few words, under which the diagnostics count it.
        message: of the error that collect() raises.
        warns: the scheduler warns with the message.
    """

    def __init__(self, reason: str, message: str, warns: bool = False):
        super().__init__(message)
        self.reason, self.warns = reason, warns


class PendingMoments(Protocol):
    """The moments of a step whose numbers may still be on their way from an accelerator."""

    lags: bool  # whether moments() should be called one step later, because it waits for the device

    def moments(self) -> GradientMoments:
        """The moments; waits for copies that are under way. NotMeasured: of a step that is to be
        left out."""


class ProcessShare(Protocol):
    """This process's part of batches that several processes share."""

    world_size: int

    @property
    def fraction(self) -> float:
        """Of the current batch's samples."""

    def fraction_of(self, batches: int) -> float:
        """Of the samples of the last `batches` batches."""

    def size_of(self, batches: int) -> int:
        """The samples of these, on all processes together."""

    def grad_sq_norms(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """This process's part of each group's ‖g‖², [K]; the parts of all add up to it."""

    def broadcast_from_first(self, value: T) -> T:
        """The first process's value; all processes call this at once."""


class Estimator(ABC):
    """Measures the gradient moments of each optimizer step."""

    loss_reduction: str = "mean"  # or "sum", of the loss that is differentiated
    accumulate: int = 1  # backward passes per optimizer step in a user's own accumulation
    by_samples: bool = False  # the passes of a step are micro-batches, weighted by their samples
    parameters: Mapping[str, Tensor] = {}  # what is measured, by name; empty where nothing is
    statistics: frozenset[str] = frozenset()  # names of what is measured besides squared norms
    samples: int | None = None  # measured of each backward pass; None: all of them
    shard: ProcessShare | None = None  # what is known of batches that several processes share
    # Nothing can be measured before a batch has another size than the last one had.
    needs_another_size: bool = False
    enabled: bool = True  # whether the next forward pass is measured; may be set between steps

    @cached_property
    def on_backward_end(self) -> list[Callable[[], None]]:
        """What to call without arguments at the end of each measured backward pass, when the
        gradients are complete, before anybody clips or unscales them."""
        return []

    @abstractmethod
    def observe(
        self, *, weights: Weights | None = None, loss_scale: float | StepScale | None = None
    ) -> PendingMoments:
        """Take the moments of the step without waiting for an accelerator.

        Args:
            weights: of the step's samples [m], under a mean over unequal shares (tokens).
            loss_scale: the factor on the loss: a number, or what `LossScale.take()` returns.
        """

    def collect(
        self, *, weights: Weights | None = None, loss_scale: float | StepScale | None = None
    ) -> GradientMoments:
        """The moments of the step, now."""
        return self.observe(weights=weights, loss_scale=loss_scale).moments()

    def cost(self) -> StepCost | None:
        """What measuring costs by the cost model; None where that is not known."""
        return None

    def tensors_over_samples(self, moments: GradientMoments) -> list[Tensor]:
        """Tensors in the moments that are sums over this process's samples, for reduction."""
        return []

    def metrics(self, moments: GradientMoments) -> dict[str, float]:
        """Further numbers of the step for the diagnostics: `Record.metrics`."""
        return {}

    def check_loss(self, loss: Tensor) -> None:
        """Raise where the loss uses measured parameters that the estimator cannot see."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is measured."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def reset(self) -> None:
        """Discard what was measured since the last step."""

    def remove(self) -> None:
        """Take all hooks off model and parameters."""

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            f"{type(self).__name__} is attached to its model and cannot be copied or pickled: save "
            "state_dict(), and load it into what is attached to the other model")

    def state_dict(self) -> State:
        """Plain numbers and tensors, with a version."""
        return {"version": 1}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict()."""


@dataclass(frozen=True)
class RunContext:
    """What a controller may know of the run it controls; passed to `Controller.bind`."""

    optimizer: Optimizer  # never written to
    # What is measured, by name; empty where nothing is, or not yet known.
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    max_grad_norm: float | None = None  # to which optimizer.step() clips; None: it does not
    clock: Callable[[], float] | None = None  # seconds since some moment
    batch_size: Callable[[], int] | None = None  # the size in force, in samples of a step


class Proposer(Protocol):
    """What `wrap` takes for a controller: a Controller, or any object with this method."""

    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """See Controller.propose."""


class Controller(ABC):
    """Proposes the batch size of the next step: a float, unrounded and unbounded.

    `adabatch.controllers.Controller` adds the state, the repr and what composing needs.
    """

    @property
    def requires(self) -> frozenset[str]:
        """Statistics the estimator must measure for it: "inner_products", "second_moment",
        "preconditioned_trace"."""
        return frozenset()

    @property
    def needs_moments(self) -> bool:
        """False for a rule that proposes at every step, measured or not."""
        return True

    @property
    def needs_effective_lr(self) -> bool:
        """Whether `lr` in propose must be the step per unit of gradient."""
        return False

    @property
    def effective_lr(self) -> EffectiveLr | None:
        """The user's function of a param group that gives its effective lr; None for SGD's."""
        return None

    @property
    def first_batch_size(self) -> float | None:
        """The size to start with; None leaves it to the loader."""
        return None

    def bind(self, context: RunContext) -> None:
        """Called before anything is measured, and once more when `parameters` are known."""

    def on_step(self, *, samples: int, epoch: int) -> None:
        """Called at every step, before propose: samples of the step, and epochs that ended."""

    def on_measurement(self, *, steps: int) -> None:
        """Called before propose, for a rule that proposes at measured steps only: how many steps
        ago the last one was, 1 where each is measured."""

    def on_optimizer_step(self, lr: float) -> None:
        """Called before propose with the base learning rate of the last optimizer step."""

    @abstractmethod
    def propose(self, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
        """The proposed batch size, in samples; NaN for none.

        Args:
            moments: raw moments of the step; None only where `needs_moments` is False.
            loss: mean loss over the samples of the step.
            lr: base learning rate, without any factor of a coupling.
        """

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) of the latest proposal; (NaN, NaN) where it has no error, (0, inf) where its
        error is not known yet."""
        return NO_INTERVAL

    def latest_interval(self) -> Ratio | tuple[float, float]:
        """interval() of the latest proposal, for the history: where it takes long, what it is
        worked out from when the history is read."""
        return self.interval()

    def metrics(self) -> dict[str, float]:
        """What the rule estimates besides its proposal, for the diagnostics: `Record.metrics`."""
        return {}

    def lr_factor(self) -> Callable[[int], float] | None:
        """The rule's own factor on the lr of the steps to come, as a function of the batch size
        that must not change when the controller moves on."""
        return None

    def state_dict(self) -> State:
        """Plain numbers and tensors, with a version."""
        return {"version": 1}

    def load_state_dict(self, state: State) -> None:
        """Continue from a state_dict()."""


class BatchSource(Protocol):
    """Where batches come from: an AdaptiveDataLoader or a ResizableBatchSampler."""

    batch_size: int  # of the next batch drawn, in samples; written by the scheduler only
    drop_last: bool  # whether a last short batch is left out

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch; None where that is not known."""
        return None

    @property
    @abstractmethod
    def position(self) -> int:
        """Samples of the present epoch delivered so far."""

    @property
    @abstractmethod
    def n_batches(self) -> int:
        """Batches delivered since the start."""

    @property
    def n_iterations(self) -> int | None:
        """Epochs begun; None where that is not known."""
        return None

    @property
    @abstractmethod
    def recent(self) -> Sequence[tuple[int, int]]:
        """(requested, delivered) of the latest batches, at least of a step's, in samples."""

    @property
    @abstractmethod
    def runs_ahead(self) -> bool:
        """Whether batches may be drawn before they are trained on."""

    @property
    def micro_batches(self) -> BatchSplit | None:
        """How batches are cut into micro-batches; None: they are not."""
        return None


class Statistic(ABC):
    """One thing that is measured of the per-sample gradients.

    Taps, the end of the backward pass, pooling and the cost model loop over these objects: a new
    statistic is one subclass. Values come either one per sample (`per_sample`: added up over the
    parameters, like squared norms) or one tensor per parameter.

    Legend: N samples in a pass, S of them measured, G_n the contribution of sample n to the
    gradient of the loss that was differentiated (the 1/m of a mean loss is still in it).
    """

    name: ClassVar[str]  # under which `GradientMoments.statistics` holds the pooled result
    per_sample: ClassVar[bool] = False  # a value is a vector [S], not a tensor of any other shape
    needs_gradient: ClassVar[bool] = False  # factors are kept until the step's gradient is complete
    # `of_fused` wants the elementwise sum of squares, which exists only where all are measured.
    needs_second_moment: ClassVar[bool] = False

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        """Called once with the measured parameters by name."""

    @abstractmethod
    def of_factor(self, name: str, factor: Factor, grad: Tensor | None = None) -> Tensor | None:
        """The value of the parameter `name` in one backward pass; None for none.

        Args:
            factor: its per-sample gradients over the measured samples.
            grad: the step's finished gradient, only where `needs_gradient`.
        """

    def of_fused(self, name: str, sq_norms: Tensor, second_moment: Tensor | None) -> Tensor | None:
        """The same where the layer's backward pass gave ||G_n||^2 [S] and sum_n G_n^2."""
        raise NotImplementedError(f"{type(self).__name__} cannot be fused")

    @property
    def can_fuse(self) -> bool:
        """Whether `of_fused` is there, so that layers may compute both gradients at once."""
        return type(self).of_fused is not Statistic.of_fused

    def leaf_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the value that a compiled graph reports; None: not under torch.compile."""
        return None

    def from_leaf(self, name: str, value: Tensor) -> Tensor | None:
        """The value, from what a compiled graph reported."""
        return value

    def of_gradient(self) -> dict[str, Tensor]:
        """What is read of the finished gradients at the end of the step's last pass."""
        return {}

    def pool(
        self, passes: Sequence[Mapping[str, Tensor]], scales: Sequence[float],
        gradient: Mapping[str, Tensor],
    ) -> Any:
        """What `GradientMoments.statistics` holds: by default {parameter: sum over the passes}.

        Args:
            passes: {parameter: value} of each backward pass of the step.
            scales: of each pass: z_n = scale * G_n is the gradient of the per-sample loss.
            gradient: what `of_gradient` gave.
        """
        total: dict[str, Tensor] = {}
        for values, scale in zip(passes, scales, strict=True):
            for name, value in values.items():
                scaled = value * self.scaled(scale)
                total[name] = total[name] + scaled if name in total else scaled
        return total

    def scaled(self, scale: float) -> float:
        """What a value is multiplied by where G_n is multiplied by `scale`: scale^2 by default."""
        return scale**2

    def over_samples(self, pooled: Any) -> list[Tensor]:
        """The tensors of a pooled result that are sums over the samples of this process, which are
        added up over processes in place: by default those of the default `pool`, of another none,
        whose results are then of this process's samples."""
        return list(pooled.values()) if type(self).pool is Statistic.pool else []

    def metrics(self, pooled: Any) -> dict[str, float]:
        """Numbers of a pooled result for the diagnostics: `Record.metrics`."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def cost(self, layer: LayerCost, samples: int, measured: int, fused: bool) -> float:
        """Multiply-adds that it adds to a layer's tap, in one backward pass of N samples."""
        return 0.0
