"""Layers without a rule, measured in the operations in which their parameters meet samples: a
tracer is entered for the time in which the layer runs.

What cannot be traced is decided at a layer's first call, and run again sample by sample from then
on.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adabatch._types import Args, Kwargs
from adabatch.grad_sample.backward.verify import is_power_of_two
from adabatch.grad_sample.compat import compiles_frames
from adabatch.grad_sample.functional import ParameterTracer, TracedOp
from adabatch.grad_sample.functional.layer_tracer import LayerTracer
from adabatch.grad_sample.functional.tracer import Tap
from adabatch.grad_sample.taps.base import TapSite


class LayerTraces:
    """The traces of the layers that run now, and what they have shown.

    Args:
        parameters: all measured ones by name.
    """

    def __init__(self, parameters: dict[str, Tensor]):
        self._parameters = parameters
        self._running: list[tuple[TapSite, LayerTracer]] = []
        self._ended: LayerTracer | None = None

    def begin(
        self, site: TapSite, args: Args, kwargs: Kwargs, around: ParameterTracer | None, tap: Tap
    ) -> None:
        """Trace the call that begins, if that is possible.

        Args:
            around: what traces the model.
            tap: as for ParameterTracer.
        """
        self._ended = None
        if not site.in_operations or site.traced or compiles_frames():
            return
        if around is not None and not around.leaves_layer_to_tap:
            return
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        # Of a single one that is assumed, as where the layer is run again.
        carries = [True] if len(tensors) == 1 else [
            site.carries[index] for index in range(len(tensors)) if index in site.carries]
        if len(carries) != len(tensors) or site.unsettled:
            return
        sizes = {tensor.shape[:1] for tensor, each in zip(tensors, carries, strict=True) if each}
        if len(sizes) != 1 or sizes.pop()[0] < 2:  # of one sample all operations keep samples apart
            return
        own = {name: self._parameters[name] for name in site.parameters.values()}
        tracer = LayerTracer(own, [*zip(tensors, carries, strict=True)], tap)
        self._running.append((site, tracer))
        tracer.__enter__()

    def end(self, site: TapSite) -> None:
        """The call has ended, by an exception as well."""
        if self._running and self._running[-1][0] is site:
            self._ended = self._running.pop()[1]
            self._ended.leave()

    def take(
        self, site: TapSite, layer: nn.Module, output: object
    ) -> Sequence[TracedOp] | None:
        """The operations in which the call that has ended is measured; None where it must be run
        again, as all later calls of a layer that was traced."""
        tracer, self._ended = self._ended, None
        if tracer is None:
            return None
        walks = is_power_of_two(site.traces + 1)
        if tracer.measures(tree_flatten(output)[0], [*layer.parameters()], walks):
            site.traces += 1
            return tracer.operations
        site.in_operations = False
        return None
