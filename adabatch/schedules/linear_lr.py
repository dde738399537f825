"""The linear budget schedule of the learning rate, counted in steps or in samples.

Reference: Li, Yumer, Ramanan (2020), "Budgeted training: Rethinking deep neural network training
under resource constraints", arXiv 1905.04753.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adabatch._checks import positive, real


def linear_decay(position: float, budget: float) -> float:
    """1 - position / budget, and 0 beyond the budget."""
    return max(0.0, 1 - position / budget)


def mean_linear_decay(position: float, samples: float, budget: float) -> float:
    """The mean of linear_decay over [position, position + samples]; its value where samples is 0.

    Example:
        >>> mean_linear_decay(0, 100, 100), mean_linear_decay(50, 100, 100)
        (0.5, 0.125)
    """
    if not samples:
        return linear_decay(position, budget)
    inside = max(0.0, min(samples, budget - position))
    return inside / samples * linear_decay(position + inside / 2, budget)


class LinearLR(LRScheduler):
    """lr = lr₀ · (1 - t / T) with t in steps, or lr₀ · (1 - samples_seen / budget_samples), and 0
    beyond the end.

    This is linearlr's class, not torch's of that name, which warms up and multiplies what other
    schedulers set (adabatch/schedules/README.md); this one overwrites it.
    ``torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=T)`` has the same lrs.

    Call :meth:`step` after each of T steps (or epochs). With an adaptive batch the number of steps
    is unknown; then give ``budget_samples``, and call ``step(samples)`` with the size of the batch
    just stepped. A step of m samples uses the lr of its first sample, so Σ lr · m exceeds the
    integral lr₀ · budget / 2 by lr₀ · Σ m² / (2 · budget). Where that sum must not depend on the
    batch sizes, announce them: with ``batch_size`` (of the first batch) and
    ``step(samples, next_samples=...)`` each lr is the mean over its own batch, and Σ lr · m is
    lr₀ · budget / 2 for every sequence of sizes that ends at the budget.

    Args:
        optimizer: its lrs are the lr₀ of each group; tensor lrs are written in place.
        T: steps (or epochs), greater than 0.
        last_epoch: as in torch's schedulers; -1 for a new run.
        budget_samples: samples (or tokens) in all, greater than 0; instead of T.
        batch_size: size of the first batch, to give it its mean lr; only with budget_samples.

    Raises:
        TypeError, ValueError: ``optimizer`` is not an Optimizer, an argument not a positive number;
            not exactly one of T and budget_samples is given; a step without samples.

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

    def get_lr(self) -> list:
        """The lr of each group at the present position."""
        if self.T is None:
            factor = mean_linear_decay(self.samples_seen, self.next_samples, self._budget)
        else:
            factor = linear_decay(self.last_epoch, self._budget)
        return [factor * base_lr for base_lr in self.base_lrs]

    def _get_closed_form_lr(self) -> list:
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
