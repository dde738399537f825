"""Gradients that were not the batch's own: what is left of an earlier step, seen from a variance that cannot be negative."""

from __future__ import annotations

import warnings

from adabatch.estimators.moments import GradientMoments

# Of the mean squared norm: far above float32's rounding.
TOLERANCE = 0.01


class GradientNormCheck:
    """Warns once where ‖g‖² is larger than any gradient of these samples can be.

    With all samples measured and equal weights mean ‖g_i‖² >= ‖g‖², since g is the mean of the g_i. A gradient that is longer holds something else besides.

    Example:
        >>> import torch
        >>> stale = GradientNormCheck()
        >>> stale.seen(GradientMoments(batch_size=2, sq_norms=torch.ones(2), grad_sq_norm=4.0))
        True
    """

    def __init__(self):
        self._warned = False

    def seen(self, moments: GradientMoments) -> bool:
        """Whether the step's gradient is too long for its samples."""
        whole = moments.inner_products is None and moments.n_measured == moments.batch_size and moments.effective_batch_size in (None, moments.batch_size)
        return whole and moments.grad_sq_norm > (1 + TOLERANCE) * moments.mean_sq_norm

    def look(self, moments: GradientMoments) -> None:
        """Take the moments of a step."""
        if self._warned or not self.seen(moments):
            return
        self._warned = True
        warnings.warn(
            f"the gradient's squared norm, {moments.grad_sq_norm:.3g}, is above the samples' mean, {moments.mean_sq_norm:.3g}, which no mean of "
            "their gradients can be: it holds something else. Call optimizer.zero_grad() before each step's backward pass; put penalties on the weights into "
            "the optimizer's weight_decay. Until then the variance is measured too small",
            stacklevel=4,  # the caller of scheduler.step()
        )
