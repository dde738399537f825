"""Moments of a step whose numbers are still on their way from an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adabatch._transfers import HostCopies
from adabatch.estimators.loss_scale import StepScale
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.pooling import BackwardPass, pool_passes
from adabatch.grad_sample.backward.finish import BackwardChecks


class PendingMoments:
    """What GradSampleHooks.observe() gives: all numbers taken, copies to the host begun.

    Args:
        passes: of the step, on whatever device.
        grad_sq_norms: ‖g‖² of each probe row, [K].
        scale: of the loss.
        checks: of passes whose reports could not be read at once.
        options: of pool_passes.

    Attributes:
        lags: whether moments() is to be called one step later, as it waits for an accelerator.
    """

    def __init__(self, passes: Sequence[BackwardPass], grad_sq_norms: Tensor, scale: StepScale, checks: Sequence[BackwardChecks], options: dict[str, Any]):
        self._copies = copies = HostCopies()
        self._passes = [_copied(step, copies) for step in passes]
        self._grad_sq_norms = copies.add(grad_sq_norms)
        self._scale = scale.copied(copies)
        self._checks = [check.copied(copies) for check in checks]
        self._options = {**options, "weights": copies.add(options["weights"])}
        self.lags = copies.under_way

    def moments(self) -> GradientMoments:
        """The moments.

        Raises:
            RuntimeError, ValueError: as GradSampleHooks.collect(), and what a backward pass would have raised on the CPU.
        """
        self._copies.wait()
        for check in self._checks:
            check.run()
        return pool_passes(self._passes, self._grad_sq_norms, loss_scale=self._scale.factor(), **self._options)


def _copied(step: BackwardPass, copies: HostCopies) -> BackwardPass:
    """The pass with its small tensors on the host; elementwise second moments stay where they are."""
    rows = {"norms": [copies.add(row) for row in step.norms], "inner_products": None if step.inner_products is None else [copies.add(row) for row in step.inner_products]}
    moments = {name: copies.add(value) if value.dim() == 0 else value for name, value in step.second_moments.items()}
    if getattr(step, "preconditioned", None):
        rows["preconditioned"] = {name: copies.add(value) for name, value in step.preconditioned.items()}
    indices = copies.add(step.indices)
    return replace(step, indices=indices, second_moments=moments, **rows) if copies.under_way else step
