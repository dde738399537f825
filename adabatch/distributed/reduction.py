"""One sum over the processes a step: the scheduler's observations of this process's samples become those of the whole batch.

Legend: W processes, m_r of a step's m samples on process r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from adabatch.distributed.agreement import CHECKSUM, agree, checksum, raise_divergence
from adabatch.distributed.group import Ranks
from adabatch.distributed.shard import BatchShard
from adabatch.distributed.tensor_parallel import TensorParallel
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.totals import N_SUMS, Totals, between_processes, sums_of, totals_of
from adabatch.scheduler.pipeline import StepRecord

TOLERATED = 1e-6  # relative spread of ‖g‖² over processes whose gradients are said to be the same
UNREDUCED = (
    "the gradients are not the same in all {world} processes when the backward pass ends (‖g‖² differs by {spread:.2g} of its value): nothing averaged them. "
    "Wrap the model in torch.nn.parallel.DistributedDataParallel or fully_shard before training, and run a step's last backward pass outside no_sync()"
)


class GlobalSums:
    """A stage of the scheduler's pipeline: Σ over the processes of each one's loss, counts and moments, in one small vector a step.

    Each adds its weighted part (see `sums_of`), so that all have the same GradientMoments of the whole batch, and with it, a checksum of its last decision.
    Where loss or moments of one process are not finite, the measurement is dropped on all.

    Args:
        ranks: the processes.
        sharing: this one's shares.
        batches: accumulated batches per step.
        summed: the loss is a sum over the samples.
        decision: () -> what this process last decided, by name.
        of_processes: the moments hold one squared norm, that of the process's own gradient: T̂ is taken between processes.
        weights: what weighs the model's outputs, kept and removed with this.
        tensor_parallel: of a model that several processes hold together: what they add up to is divided by their number, but for norms, of which each has a
            part.
        waits: the sum is waited for in the next step, so that nothing on an accelerator's step path waits for other processes.

    Attributes:
        seconds: since the first step, by the mean of all processes' clocks.
    """

    def __init__(
        self,
        ranks: Ranks,
        sharing: BatchShard,
        *,
        batches: int,
        summed: bool,
        decision: Callable[[], Mapping[str, Any]],
        of_processes: bool = False,
        weights: Any = None,
        tensor_parallel: TensorParallel | None = None,
        waits: bool = False,
    ):
        self.ranks, self.seconds = ranks, 0.0
        self._sharing, self._batches, self._summed, self._decision = sharing, batches, summed, decision
        self._of_processes, self._weights, self._waits = of_processes, weights, waits
        self._tensor_parallel = tensor_parallel
        # By number of the step: a loaded state drops observations that were waiting here.
        self._under_way: dict[int, tuple[Any, Mapping[str, Any]]] = {}

    def start(self, observation: StepRecord) -> bool:
        """Send this process's numbers on their way; whether the sum is to be waited for in the next step."""
        self.ranks.check_unchanged()
        observation.settle()
        moments, decision = observation.moments, {**self._decision(), "lr": observation.lrs}
        if self._sharing.compares and moments is not None:
            self._sharing.compares = not self._tensor_parallel.check_reduced(*self._sharing.alike.tolist())
        if moments is not None:
            self.ranks.sum_tensors(list(moments.second_moment.values()))
        self._under_way[observation.step] = self.ranks.start_sum(self._vector(observation, decision)), decision
        if not self._waits:
            self.finish(observation)
        return self._waits

    def finish(self, observation: StepRecord) -> None:
        """Put the sums into the observation.

        Raises:
            RuntimeError: on every process, where their decisions or their gradients differ.
        """
        wait, decision = self._under_way.pop(observation.step)
        world = self.ranks.world_size
        loss, bad, rows, seconds, whole, square, *rest = wait()
        if not agree(rest[:CHECKSUM], world):
            raise_divergence(self.ranks, decision)
        if whole and not bad:
            spread = math.sqrt(max(0.0, square / world - (whole / world) ** 2)) / (whole / world)
            if spread > TOLERATED:
                raise RuntimeError(UNREDUCED.format(world=world, spread=spread))
        self.seconds += seconds / world
        observation.seconds = seconds / world if observation.seconds == observation.seconds else math.nan
        observation.loss = math.nan if bad else loss
        if observation.moments is not None:
            observation.moments = self._global(observation.moments, rest[CHECKSUM:], round(rows), bool(bad))

    def remove(self) -> None:
        """Take the weights off the model."""
        if self._weights is not None:
            self._weights.remove()

    def _vector(self, observation: StepRecord, decision: Mapping[str, Any]) -> list[float]:
        moments, loss = observation.moments, observation.loss
        bad = not math.isfinite(loss) or (moments is not None and not moments.is_finite)
        share = self._sharing.share_of(self._batches) if moments is None else moments.share
        replica = self._sharing.replica
        seconds = observation.seconds if observation.seconds == observation.seconds else 0.0
        head = [0.0 if bad else (loss if self._summed else loss * share) / replica, float(bad)]
        head += [0.0 if moments is None else moments.batch_size * moments.share / replica, seconds]
        sums = [] if moments is None else _sums(moments, replica)
        # A gradient that every process holds whole must be the same on each.
        whole = 0.0 if moments is None or bad or self._sharing.has_shards else moments.grad_sq_norm * self.ranks.world_size
        return [*head, whole, whole**2, *checksum(tuple(decision.values())), *([0.0] * len(sums) if bad else sums)]

    def _global(self, moments: GradientMoments, sums: list[float], m: int, bad: bool) -> GradientMoments:
        """The moments of the whole batch, with NaN where they cannot be used."""
        groups = sorted(moments.by_group)
        parts = [self._whole(part, sums[at * N_SUMS :], m, bad) for at, part in enumerate([moments, *(moments.by_group[group] for group in groups)])]
        whole = replace(parts[0], by_group=dict(zip(groups, parts[1:], strict=True)))
        if not moments.parameter_grad_sq_norms:
            return whole
        names, rest = list(moments.by_parameter), sums[(1 + len(groups)) * N_SUMS :]
        grad_sq_norms = {name: math.nan if bad else rest[2 * at] for at, name in enumerate(names)}
        # The second sum is that of the terms but for what ‖g_k‖² adds to each: c_i w_i² with inner_products, otherwise -1.
        added = sums[4] / m if moments.inner_products is not None else -1.0
        terms = {name: rest[2 * at + 1] / m + added * grad_sq_norms[name] for at, name in enumerate(names)}
        return replace(whole, parameter_grad_sq_norms=grad_sq_norms, totals=replace(whole.totals, parameter_terms=terms))

    def _whole(self, moments: GradientMoments, sums: list[float], m: int, bad: bool) -> GradientMoments:
        if bad or not m:
            return replace(moments, batch_size=m, grad_sq_norm=math.nan, totals=Totals(0, math.nan))
        grad_sq_norm, totals = totals_of(sums[:N_SUMS], m, moments.inner_products is not None)
        if self._of_processes:
            totals = between_processes(totals, grad_sq_norm, m)
        return replace(moments, batch_size=m, grad_sq_norm=grad_sq_norm, totals=totals)


def _sums(moments: GradientMoments, replica: int) -> list[float]:
    """Of the step, of each parameter group, and two numbers of each parameter where they are measured apart."""
    sums = [value for part in (moments, *(moments.by_group[group] for group in sorted(moments.by_group))) for value in sums_of(part, moments.share, replica)]
    rows = moments.batch_size * moments.share
    for name, norms in moments.by_parameter.items() if moments.parameter_grad_sq_norms else ():
        terms = norms.double()
        if moments.parameter_inner_products:
            weights = 1.0 if moments.weights is None else moments.weights
            terms = terms - 2 * weights * moments.parameter_inner_products[name].double()
            terms = terms if moments.corrections is None else moments.corrections * terms
        sums += [moments.parameter_grad_sq_norms[name], float(terms.mean()) * rows]
    return sums
