"""Schedules of the learning rate, counted in steps or in samples."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from adabatch._checks import check_version, integer, positive, real
from adabatch._types import Argument
from adabatch.interfaces import State

STATE_VERSION = 1


class LinearLR(LRScheduler):
    """lr = lr₀ · (1 - t / T) with t in steps, or lr₀ · (1 - samples_seen / budget_samples), and 0
    beyond the end.

    This is linearlr's class, not torch's of that name, which warms up and multiplies what other
    schedulers set; this one overwrites it (adabatch/schedules/README.md).

    Call :meth:`step` after each of T steps (or epochs); with ``budget_samples`` ``step(samples)``,
    with the size of the batch just stepped. A step of m samples uses the lr of its first sample, so
    Σ lr · m exceeds the integral lr₀ · budget / 2 by lr₀ · Σ m² / (2 · budget). Where that sum must
    not depend on the batch sizes, announce them: with ``batch_size`` (of the first batch) and
    ``step(samples, next_samples=...)`` each lr is the mean over its own batch, and Σ lr · m is
    lr₀ · budget / 2 for every sequence of sizes that ends at the budget.

    Args:
        optimizer: its lrs are the lr₀ of each group; tensor lrs are written in place.
        T, budget_samples: exactly one of them, greater than 0.
        last_epoch: as in torch's schedulers; -1 for a new run.
        batch_size: size of the first batch, to give it its mean lr; only with budget_samples.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a step by a budget
            without samples.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = LinearLR(optimizer, budget_samples=1000)
        >>> optimizer.step(), scheduler.step(400), scheduler.get_last_lr()
        (None, None, [0.6])

    Reference: Li, Yumer, Ramanan (2020), "Budgeted training", arXiv 1905.04753.
    """

    def __init__(self, optimizer: Optimizer, T: float | None = None, last_epoch: int = -1, *,
                 budget_samples: float | None = None, batch_size: int | None = None):
        if (T is None) == (budget_samples is None):
            raise ValueError("give either T (steps) or budget_samples, "
                             f"got T={T} and budget_samples={budget_samples}")
        if batch_size is not None and budget_samples is None:
            raise ValueError(f"batch_size ({batch_size}) needs budget_samples: steps have no size")
        self.T, self.budget_samples = T, budget_samples
        by_steps = budget_samples is None
        budget = positive("T", T) if by_steps else positive("budget_samples", budget_samples)
        self._budget = float(budget)
        self.samples_seen: float = 0
        self.next_samples: float = 0 if batch_size is None else positive("batch_size", batch_size)
        self._begun = False
        super().__init__(optimizer, last_epoch)
        self._begun = True

    def __repr__(self) -> str:
        lrs = ", ".join(f"{float(group['lr']):.4g}" for group in self.optimizer.param_groups)
        budget = f"budget_samples={self.budget_samples}, lr {lrs}, {self.samples_seen:,} samples"
        steps = f"T={self.T}, lr {lrs}, step {self.last_epoch}"
        return f"LinearLR({budget if self.T is None else steps})"

    def get_lr(self) -> list[float | Tensor]:
        """The lr of each group at the present position, the mean over the batch to come where its
        size is known."""
        position = self.samples_seen if self.T is None else self.last_epoch
        inside = max(0.0, min(self.next_samples, self._budget - position))
        factor = max(0.0, 1 - (position + inside / 2) / self._budget)
        factor *= inside / self.next_samples if self.next_samples else 1
        return [factor * base_lr for base_lr in self.base_lrs]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return self.get_lr()

    def step(self, samples: int | None = None, *, next_samples: int | None = None) -> None:
        """Advance by one step, or by the samples of the batch just stepped.

        Args:
            samples: with budget_samples: the size of that batch. With T: torch's deprecated
                ``epoch``.
            next_samples: the size of the batch to come, if known, to give it its mean lr.
        """
        if self.T is not None or not self._begun:
            return super().step(samples)
        if samples is None:
            raise TypeError("LinearLR with budget_samples is stepped by samples: call "
                            "step(samples) with the size of the batch just stepped")
        self.samples_seen += real("samples", samples, at_least=0)
        known = next_samples is not None
        self.next_samples = real("next_samples", next_samples, at_least=0) if known else 0
        return super().step()


class SampleClock:
    """Steps an lr scheduler once per samples_per_step samples: after n samples it has taken
    ⌊n / samples_per_step⌋ steps, whatever the batch sizes.

    Build the scheduler in units of samples_per_step: a cosine over a budget is
    ``CosineAnnealingLR(optimizer, T_max=budget // samples_per_step)``, a warm-up over w samples
    torch's ``LinearLR(optimizer, total_iters=w // samples_per_step)``; both in a SequentialLR are
    wrapped once. A smaller unit follows the curve closer, but takes as many calls of the scheduler.
    The smallest batch size is a good unit: with a constant batch of that size the lrs are those
    without the clock.

    ReduceLROnPlateau gets the metric of the steps that come due. Where several do, a metric that is
    better counts as better once and not as bad for the rest; one that is not counts as bad for each
    of them. OneCycleLR, which raises beyond its total_steps, stays at the last of them.

    Args:
        scheduler: any scheduler of torch.optim.lr_scheduler, chained and sequential ones included.
        samples_per_step: samples (or tokens) for one of its steps, at least 1.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> clock = SampleClock(halving, samples_per_step=100)
        >>> optimizer.step(), clock.step(70), clock.step(230), clock.get_last_lr()
        (None, None, None, [0.125])
    """

    def __init__(self, scheduler: LRScheduler | ReduceLROnPlateau, samples_per_step: int):
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise TypeError("scheduler must be a torch.optim.lr_scheduler scheduler, "
                            f"got {type(scheduler).__name__}")
        self.scheduler = scheduler
        self.samples_per_step = integer("samples_per_step", samples_per_step, at_least=1)
        self.samples_seen = self.steps_taken = 0

    @property
    def optimizer(self) -> Optimizer:
        return self.scheduler.optimizer

    def __repr__(self) -> str:
        return (f"SampleClock({type(self.scheduler).__name__}, samples_per_step="
                f"{self.samples_per_step}, {self.samples_seen:,} samples, "
                f"{self.steps_taken:,} steps)")

    def step(self, samples: int, **kwargs: Argument) -> None:
        """Count the samples of the batch just stepped, and take the steps that have come due, each
        with the keyword arguments, such as ``metrics=loss``."""
        scheduler = self.scheduler
        if isinstance(scheduler, ReduceLROnPlateau) and "metrics" not in kwargs:
            raise TypeError("ReduceLROnPlateau is stepped with a metric: call "
                            "step(samples, metrics=loss) of SampleClock")
        self.samples_seen += integer("samples", samples, at_least=0)
        better = False
        for _ in range(self.samples_seen // self.samples_per_step - self.steps_taken):
            self.steps_taken += 1
            if isinstance(scheduler, OneCycleLR) and (
                    scheduler.last_epoch + 1 >= scheduler.total_steps):
                continue
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(**kwargs)
            elif not better or scheduler.in_cooldown:  # the same once more is not worse than itself
                best = scheduler.best
                scheduler.step(**kwargs)
                better = better or scheduler.best != best

    def get_last_lr(self) -> list[float | Tensor]:
        """The lr of each group, as the wrapped scheduler set it last."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> State:
        """The count of samples and the wrapped scheduler's state; the lrs are in the optimizer's.
        """
        return {"version": STATE_VERSION, "samples_per_step": self.samples_per_step,
                "samples_seen": self.samples_seen, "steps_taken": self.steps_taken,
                "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: State) -> None:
        """Continue from a state, the unit samples_per_step included; ValueError for that of another
        version."""
        check_version(state_dict, STATE_VERSION, "SampleClock")
        self.samples_per_step = state_dict["samples_per_step"]
        self.samples_seen = state_dict["samples_seen"]
        self.steps_taken = state_dict["steps_taken"]
        self.scheduler.load_state_dict(state_dict["scheduler"])
