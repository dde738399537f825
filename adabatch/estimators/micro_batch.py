"""The variance of the gradient from the gradients of a batch's micro-batches: nothing is measured per sample, so any model will do.

Legend: k micro-batches of b_j samples, m = Σ b_j, g_j the mean gradient of micro-batch j, ḡ = Σ b_j g_j / m the batch's.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from adabatch._checks import check_version
from adabatch._transfers import HostCopies, scale_of
from adabatch.estimators.loss_scale import LossScale
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.pooling import LOSS_REDUCTIONS
from adabatch.micro_batches.batches import MicroBatches


def moments_of_micro_batches(sizes: Sequence[int], sq_norms: Sequence[float], grad_sq_norm: float) -> GradientMoments:
    """GradientMoments from k squared norms ‖g_j‖² and ‖ḡ‖².

        T̂ = Σ_j b_j ‖g_j − ḡ‖² / (k − 1) = Σ_j b_j (‖g_j‖² − ‖ḡ‖²) / (k − 1)

    unbiased for tr Cov(g_i), with the spread of k − 1 degrees of freedom (m − 1 where samples are measured). The `sq_norms` of the result are k estimates of
    E‖g_i‖², not norms of samples; single ones may be negative. With k = 1 there are none.

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
    estimates = []
    if k > 1:
        factor = (1 - 1 / m) * k / (k - 1)
        estimates = [grad_sq_norm + factor * size * (sq_norm - grad_sq_norm) for size, sq_norm in zip(sizes, sq_norms, strict=True)]
    return GradientMoments(batch_size=m, sq_norms=torch.tensor(estimates, dtype=torch.float64), grad_sq_norm=grad_sq_norm)


class MicroBatchMoments:
    """What GradSampleHooks is for samples, for micro-batches: stands in its place in BatchSizeScheduler.

    Each backward pass adds ‖g_j‖² as the parameters' gradients come by; no taps, no second pass. Costs one reduction over the gradients. Make it before the
    AccumulatingOptimizer, whose shares it must not see.

    Args:
        parameters: the parameters measured.
        micro_batches: of the loader; at least two are made of each batch from now on, of any batch of more than one sample.
        loss_reduction: 'mean' or 'sum', of the loss over a micro-batch.
        grad_scaler: the GradScaler that scales the loss.

    Raises:
        ValueError: an unknown loss_reduction, or no parameter that requires a gradient.

    Example:
        >>> from adabatch.micro_batches.optimizer import AccumulatingOptimizer
        >>> weight, micro = torch.nn.Parameter(torch.zeros(1)), MicroBatches()
        >>> hooks = MicroBatchMoments([weight], micro)
        >>> optimizer = AccumulatingOptimizer(torch.optim.SGD([weight], lr=1.0), micro)
        >>> for part, size in enumerate(micro.start(4)):
        ...     micro.advance(part, size)
        ...     (weight * float(2 * part)).backward()
        >>> moments = hooks.collect()
        >>> moments.batch_size, moments.grad_sq_norm, moments.variance_trace
        (4, 1.0, 4.0)
    """

    accumulate = 1

    def __init__(self, parameters: Iterable[Tensor], micro_batches: MicroBatches, *, loss_reduction: str = "mean", grad_scaler: Any = None):
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {loss_reduction!r}")
        measured = [parameter for parameter in parameters if parameter.requires_grad]
        if not measured:
            raise ValueError("no trainable parameters: there is nothing to measure")
        self.loss_reduction, self.enabled = loss_reduction, True
        self.parameters = {str(index): parameter for index, parameter in enumerate(measured)}
        self._micro, self._grad_scaler, self.loss_scale = micro_batches, grad_scaler, LossScale(grad_scaler)
        micro_batches.at_least = max(2, micro_batches.at_least)
        self.reset()
        # Held weakly: the parameters outlive the measurement.
        own = weakref.ref(self)
        self._handles = [parameter.register_hook(functools.partial(_hear, own, index)) for index, parameter in enumerate(measured)]

    def collect(self, **given: Any) -> GradientMoments:
        """Moments of the batch: of all its micro-batches. Raises as observe()."""
        return self.observe(**given).moments()

    def observe(self, **given: Any) -> PendingMicroBatchMoments:
        """As collect(), without waiting for an accelerator: call moments() on what it gives, a step later.

        Raises:
            RuntimeError: not one backward pass for each micro-batch; steps by a GradScaler that was not given.
            ValueError: weights or loss_scale, which this estimator does not take.
        """
        if given:
            raise ValueError(f"the micro-batch estimator takes neither weights nor loss_scale, got {sorted(given)}: use GradSampleHooks")
        try:
            if sorted(self._sq_norms) != list(range(self._micro.count)) or self._repeated:
                raise RuntimeError(
                    f"{self._micro.count} micro-batches make this batch, and gradients came by for {sorted(self._sq_norms)}"
                    f"{', some of them more than once' if self._repeated else ''}: call loss.backward() once for each"
                )
            self.loss_scale.check_told(None)
            summed = self.loss_reduction == "sum"
            sums = [sum(self._sq_norms[part]) for part in range(len(self._sizes))]
            return PendingMicroBatchMoments(self._sizes, sums, self._whole, self._scale, summed)
        finally:
            self.reset()

    def _hear(self, index: int, grad: Tensor) -> None:
        micro = self._micro
        if not self.enabled or not micro.batch_size:
            return
        if not self._sq_norms:
            self._sizes = micro.current_sizes
            self._scale = 1.0 if self._grad_scaler is None else scale_of(self._grad_scaler)
        self._repeated |= (micro.index, index) in self._heard
        self._heard.add((micro.index, index))
        values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
        self._sq_norms.setdefault(micro.index, []).append(values.double().square().sum())
        if micro.is_last and self._whole is None:
            self._whole = torch.zeros(())
            # Twice: DistributedDataParallel writes the gradients in a last callback of its own.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._complete))

    def _complete(self) -> None:
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        self._whole = sum(value.detach().double().square().sum() for value in values)

    def reset(self) -> None:
        """Forget what came by since the last collect()."""
        self._sq_norms: dict[int, list[Tensor]] = {}
        self._heard: set[tuple[int, int]] = set()
        self._repeated, self._scale = False, 1.0
        self._sizes: list[int] = []
        self._whole: Tensor | None = None

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in [*self._handles, self.loss_scale]:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {"version": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load.

        Raises:
            ValueError: unknown version.
        """
        check_version(state, 1, "MicroBatchMoments")


def _hear(reference: weakref.ref[MicroBatchMoments], index: int, grad: Tensor) -> None:
    hooks = reference()
    if hooks is not None:
        hooks._hear(index, grad)


class PendingMicroBatchMoments:
    """Moments whose numbers may still be on their way from an accelerator.

    Args:
        sizes: b_j.
        sq_norms: ‖contribution of micro-batch j‖².
        whole: ‖g‖² of the batch, in the same scale.
        scale: of the loss.
        summed: the losses are sums over the samples.

    Attributes:
        lags: whether moments() waits for an accelerator.
    """

    def __init__(self, sizes: list[int], sq_norms: list[Tensor], whole: Tensor, scale: Tensor | float, summed: bool):
        self._copies = HostCopies()
        self._sizes, self._summed = sizes, summed
        self._sq_norms = [self._copies.add(value) for value in sq_norms]
        self._whole, self._scale = self._copies.add(whole), self._copies.add(scale)
        self.lags = self._copies.under_way

    def moments(self) -> GradientMoments:
        """The moments."""
        self._copies.wait()
        sizes = self._sizes
        scales = [1 / (float(self._scale) * (size if self._summed else 1)) for size in (*sizes, sum(sizes))]
        sq_norms = [float(value) * scale**2 for value, scale in zip(self._sq_norms, scales, strict=False)]
        return moments_of_micro_batches(sizes, sq_norms, float(self._whole) * scales[-1] ** 2)
