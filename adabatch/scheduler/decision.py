"""Steps of the scheduler's decision that need nothing but what was seen."""

from __future__ import annotations

import math
from typing import Any

from adabatch.controllers.base import interval_of
from adabatch.estimators.intervals import NO_INTERVAL
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


def ask(controller: Any, seen: StepRecord, moments: GradientMoments | None, *, loss: float, lr: float) -> float:
    """The controller's proposal; NaN where it is not asked.

    Args:
        controller: is told first how far training has come, if it listens.
        seen: the step.
        moments: those of the step, or None where it was not measured or they cannot be used.
        loss: a mean over the samples.
        lr: the base effective lr.
    """
    if hasattr(controller, "advance"):
        controller.advance(samples=seen.samples or seen.batch_size, epoch=seen.epoch)
    if hasattr(controller, "stepped_with") and seen.base_lr is not None:
        controller.stepped_with(seen.base_lr)
    if moments is None and getattr(controller, "needs_moments", True):
        return math.nan
    return float(controller.propose(moments, loss=loss, lr=lr))


def checked_confidence(confidence: float | None) -> float | None:
    """Refuse a level that is none.

    Raises:
        ValueError: not between 0 and 1.

    Example:
        >>> checked_confidence(0.9)
        0.9
    """
    if confidence is not None and not (isinstance(confidence, (int, float)) and 0 < confidence < 1):
        raise ValueError(f"confidence must be None, or a level between 0 and 1 such as 0.9, both ends excluded; got {confidence!r}")
    return confidence


def proposal_bounds(controller: Any, proposal: float, confidence: float | None) -> dict[str, float]:
    """The ends of the proposal's interval, proposed_low and proposed_high, and what else the controller estimates: fields of a record.

    Args:
        confidence: level of the interval; None: 0.9.
    """
    low, high = NO_INTERVAL if math.isnan(proposal) else interval_of(controller, confidence or 0.9)
    readings = controller.readings() if hasattr(controller, "readings") else {}
    return {"proposed_low": low, "proposed_high": high, **readings}
