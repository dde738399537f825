"""Any torch lr scheduler, advanced by samples seen instead of steps."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adabatch._checks import check_version, integer
from adabatch._types import Argument
from adabatch.interfaces import State

STATE_VERSION = 1


class SampleClock:
    """Steps an lr scheduler once per samples_per_step samples: after n samples it has taken
    ⌊n / samples_per_step⌋ steps, whatever the batch sizes.

    Build the scheduler in units of samples_per_step: a cosine over a budget is
    ``CosineAnnealingLR(optimizer, T_max=budget // samples_per_step)``, a warm-up over w samples
    torch's ``LinearLR(optimizer, total_iters=w // samples_per_step)``; both in a SequentialLR are
    wrapped once, as a whole. A smaller unit follows the curve closer, but a batch of many units
    takes as many calls of the scheduler. The smallest batch size is a good unit: with a constant
    batch of that size the lrs are those without the clock.

    Args:
        scheduler: any scheduler of torch.optim.lr_scheduler, chained and sequential ones included.
        samples_per_step: samples (or tokens) for one of its steps, at least 1.

    Raises:
        TypeError, ValueError: ``scheduler`` is not a torch lr scheduler; a count of samples is not
            an integer, or too small.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> clock = SampleClock(halving, samples_per_step=100)
        >>> for samples in (70, 70, 160):
        ...     optimizer.step()
        ...     clock.step(samples)
        >>> clock.get_last_lr()
        [0.125]
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

    def step(self, samples: int, **kwargs: Argument) -> None:
        """Count the samples of the batch just stepped, and take the steps that have come due.

        Args:
            samples: size of that batch, at least 0.
            **kwargs: for each step of the wrapped scheduler, such as ``metrics=loss``.
        """
        self.samples_seen += integer("samples", samples, at_least=0)
        for _ in range(self.samples_seen // self.samples_per_step - self.steps_taken):
            self.scheduler.step(**kwargs)
            self.steps_taken += 1

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
