"""The options of `adabatch.wrap` and `adabatch.monitor`: frozen, and checked where they are made: a
ValueError lists every problem.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adabatch._checks import takes
from adabatch._types import LossFn
from adabatch.check.report import CheckReport
from adabatch.grad_sample.statistics import statistics_of
from adabatch.interfaces import Statistic

Number = TypeVar("Number")
CouplingRule = Callable[[int, int, float], float]

RULES = ("none", "linear", "sqrt", "adascale", "seesaw")
ON_LIMIT = ("keep", "lower_lr")
SHORT_BATCH = ("scale", "keep", "drop")
DEFAULT_SHARE = 0.05  # of the training time, for measure="auto"


@dataclass(frozen=True)
class BatchSizes:
    """Which batch sizes are allowed, and how readily the size changes.

    Args:
        minimum, maximum: bounds of a step's batch, in samples, both included. A size that follows
            from what is measured is never below 2, as one sample has no variance.
        multiple_of: sizes are multiples of this.
        size_ratio: allow only sizes about this ratio apart, from the lowest to the highest, so
            that compiled models see few shapes (1.25: 23 from 16 to 2048). None: every size.
        cooldown: steps that must pass after a change before the next one.
        hysteresis: relative change up to which the size is kept. With size_ratio: how far a
            proposal must be beyond the geometric mean of two neighbours.

    Example:
        >>> BatchSizes.of((16, 4096)) == BatchSizes(16, 4096)
        True
        >>> BatchSizes(64, 16, cooldown=-1)
        Traceback (most recent call last):
        ValueError: BatchSizes: minimum (64) must not exceed maximum (16); cooldown must be an \
integer >= 0, got -1
    """

    minimum: int = 16
    maximum: int = 2048
    _: KW_ONLY
    multiple_of: int = 1
    size_ratio: float | None = None
    cooldown: int = 0
    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        _make_plain(self)
        problems = _not_positive(
            minimum=self.minimum, maximum=self.maximum, multiple_of=self.multiple_of)
        if not problems and self.minimum > self.maximum:
            problems = [f"minimum ({self.minimum}) must not exceed maximum ({self.maximum})"]
        elif not problems and self.lowest > self.highest:
            problems = [f"no multiple of {self.multiple_of} lies between minimum ({self.minimum}) "
                        f"and maximum ({self.maximum}): widen the bounds"]
        if self.size_ratio is not None and not _is_number(self.size_ratio, above=1):
            problems.append(f"size_ratio must be a number > 1 or None, got {self.size_ratio!r}")
        if not _is_integer(self.cooldown, least=0):
            problems.append(f"cooldown must be an integer >= 0, got {self.cooldown!r}")
        if not _is_number(self.hysteresis, above=-1) or not 0 <= self.hysteresis < 1:
            problems.append("hysteresis must be a number >= 0 and < 1, a relative change, got "
                            f"{self.hysteresis!r}")
        _refuse(self, problems)

    @classmethod
    def of(cls, given: BatchSizes | tuple[int, int]) -> BatchSizes:
        """A BatchSizes as it is; one of a pair (minimum, maximum)."""
        if isinstance(given, cls):
            return given
        if isinstance(given, (tuple, list)) and len(given) == 2:
            return cls(*given)
        raise ValueError("batch_sizes must be a pair (minimum, maximum) or an adabatch.BatchSizes, "
                         f"got {given!r}: pass e.g. batch_sizes=(16, 4096)")

    @property
    def lowest(self) -> int:
        """The smallest allowed size."""
        return -(-self.minimum // self.multiple_of) * self.multiple_of

    @property
    def highest(self) -> int:
        """The largest allowed size."""
        return self.maximum // self.multiple_of * self.multiple_of


@dataclass(frozen=True)
class Coupling:
    """How the learning rate follows the batch size.

    Args:
        rule: the factor on the lr of a batch of B samples, S = B / base_batch_size: "none" (1),
            "linear" (S), "sqrt" (√S), "adascale" (AdaScale's gain), "seesaw" (the optimizer's
            own rule), or a callable (batch_size, base_batch_size, noise_scale) -> factor.
        base_batch_size: the size for which the lr was chosen; None: the first size of the run.
        on_limit: where the size stays below the proposal, because of a bound, cooldown or
            hysteresis, "keep" the lr or "lower_lr" by size / proposal, which keeps the noise.
        short_batch: a batch shorter than requested (the last of an epoch) steps with
            lr · samples / size requested ("scale"), with the lr as it is ("keep"), or is never
            drawn ("drop").
        scale_betas: raise Adam's betas to the power B / base_batch_size, which keeps their
            horizon in samples.
    """

    rule: str | CouplingRule = "none"
    _: KW_ONLY
    base_batch_size: int | None = None
    on_limit: Literal["keep", "lower_lr"] = "keep"
    short_batch: Literal["scale", "keep", "drop"] = "scale"
    scale_betas: bool = False

    def __post_init__(self) -> None:
        problems = []
        named = isinstance(self.rule, str) and self.rule in RULES
        if not named and (isinstance(self.rule, (str, type)) or not callable(self.rule)):
            problems.append(f"rule must be one of {RULES} or a callable (batch_size, "
                            f"base_batch_size, noise_scale) -> factor, got {self.rule!r}")
        elif not named and not takes(self.rule, 32, 16, 0.0):  # type: ignore[arg-type]
            problems.append("rule must take three arguments, (batch_size, base_batch_size, "
                            f"noise_scale) -> factor, got {self.rule!r}")
        if self.base_batch_size is not None:
            problems += _not_positive(" or None", base_batch_size=self.base_batch_size)
        problems += _choice("on_limit", self.on_limit, ON_LIMIT)
        problems += _choice("short_batch", self.short_batch, SHORT_BATCH)
        problems += _switches(scale_betas=self.scale_betas)
        _refuse(self, problems)

    @classmethod
    def of(cls, given: Coupling | str | CouplingRule) -> Coupling:
        """A Coupling as it is; one of a rule's name or a callable."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Every:
    """Measure at one step in k.

    Args:
        k: the interval, in optimizer steps.
        samples: how many samples of each backward pass to measure; None: all.
    """

    k: int = 1
    samples: int | None = None

    def __post_init__(self) -> None:
        problems = _not_positive(k=self.k)
        if self.samples is not None:
            problems += _not_positive(" or None", samples=self.samples)
        _refuse(self, problems)


Measure = float | Every | Literal["auto", "all"] | None


def measure_of(given: Measure) -> float | Every | Literal["auto"] | None:
    """The measure= of `wrap`, with "all" as Every(1) and a share as a float; ValueError: no such.

    Example:
        >>> measure_of("all"), measure_of(0.1)
        (Every(k=1, samples=None), 0.1)
    """
    if isinstance(given, str) and given == "all":
        return Every(1)
    if given is None or isinstance(given, Every) or (isinstance(given, str) and given == "auto"):
        return given
    if _is_number(given, above=0) and float(given) <= 1:
        return float(given)
    raise ValueError("measure must be 'auto', a share of the training time > 0 and up to 1, such "
                     "as 0.05, adabatch.Every(k) for one step in k, 'all' or None, got "
                     f"{given!r}")


@dataclass(frozen=True)
class PerSample:
    """Measure the gradients of single samples in the backward pass (the default).

    Args:
        layout: what `adabatch.check(model, batch, loss_fn)` returned, for models whose layers
            do not all have their samples along dimension 0.
        ignore: names of modules to leave out of the measurement, with all their submodules, or of
            single parameters.
        seed: of the random choice of measured samples.
        per_parameter: record each parameter's moments too, for `diagnostics.layers()`.
        inner_products: measure ⟨g_i, g⟩ too, which `step(loss, weights=...)` needs, and for which
            layers keep their factors from the backward pass on. Controllers request their own.
        statistics: what else to measure, by name ("second_moment") or as objects of your own
            `adabatch.interfaces.Statistic`: controllers find it in `moments.statistics`, the
            diagnostics record what its metrics() gives.
    """

    _: KW_ONLY
    layout: CheckReport | None = None
    ignore: Collection[str] = ()
    seed: int = 0
    per_parameter: bool = False
    inner_products: bool = False
    statistics: Collection[Statistic | str] = ()

    def __post_init__(self) -> None:
        problems = _switches(per_parameter=self.per_parameter, inner_products=self.inner_products)
        if not _is_integer(self.seed):
            problems.append(f"seed must be an integer, got {self.seed!r}")
        try:
            statistics_of(self.statistics)
            object.__setattr__(self, "statistics", tuple(self.statistics))
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        names = self.ignore
        if (isinstance(names, (str, Mapping, Tensor)) or not isinstance(names, Collection)
                or not all(isinstance(name, str) for name in names)):
            problems.append(
                f"ignore must be a list of names of modules or parameters, got {names!r}")
        else:
            object.__setattr__(self, "ignore", tuple(names))
        if self.layout is not None:
            problems += _layout_problems(self.layout, self.ignore)
        _refuse(self, problems)


@dataclass(frozen=True)
class MicroBatch:
    """Estimate the variance from the gradients of micro-batches, at least two a batch: for models
    that cannot be measured per sample. Costs one reduction over the gradients."""


@dataclass(frozen=True)
class CrossRank:
    """Estimate the variance from the gradients of at least two processes, at no cost.

    Args:
        comm_hook, comm_state: a communication hook (state, bucket) -> future of
            DistributedDataParallel that averages the gradients (and may compress them). Pass it
            here instead of registering it with the model, which takes only one.
    """

    comm_hook: Callable[..., object] | None = None
    comm_state: object = None

    def __post_init__(self) -> None:
        problems = []
        given = self.comm_hook
        if given is not None and (isinstance(given, type) or not callable(given)):
            problems.append(f"comm_hook must be a callable (state, bucket), got {self.comm_hook!r}")
        if self.comm_hook is None and self.comm_state is not None:
            problems.append("comm_state is passed to comm_hook, which is None: pass both")
        _refuse(self, problems)


EstimatorOptions = PerSample | MicroBatch | CrossRank


@dataclass(frozen=True)
class MicroBatches:
    """Let batches larger than memory arrive as micro-batches, through the same loop:
    optimizer.step() steps on the last micro-batch of a batch, scheduler.step(loss) pools their
    losses and moments.

    Args:
        size: the largest micro-batch, in samples of one process; "auto": the largest that fits,
            found by trial (see `find_micro_batch_size`); None: batches arrive whole.
        loss_fn: (model, batch) -> the loss that is differentiated; needed by "auto".
        lr_scheduler: a torch lr scheduler that optimizer.step() steps once a batch.
        max_grad_norm: optimizer.step() clips the batch's gradient to this norm.
    """

    size: int | Literal["auto"] | None = None
    _: KW_ONLY
    loss_fn: LossFn | None = None
    lr_scheduler: LRScheduler | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        problems, auto = [], isinstance(self.size, str) and self.size == "auto"
        if self.size is not None and not auto:
            problems = _not_positive(", 'auto' or None", size=self.size)
        if auto and self.loss_fn is None:
            problems.append("size='auto' tries steps: pass loss_fn=, a callable (model, batch) -> "
                            "the loss that you differentiate")
        if self.loss_fn is not None and not callable(self.loss_fn):
            problems.append(f"loss_fn must be a callable (model, batch), got {self.loss_fn!r}")
        if isinstance(self.loss_fn, nn.modules.loss._Loss):
            problems.append(
                f"loss_fn must be a function (model, batch) -> loss, got {self.loss_fn!r}: pass "
                "lambda model, batch: criterion(model(batch[0]), batch[1])")
        if self.lr_scheduler is not None and not isinstance(self.lr_scheduler, LRScheduler):
            problems.append("lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got "
                            f"{self.lr_scheduler!r}")
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            problems.append("lr_scheduler is a ReduceLROnPlateau, whose step() takes a metric: "
                            "omit it, and step it in your loop")
        if self.max_grad_norm is not None and not _is_number(self.max_grad_norm, above=0):
            problems.append(
                f"max_grad_norm must be a number > 0 or None, got {self.max_grad_norm!r}")
        _refuse(self, problems)

    @classmethod
    def of(cls, given: MicroBatches | int | Literal["auto"] | None) -> MicroBatches:
        """A MicroBatches as it is; one of a size."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type]


def checked_together(*checks: Callable[[], Any]) -> list[Any]:
    """What the checks return; a ValueError lists what several of them raise.

    Example:
        >>> checked_together(lambda: BatchSizes(0), lambda: Coupling("cube"))
        Traceback (most recent call last):
        ValueError: 2 arguments are wrong:
          - BatchSizes: minimum must be a positive integer, got 0
          - Coupling: rule must be one of ('none', 'linear', 'sqrt', 'adascale', 'seesaw') or a \
callable (batch_size, base_batch_size, noise_scale) -> factor, got 'cube'
    """
    found, errors = [], []
    for check in checks:
        try:
            found.append(check())
        except (TypeError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "".join(f"\n  - {error}" for error in errors)
        raise ValueError(f"{len(errors)} arguments are wrong:{lines}")
    return found


def plain(value: Number) -> Number:
    """A NumPy number as an int or float; anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore


def _is_integer(value: object, least: float = -math.inf) -> bool:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_whole and value >= least  # type: ignore[operator]


def _not_positive(or_else: str = "", **counts: object) -> list[str]:
    return [f"{name} must be a positive integer{or_else}, got {value!r}"
            for name, value in counts.items() if not _is_integer(value, least=1)]


def _is_number(value: object, above: float) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and above < value < math.inf  # type: ignore[operator]


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> list[str]:
    named = isinstance(value, str) and value in allowed
    return [] if named else [f"{name} must be one of {allowed}, got {value!r}"]


def _switches(**switches: object) -> list[str]:
    """Problems with what must be True or False: a string would count as true."""
    return [f"{name} must be True or False, got {value!r}"
            for name, value in switches.items() if not isinstance(value, bool)]


def _layout_problems(layout: object, ignore: Collection[str]) -> list[str]:
    if not isinstance(layout, CheckReport):
        return [f"layout must be what adabatch.check(model, batch, loss_fn) returned, "
                f"got {layout!r}"]
    prefixes = tuple(f"{name}." for name in ignore)
    refused = {name: why for name, why in layout.refused.items()
               if name not in ignore and not name.startswith(prefixes)
               and not set(layout[name].parameters) <= {*ignore}}
    lines = "".join(f"\n  - {name}: {why}" for name, why in refused.items())
    return [f"adabatch.check refused these layers; fix them, or leave them out with "
            f"ignore={sorted(refused)}:{lines}"] if refused else []


def _refuse(options: object, problems: list[str]) -> None:
    """Raise a ValueError that lists the problems; without any, numbers become plain ones."""
    if problems:
        raise ValueError(f"{type(options).__name__}: " + "; ".join(problems))
    _make_plain(options)


def _make_plain(options: object) -> None:
    """Turn NumPy numbers into Python's, before anything overflows in them."""
    for name, value in vars(options).items():
        object.__setattr__(options, name, plain(value))
