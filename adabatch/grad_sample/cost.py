"""What measuring costs: one deterministic model, the same on every process, that chooses the kind of tap, and from a budget the samples and the interval.

Legend: N samples in the batch, S measured, T positions (of a sequence or an image), I in, O out, C channels, K kernel, P numel of a parameter.

The unit is one multiply-add of a large matrix product. Per sample of the batch, with R = I for Linear and C K for convolutions:

    training    3 T R O                          forward, input gradient, weight gradient; 2 PASS (T I + T O) for the elements
    listening   Gram T² (R + O), or T R O + 2 PASS R O; T = 1: PASS (I + O)
    taking      Gram T² (R + O), or 2 PASS R O; (f − 1) T R O more for convolutions, f the time of per-sample weight gradients over that of one for the batch
    others      2 PASS elements of the input; layers run again sample by sample: 2 × training
    inner_products        listening, and T R O more: the factors are kept, and multiplied with the gradient when it is known
    squares     listening, and T R O + 2 PASS R O more (R O for T = 1); taking, and PASS R O more: the second moment

and per step STEP, CALL (Python and dispatch) for each layer, RUN_AGAIN_CALLS of them for one that is run again and for an operation on a traced parameter, and
2 PASS P for ‖g‖², which comes from main memory. Everything that is not in a measured layer (attention, activations, the loss) is left out of `training`, so
the share that measuring takes of a real step tends to be lower than the model says.

The constants are of two cores with AVX-512 in float32, where 30 to 60 multiply-adds a nanosecond were measured; examples/benchmarks/overhead.py shows the
model's share beside the measured one. They need not be right to the percent: choices differ by factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# One pass over an element in memory (read, and write in part), in multiply-adds.
PASS = 16.0
# What is measured beside norms and needs Σ g_i² of every layer.
SQUARES = frozenset({"second_moment", "preconditioned_trace"})
# Python, dispatch and small tensors of one layer's tap in one step; the same layer's share of a plain step.
CALL, PLAIN_CALL = 4e6, 1.5e7
# Gathering the results of a step and working out its moments; the loop, the optimizer and the loader of a plain step.
STEP, PLAIN_STEP = 2e7, 4e7
# torch.func costs that many calls.
RUN_AGAIN_CALLS = 16
# Per-sample weight gradients of a convolution over one for the batch.
CONVOLUTION_FACTOR = 1.4
# Whole measured steps over the products and passes counted here, and what every step pays besides (the scheduler's own work, colder caches): fitted to the
# five models of the benchmark, whose shares of .08, .24, .25, .13 and .04 come out as .10, .26, .32, .16 and .05.
MARGIN, FLOOR = 1.2, 0.02
# Where the layers' shapes are not seen (inside a compiled graph): measuring all samples, as a share of the step.
UNSEEN_SHARE = 0.4
# Longer intervals make the controller slow, fewer samples make its input noisy.
LONGEST_INTERVAL, FEWEST_SAMPLES, LAST_RESORT = 20, 8, 100


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one layer.

    Attributes:
        training: of a plain step, per sample of the batch.
        listening: of a listening tap, per measured sample.
        taking: of a taking tap, per sample of the batch; None where there is none.
        product: of a product of one sample's gradient with a tensor of the parameters' shape.
        numel: elements of one sample's gradient.
        calls: in units of CALL.
    """

    training: float
    listening: float
    taking: float | None = None
    product: float = 0.0
    numel: float = 0.0
    calls: int = 1

    def measuring(self, samples: int, measured: int, measures: frozenset[str] = frozenset()) -> float:
        """The cheaper tap's cost in one step, CALL apart.

        Args:
            samples, measured: N and S.
            measures: 'inner_products', 'second_moment': what is measured beside norms.

        Example:
            >>> LayerCost(training=30.0, listening=12.0, taking=1.0).measuring(samples=8, measured=8)
            8.0
        """
        squares = not measures.isdisjoint(SQUARES)
        listening, taking = self.listening, self.taking
        if "inner_products" in measures:
            listening += self.product
        if squares:
            listening += self.product + (2 * PASS * self.numel if self.product > self.numel else 0.0)
        if taking is None or "inner_products" in measures or (squares and measured < samples):
            return measured * listening
        return min(measured * listening, samples * (taking + PASS * self.numel * squares))

    def takes(self, samples: int, measured: int) -> bool:
        """Whether a taking tap costs less."""
        return self.taking is not None and samples * self.taking < measured * self.listening


@dataclass(frozen=True)
class Measurement:
    """What is measured of a run: `samples` of each measured backward pass (None: all), at one step in `every`; `share` of the training time is expected."""

    samples: int | None
    every: int
    share: float = math.nan


def layer_cost(layer: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int], run_again: bool = False) -> LayerCost:
    """The cost of a layer from its shapes, [N, ...] each.

    Example:
        >>> tokens, vectors = layer_cost(nn.Linear(64, 64), (8, 128, 64), (8, 128, 64)), layer_cost(nn.Linear(64, 64), (8, 64), (8, 64))
        >>> tokens.takes(16, 16), tokens.takes(16, 1), vectors.takes(8, 8)
        (True, False, False)
    """
    samples = max(1, output_shape[0])
    elements = (math.prod(input_shape) + math.prod(output_shape)) / samples
    if isinstance(layer, nn.Linear):
        positions = math.prod(output_shape) / samples / layer.out_features
        return _product_cost(positions, layer.in_features, layer.out_features, 1.0, elements)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        positions = math.prod(output_shape[2:])
        return _product_cost(positions, math.prod(layer.weight.shape[1:]), layer.out_channels, CONVOLUTION_FACTOR, elements)
    numel = sum(parameter.numel() for parameter in layer.parameters())
    if run_again:
        training = 3 * numel * max(1.0, math.prod(output_shape[1:-1])) + 2 * PASS * elements
        return LayerCost(training, 2 * training, product=PASS * numel, numel=numel, calls=RUN_AGAIN_CALLS)
    return LayerCost(2 * PASS * elements, 2 * PASS * elements, product=PASS * elements, numel=elements)


def called_shapes(inputs: Iterable[object], output: Tensor, n_samples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a call's first input tensor and of its output as layer_cost reads them, [N, ...], wherever their samples lie."""
    size = next((leaf.numel() for leaf in inputs if isinstance(leaf, Tensor)), 0)
    width = output.shape[-1] if output.dim() > 1 else 1
    samples = max(1, n_samples)
    return (samples, size // samples), (samples, output.numel() // max(1, samples * width), width)


def operation_cost(output_shape: Sequence[int]) -> LayerCost:
    """The cost of an operation that meets a traced parameter, from its output's shape [N, ...]: it is run again sample by sample."""
    elements = math.prod(output_shape) / max(1, output_shape[0])
    return LayerCost(2 * PASS * elements, 4 * PASS * elements, product=PASS * elements, numel=elements, calls=RUN_AGAIN_CALLS)


def _product_cost(positions: float, width_in: int, width_out: int, factor: float, elements: float) -> LayerCost:
    product, grad = positions * width_in * width_out, width_in * width_out
    training = 3 * product + 2 * PASS * elements
    if positions <= 1 and factor == 1:
        return LayerCost(training, PASS * (width_in + width_out), product=product, numel=grad)
    gram = positions**2 * (width_in + width_out) if factor == 1 else math.inf  # convolutions have no Gram form: their windows would be copied
    passes = 2 * PASS * grad
    bias = PASS * positions * width_out
    listening, taking = bias + min(gram, factor * product + passes), bias + min(gram, (factor - 1) * product + passes)
    return LayerCost(training, listening, taking, product=factor * product, numel=grad)


@dataclass(frozen=True)
class StepCost:
    """Multiply-adds of a step with N samples: a plain one, and what measuring adds.

    Attributes:
        layers: of the measured layers.
        numel: elements of all measured parameters.
        measures: 'inner_products', 'second_moment'.
    """

    layers: tuple[LayerCost, ...]
    numel: int
    measures: frozenset[str] = frozenset()

    def plain(self, samples: int) -> float:
        """Forward, backward, and the optimizer's pass over parameters and gradients."""
        return samples * sum(layer.training for layer in self.layers) + PLAIN_CALL * len(self.layers) + PLAIN_STEP + 3 * PASS * self.numel

    def measuring(self, samples: int, measured: int | None = None) -> float:
        """What measuring `measured` samples (None: all) adds."""
        measured = samples if measured is None else min(measured, samples)
        layers = sum(layer.measuring(samples, measured, self.measures) + CALL * layer.calls for layer in self.layers)
        return layers + STEP + 2 * PASS * self.numel + 2 * PASS * self.numel * (not self.measures.isdisjoint(SQUARES))

    def share(self, samples: int, measured: int | None = None) -> float:
        """MARGIN · measuring/plain + FLOOR; without seen layers a constant."""
        if not self.layers:
            return UNSEEN_SHARE if measured is None else UNSEEN_SHARE * min(1.0, measured / max(1, samples))
        return MARGIN * self.measuring(samples, measured) / self.plain(samples) + FLOOR


def within_budget(cost: StepCost, samples: int, overhead: float) -> Measurement:
    """What to measure so that the expected cost is at most the share `overhead` of a step.

    For equal cost, all samples at a longer interval say more than a few at every step: fixed costs are paid less often, the trace of a whole batch has no
    noise from the choice of rows, and taking taps need all rows anyhow. Only where that would need more than LONGEST_INTERVAL steps are fewer samples taken.

    Args:
        cost: of the model.
        samples: N of a step.
        overhead: the share, above 0.

    Example:
        >>> cost = StepCost((LayerCost(training=1e9, listening=2e8),), numel=0)
        >>> within_budget(cost, 1000, 0.05)  # doctest: +ELLIPSIS
        Measurement(samples=None, every=6, share=0.043...)
        >>> within_budget(cost, 1000, 0.005).samples
        333
    """
    every = _interval(cost.share(samples), overhead)
    if every <= LONGEST_INTERVAL or samples <= FEWEST_SAMPLES:
        return _measurement(cost, samples, None, min(every, LAST_RESORT))
    low, high = FEWEST_SAMPLES, samples
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _interval(cost.share(samples, middle), overhead) <= LONGEST_INTERVAL else (low, middle - 1)
    return _measurement(cost, samples, low, min(max(LONGEST_INTERVAL, _interval(cost.share(samples, low), overhead)), LAST_RESORT))


def _measurement(cost: StepCost, samples: int, measured: int | None, every: int) -> Measurement:
    return Measurement(measured, every, cost.share(samples, measured) / every)


def _interval(share: float, overhead: float) -> int:
    return max(1, math.ceil(share / overhead - 1e-9))


def step_cost(
    seen: Iterable[tuple[nn.Module, Sequence[int], Sequence[int], bool]],
    numel: int,
    operations: Iterable[Sequence[int]] = (),
    measures: frozenset[str] = frozenset(),
) -> StepCost:
    """The cost of a model from what its taps saw.

    Args:
        seen: (layer, input shape, output shape, whether it is run again sample by sample).
        numel: elements of all measured parameters.
        operations: output shapes of operations that meet a traced parameter.
        measures: 'inner_products', 'second_moment'.
    """
    return StepCost((*(layer_cost(*each) for each in seen), *map(operation_cost, operations)), numel, measures)
