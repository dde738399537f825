"""The cost model: what measuring costs, the same on every process. It chooses the kind of tap, and
from a budget the samples and the interval.

The unit is one multiply-add of a large matrix product. What a layer costs is registered with its
rule (`cost=` of register_grad_sampler), what a statistic adds in `Statistic.cost`. Activations, the
loss and what is in no measured layer are missing from `training`, so the estimated share of a real
step tends to be too high. The constants are of two cores with AVX-512 in float32 (30 to 60
multiply-adds a nanosecond); they need not be exact: choices differ by factors.

Legend: N samples in the batch, S measured, T positions (of a sequence or an image), P numel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from adabatch.grad_sample.registry import find_grad_sampler

if TYPE_CHECKING:
    from adabatch.interfaces import Statistic

# One pass over an element in memory (read, and write in part), in multiply-adds.
PASS = 16.0
# Python, dispatch and small tensors of one layer in one step: of its tap, and of the plain step.
CALL, PLAIN_CALL = 4e6, 1.5e7
# Per step: gathering the results and computing the moments; loop, optimizer and loader.
STEP, PLAIN_STEP = 2e7, 4e7
RUN_AGAIN_CALLS = 16  # of torch.func, in units of CALL
# Measured steps over what is counted here, and what every step pays besides (scheduler, colder
# caches): fitted to the five models of examples/benchmarks/overhead.py, whose shares of .08, .24,
# .25, .13 and .04 come out as .10, .38, .22, .16 and .05.
MARGIN, FLOOR = 1.2, 0.02
UNSEEN_SHARE = 0.4  # of a step, for all samples, where a compiled graph hides the layers' shapes
# Longer intervals make the controller slow, fewer samples make its input noisy.
LONGEST_INTERVAL, FEWEST_SAMPLES, LAST_RESORT = 20, 8, 100


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one layer.

    Attributes:
        training: of a plain step, per sample of the batch.
        passthrough: of a tap that only reads, per measured sample.
        fused: of a fused backward pass in addition to `training`, per sample of the batch.
        product: of a product of one sample's gradient with a tensor of the parameters' shape.
        numel: elements of one sample's gradient.
        calls: in units of CALL.
    """

    training: float
    passthrough: float
    fused: float | None = None
    product: float = 0.0
    numel: float = 0.0
    calls: int = 1

    def measuring(
        self, samples: int, measured: int, statistics: Collection[Statistic] = ()
    ) -> float:
        """The cheaper tap's cost in one step without CALL, of N samples and S measured ones.

        Example:
            >>> LayerCost(training=30.0, passthrough=12.0, fused=1.0).measuring(8, 8)
            8.0
        """
        def added(fused: bool) -> float:
            return sum(each.cost(self, samples, measured, fused) for each in statistics)

        passthrough = measured * self.passthrough + added(False)
        can_fuse = all(each.can_fuse for each in statistics) and (
            measured >= samples or not any(each.needs_second_moment for each in statistics))
        if self.fused is None or not can_fuse:
            return passthrough
        return min(passthrough, samples * self.fused + added(True))

    def fused_is_cheaper(self, samples: int, measured: int) -> bool:
        """Whether a fused backward pass costs less."""
        return self.fused is not None and samples * self.fused < measured * self.passthrough


@dataclass(frozen=True, repr=False)
class Measurement:
    """`samples` of each measured backward pass (None: all) are measured, at one step in `every`,
    for an expected `share` of the training time (NaN: not known yet); `clock`: the share that the
    clock has shown of late, the scheduler's own time included (NaN: not known)."""

    samples: int | None
    every: int
    share: float = math.nan
    clock: float = math.nan

    def __str__(self) -> str:
        samples = "all samples" if self.samples is None else f"{self.samples} samples"
        steps = "at every step" if self.every == 1 else f"at one step in {self.every}"
        known = "" if math.isnan(self.share) else f", {self.share:.1%} of the time"
        shown = "" if math.isnan(self.clock) else f" ({self.clock:.1%} by the clock)"
        return f"{samples} {steps}{known}{shown}"

    def __repr__(self) -> str:
        return f"Measurement({self})"


def elementwise_cost(
    layer: nn.Module | None, input_shape: Sequence[int], output_shape: Sequence[int]
) -> LayerCost:
    """A layer that does a pass or two over its elements: norms, embeddings, activations."""
    elements = elements_per_sample(input_shape, output_shape)
    passes = 2 * PASS * elements
    return LayerCost(passes, passes, product=PASS * elements, numel=elements)


def run_again_cost(
    layer: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]
) -> LayerCost:
    """A layer that is run again sample by sample, for about twice its step."""
    numel = sum(parameter.numel() for parameter in layer.parameters())
    products = 3 * numel * max(1.0, math.prod(output_shape[1:-1]))
    training = products + 2 * PASS * elements_per_sample(input_shape, output_shape)
    return LayerCost(training, 2 * training, product=PASS * numel, numel=numel,
                     calls=RUN_AGAIN_CALLS)


def operation_cost(
    output_shape: Sequence[int], weight: int = 0, run_again: bool = True
) -> LayerCost:
    """An operation in which a traced parameter meets samples.

    Args:
        output_shape: [N, ...].
        weight: elements of the matrix that it multiplies with a fused backward pass, as a Linear
            layer does; 0 for any other operation.
        run_again: it has no rule.
    """
    elements = elements_per_sample(output_shape)
    if weight:
        product = weight * math.prod(output_shape[1:-1])
        norms = PASS * elements + 2 * PASS * weight
        return LayerCost(3 * product + 4 * PASS * elements, product + norms, norms, product, weight)
    passes = 4 if run_again else 2
    return LayerCost(2 * PASS * elements, passes * PASS * elements, product=PASS * elements,
                     numel=elements, calls=RUN_AGAIN_CALLS if run_again else 2)


def elements_per_sample(*shapes: Sequence[int]) -> float:
    """Of all tensors of these shapes [N, ...]."""
    return sum(math.prod(shape) for shape in shapes) / max(1, shapes[-1][0])


def layer_cost(
    layer: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int],
    run_again: bool = False,
) -> LayerCost:
    """The cost of a layer from its shapes [N, ...], as registered with its rule.

    Example:
        >>> import adabatch.grad_sample.layers.linear
        >>> tokens = layer_cost(nn.Linear(64, 64), (8, 128, 64), (8, 128, 64))
        >>> tokens.fused_is_cheaper(16, 16), tokens.fused_is_cheaper(16, 1)
        (True, False)
    """
    if run_again:
        return run_again_cost(layer, input_shape, output_shape)
    sampler = find_grad_sampler(layer)
    cost = None if sampler is None else sampler.cost
    return (cost or elementwise_cost)(layer, input_shape, output_shape)


def called_shapes(
    inputs: Iterable[object], output: Tensor, n_samples: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A call's first input and output as shapes [N, ...] for layer_cost, of any layout."""
    size = next((leaf.numel() for leaf in inputs if isinstance(leaf, Tensor)), 0)
    width = output.shape[-1] if output.dim() > 1 else 1
    samples = max(1, n_samples)
    positions = output.numel() // max(1, samples * width)
    return (samples, size // samples), (samples, positions, width)


@dataclass(frozen=True)
class StepCost:
    """Multiply-adds of a step: a plain one, and what measuring its norms and `statistics` adds.
    `numel` counts the elements of all measured parameters."""

    layers: tuple[LayerCost, ...]
    numel: int
    statistics: tuple[Statistic, ...] = ()

    def plain(self, samples: int) -> float:
        """Forward and backward pass, and the optimizer's over parameters and gradients."""
        layers = samples * sum(layer.training for layer in self.layers)
        return layers + PLAIN_CALL * len(self.layers) + PLAIN_STEP + 3 * PASS * self.numel

    def measuring(self, samples: int, measured: int | None = None) -> float:
        """What measuring `measured` samples (None: all) adds; ‖g‖² is a pass over memory."""
        measured = samples if measured is None else min(measured, samples)
        layers = sum(layer.measuring(samples, measured, self.statistics) + CALL * layer.calls
                     for layer in self.layers)
        return layers + STEP + 2 * PASS * self.numel

    def share(self, samples: int, measured: int | None = None) -> float:
        """MARGIN · measuring / plain + FLOOR; a constant where no layers were seen."""
        if not self.layers:
            return UNSEEN_SHARE * (
                1.0 if measured is None else min(1.0, measured / max(1, samples)))
        return MARGIN * self.measuring(samples, measured) / self.plain(samples) + FLOOR


def step_cost(
    seen: Iterable[tuple[nn.Module, Sequence[int], Sequence[int], bool]],
    numel: int,
    operations: Iterable[tuple[Sequence[int], int, bool]] = (),
    statistics: Iterable[Statistic] = (),
) -> StepCost:
    """The cost of a model from what its taps saw: the arguments of layer_cost, and the output
    shapes of the operations in which traced parameters meet samples."""
    layers = (*(layer_cost(*each) for each in seen),
              *(operation_cost(*each) for each in operations))
    return StepCost(layers, numel, tuple(statistics))


def within_budget(cost: StepCost, samples: int, overhead: float) -> Measurement:
    """What to measure of steps of N samples for an expected cost of at most the share `overhead`
    (above 0) of a step.

    At equal cost, all samples at a longer interval give more information than a few at every step:
    fixed costs are paid less often, the choice of rows adds no noise, and fused backward passes
    need all rows. Fewer samples are taken only beyond LONGEST_INTERVAL steps.

    Example:
        >>> cost = StepCost((LayerCost(training=1e9, passthrough=2e8),), numel=0)
        >>> within_budget(cost, 1000, 0.05)  # doctest: +ELLIPSIS
        Measurement(all samples at one step in 6, 4.3% of the time)
        >>> within_budget(cost, 1000, 0.005).samples
        333
    """
    def interval(measured: int | None) -> int:
        return max(1, math.ceil(cost.share(samples, measured) / overhead - 1e-9))

    def plan(measured: int | None, every: int) -> Measurement:
        return Measurement(measured, every, cost.share(samples, measured) / every)

    every = interval(None)
    if every <= LONGEST_INTERVAL or samples <= FEWEST_SAMPLES:
        return plan(None, min(every, LAST_RESORT))
    low, high = FEWEST_SAMPLES, samples
    while low < high:
        middle = (low + high + 1) // 2
        fits = interval(middle) <= LONGEST_INTERVAL
        low, high = (middle, high) if fits else (low, middle - 1)
    return plan(low, min(max(LONGEST_INTERVAL, interval(low)), LAST_RESORT))
