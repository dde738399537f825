"""The variance of the gradient from the gradients of a batch's micro-batches, for any model.

Nothing is measured per sample.

Legend: k micro-batches of b_j samples, m = Σ b_j, g_j the mean gradient of micro-batch j, and
ḡ = Σ b_j g_j / m that of the batch.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adabatch._checks import check_version
from adabatch._transfers import DelayedMoments, HostCopies
from adabatch.data.split import BatchSplit
from adabatch.estimators.gradients import at_backward_end, check_arguments
from adabatch.estimators.loss_scale import StepScale, step_scale
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import Estimator, State

NO_WEIGHTS = "the micro-batch estimator does not support weights=: use the per-sample estimator"


def moments_of_micro_batches(
    sizes: Sequence[int], sq_norms: Sequence[float], grad_sq_norm: float
) -> GradientMoments:
    """GradientMoments from k squared norms ‖g_j‖² and ‖ḡ‖².

        T̂ = Σ_j b_j ‖g_j − ḡ‖² / (k − 1) = Σ_j b_j (‖g_j‖² − ‖ḡ‖²) / (k − 1)

    unbiased for tr Cov(g_i), with the spread of k − 1 degrees of freedom (m − 1 where samples are
    measured). The `sq_norms` of the result are k estimates of E‖g_i‖², not norms of samples; single
    ones may be negative. With k = 1 there are none.

    Args:
        sizes: b_j.
        sq_norms: ‖g_j‖².
        grad_sq_norm: ‖ḡ‖².

    Example:
        >>> moments = moments_of_micro_batches([2, 2], [4.0, 0.0], 1.0)
        >>> moments.variance_trace, moments.n_measured
        (4.0, 2)
    """
    k, m = len(sizes), sum(sizes)
    factor = (1 - 1 / m) * k / (k - 1) if k > 1 else 0.0
    pairs = zip(sizes, sq_norms, strict=True) if k > 1 else ()
    estimates = [grad_sq_norm + factor * size * (norm - grad_sq_norm) for size, norm in pairs]
    return GradientMoments(m, torch.tensor(estimates, dtype=torch.float64), grad_sq_norm)


class MicroBatchEstimator(Estimator):
    """Squared norms of the micro-batches' gradients, taken as they reach the parameters.

    No taps, no second pass; costs one reduction over the gradients. Construct it before the
    AccumulatingOptimizer, whose weights on the gradients it must not see.

    Args:
        parameters: the parameters measured.
        micro_batches: of the loader; each batch of more than one sample is cut into at least two
            from now on.
        loss_reduction: 'mean' or 'sum', of the loss over a micro-batch.

    Raises:
        ValueError: an unknown loss_reduction, or no parameter that requires a gradient.

    Example:
        >>> from adabatch.micro_batches.optimizer import AccumulatingOptimizer
        >>> weight, micro = torch.nn.Parameter(torch.zeros(1)), BatchSplit()
        >>> estimator = MicroBatchEstimator([weight], micro)
        >>> optimizer = AccumulatingOptimizer(torch.optim.SGD([weight], lr=1.0), micro)
        >>> for part, size in enumerate(micro.start(4)):
        ...     micro.advance(part, size)
        ...     (weight * float(2 * part)).backward()
        >>> moments = estimator.collect()
        >>> moments.batch_size, moments.grad_sq_norm, moments.variance_trace
        (4, 1.0, 4.0)
    """

    _whole: Tensor | None
    _sizes: list[int]

    def __init__(
        self, parameters: Iterable[Tensor], micro_batches: BatchSplit, *,
        loss_reduction: str = "mean",
    ):
        check_arguments(loss_reduction)
        measured = [parameter for parameter in parameters if parameter.requires_grad]
        if not measured:
            raise ValueError("no trainable parameters: there is nothing to measure")
        self.loss_reduction, self.enabled = loss_reduction, True
        self.parameters = {str(index): parameter for index, parameter in enumerate(measured)}
        self._micro = micro_batches
        micro_batches.at_least = max(2, micro_batches.at_least)
        self.reset()
        # Held weakly: the parameters outlive the estimator.
        own = weakref.ref(self)
        self._handles = [
            parameter.register_hook(functools.partial(_pass_on, own, index))
            for index, parameter in enumerate(measured)
        ]

    def observe(
        self, *, weights: Tensor | Sequence[float] | None = None,
        loss_scale: float | StepScale | None = None,
    ) -> DelayedMoments:
        """The moments of the batch, of all its micro-batches.

        Raises:
            RuntimeError: not one backward pass for each micro-batch.
            ValueError: weights, which this estimator does not support.
        """
        if weights is not None:
            raise ValueError(NO_WEIGHTS)
        try:
            count, found = self._micro.count, sorted(self._sq_norms)
            if self._whole is None or found != list(range(count)) or self._repeated:
                repeated = ", some of them more than once" if self._repeated else ""
                raise RuntimeError(
                    f"the batch has {count} micro-batches, and gradients were computed for those "
                    f"at {found}{repeated}: call loss.backward() once for each"
                )
            return self._pending(self._whole, loss_scale)
        finally:
            self.reset()

    def _pending(self, whole: Tensor, loss_scale: float | StepScale | None) -> DelayedMoments:
        sizes, summed, copies = self._sizes, self.loss_reduction == "sum", HostCopies()
        sq_norms = [copies.add(sum(self._sq_norms[j])) for j in range(len(sizes))]
        grad_sq_norm = copies.add(whole)
        scale = step_scale(loss_scale).copied(copies)

        def compute() -> GradientMoments:
            factor = scale.factor()
            scales = [1 / (factor * (n if summed else 1)) ** 2 for n in (*sizes, sum(sizes))]
            parts = [float(norm) * scale for norm, scale in zip(sq_norms, scales, strict=False)]
            return moments_of_micro_batches(sizes, parts, float(grad_sq_norm) * scales[-1])

        return DelayedMoments(copies, compute)

    def _on_gradient(self, index: int, grad: Tensor) -> None:
        """Parameter `index` gets its gradient of the present micro-batch."""
        micro = self._micro
        if not self.enabled or not micro.batch_size:
            return
        if not self._sq_norms:
            self._sizes = micro.current_sizes
        if micro.index not in self._sq_norms:
            at_backward_end(functools.partial(self._end_pass, micro.is_last))
        self._repeated |= (micro.index, index) in self._seen
        self._seen.add((micro.index, index))
        self._sq_norms.setdefault(micro.index, []).append(_sq_norm(grad))

    def _end_pass(self, is_last: bool) -> None:
        if is_last:
            grads = [each.grad for each in self.parameters.values() if each.grad is not None]
            self._whole = sum((_sq_norm(grad) for grad in grads), torch.zeros(()))
        for callback in self.on_backward_end:
            callback()

    def reset(self) -> None:
        """Discard what was measured since the last observe()."""
        self._sq_norms: dict[int, list[Tensor]] = {}
        self._seen: set[tuple[int, int]] = set()
        self._repeated = False
        self._whole = None
        self._sizes = []

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def load_state_dict(self, state: State) -> None:
        """There is nothing to load.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "MicroBatchEstimator")


def _pass_on(reference: weakref.ref[MicroBatchEstimator], index: int, grad: Tensor) -> None:
    estimator = reference()
    if estimator is not None:
        estimator._on_gradient(index, grad)


def _sq_norm(grad: Tensor) -> Tensor:
    """‖grad‖², float64."""
    grad = grad.detach()
    return (grad.coalesce().values() if grad.is_sparse else grad).double().square().sum()
