"""Steps of the scheduler's decision that need nothing but what was seen."""

from __future__ import annotations

import math
from typing import Any

from adabatch.interfaces import NO_INTERVAL, Controller
from adabatch.estimators.moments import GradientMoments
from adabatch.scheduler.pipeline import StepRecord


def check_rows(seen: StepRecord, loader: Any) -> None:
    """Hold what the layers saw against what the loader delivered.

    Raises:
        RuntimeError: they differ, and the loader does not run ahead of the training loop.
    """
    moments, delivered = seen.moments, seen.delivered
    if moments is not None and delivered and delivered != moments.batch_size and not getattr(loader, "runs_ahead", False):
        raise RuntimeError(
            f"the layers saw {moments.batch_size} rows in this step, but the loader delivered {delivered} samples. If the model puts another dimension "
            "first (time first, or samples and positions flattened together), settle its layout with adabatch.check(...); if one step uses several "
            "batches, pass accumulate=; if the loop fetches a batch before it has stepped the last one, leave that to workers (num_workers=)"
        )


def ask(controller: Controller, seen: StepRecord, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
    """The controller's proposal; NaN where it is not asked.

    Args:
        controller: is told first how far training has come, if it listens.
        seen: the step.
        moments: those of the step, or None where it was not measured or they cannot be used.
        loss: a mean over the samples.
        lr: the base effective lr.
    """
    controller.on_step(samples=seen.samples or seen.batch_size, epoch=seen.epoch)
    if seen.base_lr is not None:
        controller.on_optimizer_step(seen.base_lr)
    if moments is None and controller.needs_moments:
        return math.nan
    return float(controller.propose(moments, loss=loss, lr=lr))


def proposal_bounds(controller: Controller, proposal: float) -> dict[str, float]:
    """The ends of the proposal's 90 % interval, proposed_low and proposed_high, and what else the
    controller estimates: fields of a record."""
    low, high = NO_INTERVAL if math.isnan(proposal) else controller.interval()
    return {"proposed_low": low, "proposed_high": high, **controller.metrics()}
