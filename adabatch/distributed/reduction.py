"""One sum over the processes per step: records of this process's samples become those of the batch.

Legend: W processes, m_r of a step's m samples on process r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from adabatch.distributed.group import (CHECKSUM, HostGroup, checksum, checksums_agree,
                                        raise_divergence)
from adabatch.distributed.shard import BatchShard, OutputWeights
from adabatch.distributed.tensor_parallel import TensorParallel
from adabatch.estimators.moments import GradientMoments, centred_terms
from adabatch.estimators.totals import N_SUMS, Totals, between_processes, sums_of, totals_of

if TYPE_CHECKING:
    from adabatch.scheduler.record import StepRecord

TOLERANCE = 1e-6  # relative spread of ‖g‖² over processes whose gradients should be equal
UNREDUCED = (
    "the gradients are not the same in all {world} processes when the backward pass ends (‖g‖² "
    "differs by {spread:.2g} of its value): nothing averaged them. Wrap the model in "
    "torch.nn.parallel.DistributedDataParallel or fully_shard before training, and run a step's "
    "last backward pass outside no_sync()")


ELSEWHERE = "another process could not measure the step"


@dataclass
class _Sent:
    """What a step has sent: waits for the sum; this process's decision; ‖g‖² of replicas."""

    wait: Callable[[], list[float]]
    decision: Mapping[str, object]
    replicated: Tensor | None


class MomentReduction:
    """A stage of the scheduler's pipeline: Σ over the processes of loss, counts and moments.

    Each process adds its weighted part (see `sums_of`) and a checksum of its last decision to one
    small vector. Where loss or moments of one are not finite, or one could not measure the step
    (NotMeasured), all drop the measurement.

    Args:
        batches: accumulated batches per step.
        summed: the loss is a sum over the samples.
        decision: () -> what this process last decided, by name.
        parts: (parameter groups, parameters) with moments of their own: how long the vector is
            does not depend on whether this process has measured the step.
        over_samples: `Estimator.tensors_over_samples`, whose tensors are added up in place.
        between_processes: the moments hold one squared norm, that of the process's own gradient:
            T̂ is taken between processes.
        weights: on the model's outputs, held and removed with this.
        tensor_parallel: of a model that several processes hold together: what they add is divided
            by their number, except norms, of which each has a part.
        waits: the sum is waited for in the next step, so that an accelerator's step waits for none.

    Attributes:
        seconds: since the first step, by the mean of all processes' clocks.
    """

    def __init__(
        self, group: HostGroup, shard: BatchShard, *, batches: int, summed: bool,
        decision: Callable[[], Mapping[str, object]], parts: tuple[int, int],
        over_samples: Callable[[GradientMoments], list[Tensor]], between_processes: bool,
        weights: OutputWeights, tensor_parallel: TensorParallel | None, waits: bool,
    ):
        self.group, self.seconds = group, 0.0
        self._shard, self._batches, self._summed, self._decision = shard, batches, summed, decision
        self._between_processes, self._weights = between_processes, weights
        self._over_samples = over_samples
        self._n_sums = (parts[0] + 1) * N_SUMS + 2 * parts[1]
        self._tensor_parallel, self._waits = tensor_parallel, waits
        # By the step's number: loading a state drops records that were waiting here.
        self._pending: dict[int, _Sent] = {}

    def start(self, record: StepRecord) -> bool:
        """Send this process's numbers; whether the sum is to be waited for in the next step."""
        self.group.check_unchanged()
        record.settle()
        decision = {**self._decision(), "lr": record.lrs}
        compares = self._shard.compares_replicas and self._tensor_parallel is not None
        found = self._shard.replicated_sq_norms if compares else None
        vector = self._vector(record, decision)
        self._pending[record.step] = _Sent(self.group.start_sum(vector), decision, found)
        if not self._waits:
            self.finish(record)
        return self._waits

    def finish(self, record: StepRecord) -> None:
        """Put the sums into the record. RuntimeError on every process, where their decisions or
        their gradients differ."""
        sent = self._pending.pop(record.step)
        world = self.group.world_size
        loss, bad, rows, seconds, whole, square, missing, other_size, *rest = sent.wait()
        if not checksums_agree(rest[:CHECKSUM], world):
            raise_divergence(self.group, sent.decision)
        # So much that every process's part differs, whichever of them get one sample more.
        record.other_size_by = 2 * world - 1 if other_size else 0
        if missing:
            record.not_measured = record.not_measured or ELSEWHERE
            record.moments = None
        if record.moments is not None:  # on all processes
            if self._tensor_parallel is not None and sent.replicated is not None:
                checked = self._tensor_parallel.check_reduced(*sent.replicated.tolist())
                self._shard.compares_replicas = not checked
            self.group.sum_tensors(self._over_samples(record.moments))
        if whole and not (bad or missing):
            mean = whole / world
            spread = math.sqrt(max(0.0, square / world - mean**2)) / mean
            if spread > TOLERANCE:
                raise RuntimeError(UNREDUCED.format(world=world, spread=spread))
        self.seconds += seconds / world
        record.seconds = math.nan if math.isnan(record.seconds) else seconds / world
        record.loss = math.nan if bad else loss
        if record.moments is not None:
            sums = rest[CHECKSUM:]
            record.moments = self._global(record.moments, sums, round(rows), bool(bad))

    def remove(self) -> None:
        """Take the weights off the model."""
        self._weights.remove()

    def _vector(self, record: StepRecord, decision: Mapping[str, object]) -> list[float]:
        moments, loss, replica = record.moments, float(record.loss), self._shard.replica
        bad = not math.isfinite(loss) or (moments is not None and not moments.is_finite)
        fraction = self._shard.fraction_of(self._batches) if moments is None else moments.share
        own_loss = 0.0 if bad else (loss if self._summed else loss * fraction) / replica
        rows = 0.0 if moments is None else moments.batch_size * moments.share / replica
        seconds = 0.0 if math.isnan(record.seconds) else record.seconds
        # A gradient that every process holds whole must be the same on each.
        whole = 0.0
        if moments is not None and not bad and not self._shard.has_shards:
            whole = moments.grad_sq_norm * self.group.world_size
        sums = [] if moments is None else _sums(moments, replica)
        if bad or record.not_measured:
            sums = [0.0] * (len(sums) or self._n_sums)
        head = [own_loss, float(bad), rows, seconds, whole, whole**2,
                float(bool(record.not_measured)), float(record.other_size_by)]
        return [*head, *checksum(tuple(decision.values())), *sums]

    def _global(self, moments: GradientMoments, sums: list[float], m: int, bad: bool
                ) -> GradientMoments:
        """The moments of the whole batch, with NaN where they cannot be used."""
        groups = sorted(moments.by_group)
        own = [moments, *(moments.by_group[group] for group in groups)]
        parts = [self._whole(part, sums[k * N_SUMS :], m, bad) for k, part in enumerate(own)]
        whole = replace(parts[0], by_group=dict(zip(groups, parts[1:], strict=True)))
        if not moments.parameter_grad_sq_norms or whole.totals is None:
            return whole
        names, rest = list(moments.by_parameter), sums[(1 + len(groups)) * N_SUMS :]
        sq_norms = {name: math.nan if bad else rest[2 * k] for k, name in enumerate(names)}
        # The second sum is that of the terms without what ‖g_k‖² adds to each: c_i w_i² with
        # inner_products, otherwise -1.
        added = sums[4] / m if moments.inner_products is not None else -1.0
        terms = {name: rest[2 * k + 1] / m + added * sq_norms[name] for k, name in enumerate(names)}
        totals = replace(whole.totals, parameter_terms=terms)
        return replace(whole, parameter_grad_sq_norms=sq_norms, totals=totals)

    def _whole(self, moments: GradientMoments, sums: list[float], m: int, bad: bool
               ) -> GradientMoments:
        if bad or not m:
            empty = Totals(0, math.nan)
            return replace(moments, batch_size=m, grad_sq_norm=math.nan, totals=empty)
        has_inner_products = moments.inner_products is not None
        grad_sq_norm, totals = totals_of(sums[:N_SUMS], m, has_inner_products)
        if self._between_processes:
            totals = between_processes(totals, grad_sq_norm, m)
        return replace(moments, batch_size=m, grad_sq_norm=grad_sq_norm, totals=totals)


def _sums(moments: GradientMoments, replica: int) -> list[float]:
    """Of the step, of each group, and two numbers of each parameter that is measured separately."""
    parts = [moments, *(moments.by_group[group] for group in sorted(moments.by_group))]
    sums = [value for part in parts for value in sums_of(part, moments.share, replica)]
    rows = moments.batch_size * moments.share
    for name, norms in moments.by_parameter.items() if moments.parameter_grad_sq_norms else ():
        terms = norms.double()
        if moments.parameter_inner_products:
            products = moments.parameter_inner_products[name]
            terms, _ = centred_terms(replace(moments, sq_norms=norms, inner_products=products))
            terms = terms if moments.corrections is None else moments.corrections * terms
        sums += [moments.parameter_grad_sq_norms[name], float(terms.mean()) * rows]
    return sums
