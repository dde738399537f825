"""Checks of a running training loop: gradients that hold something else, parameters nobody
measures, a loss scale nobody passed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch._transfers import HostCopies
from adabatch.estimators.moments import GradientMoments
from adabatch.interfaces import Estimator

TOLERANCE = 0.01  # of the mean squared norm: far above float32's rounding
SHAPES_SHOWN = 3
WATCHED_STEPS, WATCHED_GRADIENTS, LEAST_SCALE = 3, 4, 16.0
UNKNOWN_SCALER = (
    "the gradients of this step were divided by {scale:.6g} between loss.backward() and the "
    "optimizer's step, as a GradScaler does that was not passed to adabatch. Gradients are "
    "measured while they carry its scale, so that their variance would be too large by its square. "
    "Pass grad_scaler=scaler to adabatch.wrap or BatchSizeScheduler; for a scale that never "
    "changes, scheduler.step(loss, loss_scale=...) is enough"
)


class GradientNormCheck:
    """Warns once where ‖g‖² is larger than any gradient of these samples can be.

    With all samples measured and equal weights mean ‖g_i‖² >= ‖g‖², since g is the mean of the
    g_i. A gradient that is longer holds something else as well.

    Example:
        >>> check = GradientNormCheck()
        >>> check.exceeds_bound(GradientMoments(2, sq_norms=torch.ones(2), grad_sq_norm=4.0))
        True
    """

    def __init__(self) -> None:
        self._warned = False

    def exceeds_bound(self, moments: GradientMoments) -> bool:
        """Whether the step's gradient is too long for its samples."""
        size = moments.batch_size
        if moments.n_measured != size or moments.inner_products is not None:
            return False
        if moments.effective_batch_size not in (None, size):
            return False
        return moments.grad_sq_norm > (1 + TOLERANCE) * moments.mean_sq_norm

    def update(self, moments: GradientMoments) -> None:
        """Take the moments of a step."""
        if self._warned or not self.exceeds_bound(moments):
            return
        self._warned = True
        warnings.warn(
            f"the gradient's squared norm, {moments.grad_sq_norm:.3g}, is above the samples' mean, "
            f"{moments.mean_sq_norm:.3g}, which is impossible for a mean of their gradients: it "
            "holds something else. Call optimizer.zero_grad() before each step's backward pass; "
            "put penalties on the weights into the optimizer's weight_decay. Until then the "
            "measured variance is too small",
            stacklevel=4,  # the caller of scheduler.step()
        )


class UntrackedParameters:
    """Warns once about parameters that are stepped but not measured, because they were frozen or
    not in the optimizer when measuring began. Parameters frozen later stay tracked.

    Args:
        optimizer: whose parameters are checked.
        measured: what the estimator measures; empty where that is not known: nothing is checked.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.bias.requires_grad_(False) is layer.bias
        True
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> untracked = UntrackedParameters(optimizer, [layer.weight])
        >>> untracked.found()
        []
        >>> layer.bias.requires_grad_(True) is untracked.found()[0]
        True
    """

    def __init__(self, optimizer: Optimizer, measured: Iterable[Tensor]):
        known = {id(parameter) for parameter in measured}
        self._optimizer, self._checks = optimizer, bool(known)
        # Trainable but not measured from the start: left out on purpose, by ignore= for instance.
        self._known = known | {id(parameter) for parameter in self._stepped()}

    def found(self) -> list[Tensor]:
        """The parameters that came too late."""
        if not self._checks:
            return []
        return [each for each in self._stepped() if id(each) not in self._known]

    def warn(self, stacklevel: int) -> None:
        """Warn about those found, the first time there are any.

        Args:
            stacklevel: as in warnings.warn, counted from the caller of this method.
        """
        late = self.found()
        if not late:
            return
        self._checks = False
        shapes = ", ".join(str(list(parameter.shape)) for parameter in late[:SHAPES_SHOWN])
        more = ", …" if len(late) > SHAPES_SHOWN else ""
        warnings.warn(
            f"{len(late)} parameters (of shapes {shapes}{more}) are trained but not measured: they "
            "were unfrozen, or added to the optimizer, after adabatch was attached, so that "
            "variance and gradient norm are those of the others alone. Attach while everything "
            "that will be trained requires grad and is in the optimizer, and freeze afterwards; or "
            "call scheduler.remove() and adabatch.wrap again",
            stacklevel=stacklevel + 1,
        )

    def _stepped(self) -> Iterable[Tensor]:
        groups = self._optimizer.param_groups
        return (each for group in groups for each in group["params"] if each.requires_grad)


class GradScalerDetector:
    """Detects a GradScaler that nobody passed: it divides all gradients by one power of two,
    2^k >= 16, between the end of the backward pass and the optimizer's step.

    The norms of a few gradients are compared at the first three measured steps; then its hooks are
    removed. Clipping gives another factor, zeroed gradients none.

    Example:
        >>> GradScalerDetector.scale_in([65536.0, 65536.0]), GradScalerDetector.scale_in([20.0])
        (65536.0, None)
    """

    def __init__(self, optimizer: Optimizer, estimator: Estimator):
        self._callbacks, self._left = estimator.on_backward_end, WATCHED_STEPS
        self._parameters = list(estimator.parameters.values())
        self._norms: dict[Tensor, Tensor] = {}
        self._ratios: list[tuple[HostCopies, list[Tensor]]] = []
        self._ready: list[HostCopies] = []
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self._callbacks.append(self._on_backward_end)

    def check(self) -> None:
        """Look at the steps seen so far.

        Raises:
            RuntimeError: a scaler divided their gradients.
        """
        waiting, self._ratios = self._ratios, []
        for copies, ratios in waiting:
            if copies.under_way and copies not in self._ready:
                self._ready.append(copies)  # read at the next call, when the copies have arrived
                self._ratios.append((copies, ratios))
                continue
            copies.wait()
            scale = self.scale_in([float(ratio) for ratio in ratios])
            if scale is not None:
                raise RuntimeError(UNKNOWN_SCALER.format(scale=scale))

    @staticmethod
    def scale_in(ratios: list[float]) -> float | None:
        """The power of two that all ratios are, if it is at least 16; None otherwise."""
        first = ratios[0] if ratios else 0.0
        if not LEAST_SCALE * 0.99 < first < math.inf:
            return None
        scale = 2.0 ** round(math.log2(first))
        return scale if all(abs(ratio / scale - 1) < 1e-5 for ratio in ratios) else None

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()
        if self._on_backward_end in self._callbacks:
            self._callbacks.remove(self._on_backward_end)

    def _on_backward_end(self) -> None:
        dense = (each for each in self._parameters
                 if type(each.grad) is Tensor and each.grad.layout is torch.strided)
        few = [parameter for parameter, _ in zip(dense, range(WATCHED_GRADIENTS), strict=False)]
        self._norms = {parameter: _norm(parameter) for parameter in few}

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        norms, self._norms = self._norms, {}
        if not norms or torch.compiler.is_compiling():
            return
        copies, ratios = HostCopies(), []
        fused = getattr(optimizer, "grad_scale", None)  # where a GradScaler leaves it to the step
        if isinstance(fused, Tensor):
            ratios = [fused]
        elif all(parameter.grad is not None for parameter in norms):
            ratios = [norms[each] / _norm(each) for each in norms]
        self._ratios.append((copies, [copies.add(ratio) for ratio in ratios]))
        self._left -= 1
        if self._left <= 0:
            self.remove()


def _norm(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return torch.linalg.vector_norm(parameter.grad.detach().double())
