"""The linear budget schedule of the learning rate, counted in steps or in samples.

Reference: Li, Yumer, Ramanan, "Budgeted Training: Rethinking Deep Neural Network Training Under Resource Constraints", 2020, arXiv 1905.04753.
"""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adabatch._checks import real


def linear_decay(position: float, budget: float) -> float:
    """1 - position / budget, and 0 beyond the budget.

    Example:
        >>> linear_decay(25, 100), linear_decay(200, 100)
        (0.75, 0.0)
    """
    return max(0.0, 1 - position / budget)


def mean_linear_decay(position: float, samples: float, budget: float) -> float:
    """The mean of linear_decay over [position, position + samples]; linear_decay(position) if samples is 0.

    Example:
        >>> mean_linear_decay(0, 100, 100), mean_linear_decay(50, 100, 100)
        (0.5, 0.125)
    """
    if not samples:
        return linear_decay(position, budget)
    inside = max(0.0, min(samples, budget - position))
    return inside / samples * linear_decay(position + inside / 2, budget)


class LinearLR(LRScheduler):
    """lr = lr₀ · (1 - t / T) with t in steps, or lr₀ · (1 - samples_seen / budget_samples), and 0 beyond the end.

    ``LinearLR(optimizer, T)`` is linearlr's class: call :meth:`step` after each of T steps (or epochs). With an adaptive batch the number of steps is not
    known; then give ``budget_samples`` and call ``step(samples)`` with the size of the batch just stepped.

    The lr is a function of the samples seen, whatever the batch sizes were; its integral over the budget is lr₀ · budget / 2. A step of m samples uses the
    lr of its first sample, so Σ lr · m exceeds that by lr₀ · Σ m² / (2 · budget). Where the sum itself must not depend on the batch sizes, announce them:
    with ``batch_size`` (of the first batch) and ``step(samples, next_samples=...)`` each lr is the mean over its own batch, and Σ lr · m is
    lr₀ · budget / 2 for every sequence of sizes that ends at the budget.

    Args:
        optimizer: its lrs are the lr₀ of each group; tensor lrs are written in place.
        T: steps (or epochs), greater than 0.
        last_epoch: as in torch's schedulers; -1 to start anew.
        budget_samples: samples (or tokens) in all, greater than 0; instead of T.
        batch_size: size of the first batch, to give it its mean lr; only with budget_samples.

    Raises:
        TypeError: ``optimizer`` is no Optimizer, or a number is none; in :meth:`step`: no samples given.
        ValueError: a number is not positive, or not exactly one of T and budget_samples is given.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = LinearLR(optimizer, budget_samples=1000)
        >>> for samples in (100, 300):
        ...     optimizer.step()
        ...     scheduler.step(samples)
        >>> scheduler.get_last_lr()
        [0.6]
    """

    def __init__(
        self, optimizer: Optimizer, T: float | None = None, last_epoch: int = -1, *, budget_samples: float | None = None, batch_size: int | None = None
    ):
        if (T is None) == (budget_samples is None):
            raise ValueError(f"Give either T (steps) or budget_samples, got T={T} and budget_samples={budget_samples}.")
        if batch_size is not None and budget_samples is None:
            raise ValueError(f"batch_size ({batch_size}) needs budget_samples: steps have no size.")
        self.T = None if T is None else float(real("T", T, above=0))
        self.budget_samples = None if budget_samples is None else real("budget_samples", budget_samples, above=0)
        self.samples_seen = 0
        self.next_samples = 0 if batch_size is None else real("batch_size", batch_size, above=0)
        self._begun = False
        super().__init__(optimizer, last_epoch)
        self._begun = True

    def get_lr(self) -> list:
        """The lr of each group at the present position."""
        by_steps = self.T is not None
        factor = linear_decay(self.last_epoch, self.T) if by_steps else mean_linear_decay(self.samples_seen, self.next_samples, self.budget_samples)
        return [factor * base_lr for base_lr in self.base_lrs]

    def _get_closed_form_lr(self) -> list:
        return self.get_lr()

    def step(self, samples: float | None = None, *, next_samples: float | None = None) -> None:
        """Go on by one step, or by the samples of the batch just stepped.

        Args:
            samples: with budget_samples: the size of that batch. With T: torch's deprecated ``epoch``.
            next_samples: the size of the batch to come, if known, to give it its mean lr.
        """
        if self.T is not None or not self._begun:
            return super().step(samples)
        if samples is None:
            raise TypeError("LinearLR with budget_samples is stepped by samples: call step(samples) with the size of the batch just stepped.")
        self.samples_seen += _not_negative("samples", samples)
        self.next_samples = 0 if next_samples is None else _not_negative("next_samples", next_samples)
        return super().step()


def _not_negative(name: str, value: float) -> float:
    if real(name, value) < 0:
        raise ValueError(f"{name} must not be negative, got {value}.")
    return real(name, value)
