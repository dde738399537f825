"""The end of a backward pass: its results, and the checks that may wait for an accelerator.

Legend: N samples in the pass, S measured, K probe rows.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adabatch._transfers import HostCopies
from adabatch.estimators.gradients import whole_gradient
from adabatch.estimators.loss_scale import StepScale
from adabatch.estimators.moments import (
    BackwardPass, GradientMoments, PoolOptions, pool_passes,
)
from adabatch.grad_sample.backward.recorder import BackwardRecord, ProbeSet, Report, add_to_row
from adabatch.grad_sample.factors.base import Factor
from adabatch.grad_sample.factors.merge import merge_factors
from adabatch.interfaces import NotMeasured, Statistic

if TYPE_CHECKING:
    from adabatch.grad_sample.taps.base import TapSite

NOTHING_MEASURED = (
    "no measured backward pass since the last collect(). Possible causes: backward() was not "
    "called; scheduler.step() was called twice for one; the hooks are paused or removed; a copy of "
    "the model was trained (copies are not measured: attach to the copy); gradients were taken "
    "with torch.autograd.grad or backward(inputs=...), which leave nothing behind (call "
    "loss.backward()); the model was called inside of a transform of torch.func or in forward-mode "
    "differentiation; or the model was compiled and run before the hooks were attached (attach "
    "first, or call torch._dynamo.reset())."
)
OPEN = "it is not known yet what carries samples"
OPEN_ROLES = (
    "this step is not measured: what {listed} is called with has {n_samples} rows, as many as the "
    "batch has samples, and nothing shows yet whether they are the samples or a table that is the "
    "same for all. A batch of another size settles it for good. Where all batches have one size, "
    "pass layout=adabatch.check(model, batch, loss_fn)"
)
REENTRANT = (
    "reentrant activation checkpointing cannot be measured: its backward passes run inside "
    "another. Use checkpoint(..., use_reentrant=False)"
)
PACKED = (
    "The model was called with a PackedSequence, whose rows are positions of samples, not samples: "
    "call it with the padded sequences (torch.nn.utils.rnn.pad_packed_sequence) and their lengths"
)
OVERWRITTEN = (
    "a tensor that {name} was run with, or its gradient, was changed in place before the step's "
    "last backward pass: {statistic} reads it once more when the mean gradient is known. Give "
    "every backward pass of a step its own tensors (clone a buffer that is filled again), or do "
    "not measure {statistic}"
)


def finish_pass(
    record: BackwardRecord, rows: dict[str, list[Tensor | None]],
    leaves: Mapping[tuple[str, str], Tensor], statistics: Sequence[Statistic],
    row_of: Mapping[str, int], weights: Mapping[str, float] | None, probes: ProbeSet,
) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Complete a pass: add what was recorded, and the deferred uses, to `rows`, read leaves.

    Args:
        record: of the taps in eager mode.
        rows: {per-sample statistic: [K]}, of compiled graphs so far.
        leaves: {(statistic, parameter): value} of compiled graphs.
        statistics: besides the squared norms, those that do not need the gradient.
        weights: {parameter: the factor on its norms}, or None for all 1.

    Returns:
        {statistic: {parameter: value}}, and names of parameters that had several uses.
    """
    n_rows, to_result_device = probes.n_rows, probes.to_result_device
    record.add_rows(rows, n_rows, to_result_device)
    values = record.values
    if leaves:
        by_name = {each.name: each for each in statistics}
        for (statistic, name), leaf in leaves.items():
            value = by_name[statistic].from_leaf(name, leaf)
            if value is not None:
                values.setdefault(statistic, {})[name] = value
    repeated = set()

    def add(statistic: str, name: str, value: Tensor) -> None:
        value = to_result_device(value)
        value = value if weights is None else value * weights[name]
        add_to_row(rows, statistic, n_rows, row_of[name], value)

    for name, (factor, n_uses) in record.merged().items() if record.uses else ():
        add("sq_norms", name, factor.sq_norms())
        for each in statistics:
            value = each.of_factor(name, factor)
            if value is None:
                continue
            if each.per_sample:
                add(each.name, name, value)
            else:
                values.setdefault(each.name, {})[name] = value
        if n_uses > 1:
            repeated.add(name)
    return values, repeated


class DeferredFactors:
    """The factors of one backward pass, kept until the step's gradient is complete."""

    def __init__(self, record: BackwardRecord):
        self._factors: dict[str, list[tuple[Factor, list[int]]]] = {}
        for use in record.uses:
            kept = self._factors.setdefault(use.parameter, [])
            kept.append((use.factor, _versions(use.factor)))

    def values(
        self, statistic: Statistic, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """{parameter: the statistic's value}; a RuntimeError where a kept tensor has changed."""
        values: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            grad = whole_gradient(parameter.grad)
            kept = self._factors.get(name, ())
            if any(_versions(factor) != versions for factor, versions in kept):
                raise RuntimeError(OVERWRITTEN.format(name=name, statistic=statistic.name))
            if kept and grad is not None:
                value = statistic.of_factor(name, merge_factors([each for each, _ in kept]), grad)
                if value is not None:
                    values[name] = value
        return values


def _versions(factor: Factor) -> list[int]:
    return [value._version for value in vars(factor).values() if isinstance(value, Tensor)]


# -- checks


def batch_size_of(
    reports: Sequence[Report], sites: Sequence[TapSite], input_sizes: Collection[int] = (),
    unequal: Collection[int] = (),
) -> int:
    """N, from the layers' reports [n_layers, 2] of (calls, rows); unequal: indices of the layers
    whose calls had different numbers of rows.

    Raises:
        RuntimeError: a layer was called twice where that cannot be undone; layers saw different
            numbers of rows, or all one that is no dimension of the model's inputs: samples and
            positions were flattened together. All are listed.
    """
    sizes = {total for calls, total in reports if calls}
    once = max(calls for calls, _ in reports) == 1
    if unequal:
        names = ", ".join(sites[index].name for index in sorted(unequal))
        raise RuntimeError(
            "per-sample gradients of this backward pass are not exact:\n"
            f"  - {names} was called with different numbers of rows in one backward pass: which of "
            "them belong to which sample is not known. Make all its calls with one row for each "
            "sample, pass ignore=[...], or let wrap measure with estimator=adabatch.MicroBatch()")
    if len(sizes) == 1 and once and (not input_sizes or not sizes.isdisjoint(input_sizes)):
        return round(sizes.pop())
    problems = []
    rows: dict[str, int] = {}
    for site, (calls, total) in zip(sites, reports, strict=True):
        if calls > 1 and not (site.deferred or site.calls > 1):
            problems.append(
                f"{site.name} was called {int(calls)} times, and the hooks did not see it called: "
                "inside a compiled graph (run the model without torch.compile, or compile its "
                "parts), or before the last collect() (call it after the backward pass)"
            )
        if calls:
            rows[site.name] = round(total / calls)
    size = Counter(rows.values()).most_common(1)[0][0]
    odd = ", ".join(f"{name} ({n})" for name, n in rows.items() if n != size)
    settle = ("Find the layouts with adabatch.check(...); if the model leaves samples out, let it "
              "keep their rows and set their losses to 0")
    if odd:
        problems.append(f"the first dimension of these layers' outputs is not the batch of {size}: "
                        f"{odd}. {settle}")
    if input_sizes and size not in input_sizes:
        problems.append(f"all layers saw {size} rows, which is no dimension of the model's inputs. "
                        f"{settle}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RuntimeError(
            f"per-sample gradients of this backward pass are not exact:\n{listed}")
    return size


def check_packed(
    reports: Sequence[Report], sites: Sequence[TapSite], n_samples: int
) -> None:
    """Raise a RuntimeError where layers saw other rows than the N samples of the PackedSequence
    with which the model was called."""
    odd = [f"{site.name} ({total / calls:g})" for site, (calls, total)
           in zip(sites, reports, strict=True) if calls and total != n_samples * calls]
    if odd:
        raise RuntimeError(f"per-sample gradients of this backward pass are not exact: the first "
                           f"dimension of these layers' outputs is not the batch of {n_samples}: "
                           f"{', '.join(odd)}. {PACKED}")


def warn_of_mixing(
    reports: Sequence[Report], sites: Sequence[TapSite], stacklevel: int = 8
) -> bool:
    """Warn if a layer that took part mixes the samples of the batch; whether one did."""
    mixing = [site.name for site, (calls, _) in zip(sites, reports, strict=True)
              if calls and site.mixes_samples]
    if mixing:
        warnings.warn(
            f"{', '.join(mixing)}: batch normalization in train mode mixes the samples of a batch. "
            "What is measured is each sample's contribution to the gradient: contributions add up "
            "to it exactly, but their variance is a proxy of the variance over fresh batches, and "
            "usually larger.",
            stacklevel=stacklevel,  # the caller of loss.backward()
        )
    return bool(mixing)


def warn_of_left_over(names: Sequence[str], stacklevel: int = 7) -> None:
    """Warn of gradients that hold more than the step's samples gave."""
    warnings.warn(
        f"the gradients of {', '.join(names)} were not zero when this step's first measured "
        "backward pass began, so that they are not those of its samples alone, and the measured "
        "variance is wrong (the samples' norms are right). Call optimizer.zero_grad() before each "
        "step's first backward pass; several passes of one step need accumulate=",
        stacklevel=stacklevel,  # the caller of loss.backward()
    )


def reported_parameters(
    reports: Sequence[Report], sites: Sequence[TapSite], used: Collection[str]
) -> set[str]:
    """Names of the parameters that took part in the pass as far as the taps saw."""
    seen = {name for site, (calls, _) in zip(sites, reports, strict=True)
            if calls for name in site.parameters.values()}
    return seen.union(used)


def check_gradients_left(
    seen: Collection[str], has_grad: Mapping[str, bool], sites: Sequence[TapSite]
) -> None:
    """Raise a RuntimeError where a parameter was `seen` but has no gradient at the end of the pass,
    so that ‖g‖² would lack it. A layer that is run again may leave some of its parameters unused.
    """
    gone = [name for name, has in has_grad.items() if not has and name in seen]
    if not gone:
        return
    unused = {name for site in sites if site.sampler is None for name in site.parameters.values()}
    if not (unused.issuperset(gone) and any(has_grad.get(name, True) for name in seen)):
        raise RuntimeError(
            "these parameters were measured but have no gradient when the backward pass ends: "
            f"{', '.join(gone)}. An optimizer that steps inside backward, or "
            "torch.func.functional_call with other tensors, leaves nothing to compare with: keep "
            "the gradients until optimizer.step(), or pause the hooks"
        )


def check_all_seen(seen: Collection[str], nonzero: Mapping[str, Tensor]) -> None:
    """Raise a RuntimeError where a parameter has a gradient that is not zero and no tap saw it;
    nonzero: {name: the gradient, or the number of its elements that are not zero}."""
    missing = [name for name, grad in nonzero.items()
               if name not in seen and bool(torch.count_nonzero(grad))]
    if missing:
        raise RuntimeError(
            f"these parameters have a gradient that no tap saw: {', '.join(missing)}. Either they "
            "are used without calling their layer (F.linear(x, layer.weight)), or inside of a "
            "transform of torch.func or forward-mode differentiation, or parts of the "
            "model are called instead of the model itself, or their gradient is left from an "
            "earlier step (call optimizer.zero_grad()), or the model was compiled and run before "
            "the hooks were attached (attach first, or call torch._dynamo.reset()). To leave a "
            "layer out, pass ignore=[...]."
        )


def trainable_grads(parameters: Mapping[str, Tensor]) -> dict[str, bool]:
    """Whether each parameter that is trainable now has a gradient."""
    return {name: parameter.grad is not None
            for name, parameter in parameters.items() if parameter.requires_grad}


@dataclass
class BackwardChecks:
    """The checks of one backward pass whose reports are still on their way from an accelerator.

    Attributes:
        reports: [n_layers, 2]; a tensor where compiled layers took part.
        n_samples: N of the forward pass.
        used: parameters whose factors were deferred.
        has_grad: whether each trainable parameter had a gradient when the pass ended.
        nonzero: {name: elements of the gradient that are not zero}, of parameters that no pass
            before had seen.
        mixing: [whether layers that mix samples were warned of], shared by all passes.
    """

    reports: Sequence[Report] | Tensor
    sites: Sequence[TapSite]
    input_sizes: Collection[int]
    n_samples: int
    used: Collection[str]
    has_grad: Mapping[str, bool]
    nonzero: Mapping[str, Tensor]
    mixing: list[bool]

    def copied(self, copies: HostCopies) -> BackwardChecks:
        """The same on the host."""
        nonzero = {name: copies.add(count) for name, count in self.nonzero.items()}
        return replace(self, reports=copies.add(self.reports), nonzero=nonzero)

    def run(self) -> None:
        """Raise what the backward pass itself would have raised on the CPU."""
        reports = self.reports.tolist() if isinstance(self.reports, Tensor) else self.reports
        size = batch_size_of(reports, self.sites, self.input_sizes)
        if size != self.n_samples:
            raise RuntimeError(
                f"the layers saw {self.n_samples} samples forward and {size} backward: run "
                "backward() on the loss of the last forward pass"
            )
        self.mixing[0] = self.mixing[0] or warn_of_mixing(reports, self.sites)
        seen = reported_parameters(reports, self.sites, self.used)
        check_all_seen(seen, self.nonzero)
        check_gradients_left(seen, self.has_grad, self.sites)


class PendingStep:
    """What GradSampleHooks.observe() gives (see PendingMoments): all numbers taken, and where
    anything is `remote`, on an accelerator, copies to the host begun.

    Args:
        grad_sq_norms: ‖g‖² of each probe row, [K].
        checks: of passes whose reports could not be read at once.
        loss_scale, weights, options: as for pool_passes.
        left_out: why the step is not measured, if so.
    """

    def __init__(
        self, passes: Sequence[BackwardPass], grad_sq_norms: Tensor,
        loss_scale: StepScale | None, weights: Tensor | Sequence[float] | None,
        checks: Sequence[BackwardChecks], options: PoolOptions, remote: bool,
        left_out: NotMeasured | None = None,
    ):
        self._left_out = left_out
        self._passes, self._grad_sq_norms, self._checks = passes, grad_sq_norms, checks
        self._scale, self._weights, self._options = loss_scale, weights, options
        self._copies: HostCopies | None = None
        self.lags = False
        if not remote:
            return
        self._copies = copies = HostCopies()
        self._passes = [_copied(each, copies) for each in passes]
        self._grad_sq_norms, self._weights = copies.add(grad_sq_norms), copies.add(weights)
        self._checks = [check.copied(copies) for check in checks]
        self._scale = None if loss_scale is None else loss_scale.copied(copies)
        self.lags = copies.under_way

    def moments(self) -> GradientMoments:
        """The moments, or the errors of GradSampleHooks.collect() and of the checks."""
        if self._copies is not None:
            self._copies.wait()
        for check in self._checks:
            check.run()
        if self._left_out is not None:
            raise self._left_out
        scale = 1.0 if self._scale is None else self._scale.factor()
        return pool_passes(self._passes, self._grad_sq_norms, loss_scale=scale,
                           weights=self._weights, options=self._options)


@dataclass
class Unmeasured:
    """A step of which moments() raises `error`."""

    error: NotMeasured
    lags: bool = False

    def moments(self) -> GradientMoments:
        raise self.error


def _copied(step: BackwardPass, copies: HostCopies) -> BackwardPass:
    """The pass with its small tensors on the host; values of a parameter's shape stay."""
    def small(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: copies.add(value) if value.dim() == 0 else value
                for name, value in values.items()}

    return replace(
        step, indices=copies.add(step.indices),
        rows={name: [copies.add(row) for row in rows] for name, rows in step.rows.items()},
        values={name: small(values) for name, values in step.values.items()},
        gradient={name: small(values) for name, values in step.gradient.items()},
    )
