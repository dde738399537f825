"""GradSampleHooks: puts taps on a model's layers and collects what they report.

Legend: N samples in a backward pass, S of them measured, K probe rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adabatch._checks import check_version
from adabatch.estimators.gradients import (
    at_backward_end, check_arguments, grad_sq_norms, is_sharded, running_backward,
)
from adabatch.estimators.loss_scale import StepScale, step_scale
from adabatch.estimators.moments import BackwardPass, GradientMoments, PoolOptions
from adabatch.grad_sample.backward.finish import (
    NOTHING_MEASURED, OPEN, OPEN_ROLES, REENTRANT, BackwardChecks, DeferredFactors, PendingStep,
    Unmeasured, batch_size_of, check_all_seen, check_gradients_left, check_packed,
    finish_pass, reported_parameters, trainable_grads, warn_of_left_over, warn_of_mixing,
)
from adabatch.grad_sample.backward.recorder import (
    INITIAL_CAPACITY, BackwardRecorder, ProbeSet, Rows, add_to_row,
)
from adabatch.grad_sample.backward.verify import (
    check_uses_seen, is_distributed, is_power_of_two,
)
from adabatch.grad_sample.compat import is_compiled
from adabatch.grad_sample.cost import StepCost, step_cost
from adabatch.grad_sample.functional.flow import Roles
from adabatch.grad_sample.layout import KnownLayouts
from adabatch.grad_sample.plan import ParameterIdentity, plan_layers, unwrap
from adabatch.grad_sample.rows import ProbeRows, RowSampler
from adabatch.grad_sample.statistics import statistics_of
from adabatch.grad_sample.taps.base import TapSite, autocast_disabled
from adabatch.grad_sample.taps.placement import ForwardHooks, OutsideCalls
from adabatch.interfaces import (
    Estimator, NotMeasured, PendingMoments, ProcessShare, State, Statistic,
)

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

TOO_MANY = (
    "saw {n} backward passes since the last collect(), but accumulate={k}. If each pass had "
    "samples of its own (gradient accumulation), pass accumulate=k for k backward passes per step. "
    "If a step was left out after backward() (a gradient that is not finite, an exception that was "
    "caught), call scheduler.estimator.reset(), hooks.reset(), there. "
    "If they had the same samples, accumulate= would be wrong: add several losses of one batch and "
    "call backward() once, and pause the hooks (`with scheduler.paused():`, hooks.paused()) "
    "around passes that do not belong to the step, as all but one of SAM's or of a closure that "
    "the optimizer calls several times")
TOO_FEW = (
    "saw {n} backward passes since the last collect(), but accumulate={k}, so that the factor on "
    "each pass's loss is not known. If all steps have {n}, pass accumulate={n}; if these are the "
    "last ones of an epoch, step only after each k-th pass, counted from epoch to epoch")
SAME_FORWARD = (
    "one forward pass was differentiated by several backward passes of a step, but accumulate={k} "
    "counts each pass's samples as others: add the losses and call backward() once on the sum, or "
    "pause the hooks around the other passes (`with scheduler.paused():`, hooks.paused())")
COMPILED = (
    "{names} cannot be measured on a compiled model, whose graph ends before the mean gradient is "
    "known: do not measure it, or do not compile {parts} (submodules without measured parameters "
    "may be compiled)"
)
UNSEEN_USE = "a use outside of the layers began"
NOT_TRACED = (
    "this step was not measured: the samples' contributions do not add up to the gradient of "
    "{listed}, as where a weight is used without calling its layer from this step on. Forward "
    "passes are traced from now on, which measures such uses: leave this step out and continue; "
    "should the next one differ too, the error says so"
)
SHAPES = ("this step was not measured: {error}. Forward passes are traced from now on, which finds "
          "what is called without samples: leave this step out and continue")
OTHERS = "layers that other processes used"
OTHERS_GRADIENT = (
    "this step was not measured: {listed} have a gradient, and this process called no layer that "
    "has them. Only the next pass shows whether another process did (find_unused_parameters=True), "
    "or this one used them without calling their layers: leave this step out and continue")
NEW_PATTERN = "a pass unlike those before"
NEW_LAYERS = "a layer was called for the first time"
NOT_FOLLOWED = (
    "this step was not measured: {listed} was called for the first time, and only the next pass, "
    "which is traced, shows whether with samples: leave this step out and continue")


class GradSampleHooks(Estimator):
    """Per-sample gradient moments of a model, measured while its backward pass runs: no second
    pass, no stored per-sample gradients, nothing kept on the model (see the folder's README).

    Args:
        model: the model; may be wrapped by torch.compile or DistributedDataParallel. Attach before
            the first compiled run.
        loss_reduction: "mean" (the loss is the mean over the batch) or "sum".
        samples: how many samples of each batch to measure, random rows drawn again for each step;
            None measures all. May be set between steps.
        seed: of the generator that draws the rows.
        accumulate: backward passes per optimizer step in your own gradient accumulation. With
            loss_reduction="mean" each pass's loss is its mean divided by `accumulate`.
        ignore: names of modules that are left out, with all below them, or of single parameters;
            they count neither in the norms nor in ‖g‖².
        param_groups: lists of parameters with separate moments (`GradientMoments.by_group`), as in
            an optimizer's param_groups; parameters in none of them are left out.
        capacity: the largest batch to expect. Grows on demand in eager mode; under torch.compile
            it must be given.
        layout: what adabatch.check found; None: the samples lie along dimension 0 everywhere.
        per_parameter: also give the norms of each parameter (`by_parameter`).
        statistics: what to measure besides the squared norms, by name or as `Statistic` objects:
            "inner_products" gives ⟨g_i, g⟩ and with them a steadier trace, its standard error and
            interval; "second_moment" gives Σ_i g_i², elementwise.

    Attributes:
        roles: what is settled on inputs whose samples the data flow does not show.
        by_samples: the passes of a step are micro-batches, weighted by their samples. It and
            accumulate may be set between steps.

    Raises:
        ValueError: on attaching, listing all layers that cannot be measured exactly, with the fix.
        NotMeasured: from collect(), a RuntimeError: what a layer was called with is
            as long as the batch, and nothing shows whether it carries the samples. A batch of
            another size settles that for good, or adabatch.check.
        RuntimeError: from loss.backward(), where the pass cannot be measured exactly (layers that
            saw another number of rows, higher-order gradients).

    Shapes and units: `sq_norms` [S], float32 (float64 if any parameter is), of per-sample gradients
    of the per-sample loss: the loss reduction is undone.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> hooks = GradSampleHooks(model)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> moments = hooks.collect()
        >>> moments.batch_size, tuple(moments.sq_norms.shape)
        (8, (8,))
        >>> hooks.remove()
    """

    _passes: list[BackwardPass]
    _kept: list[DeferredFactors]
    _late: list[BackwardChecks]
    _left_out: NotMeasured | None
    _n_passes: int

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: str = "mean",
        samples: int | None = None,
        seed: int = 0,
        accumulate: int = 1,
        ignore: Collection[str] = (),
        param_groups: Sequence[Sequence[Tensor]] | None = None,
        capacity: int = INITIAL_CAPACITY,
        layout: KnownLayouts | None = None,
        per_parameter: bool = False,
        statistics: Collection[Statistic | str] = (),
    ):
        check_arguments(loss_reduction, samples=samples, accumulate=accumulate, capacity=capacity)
        groups = None if param_groups is None else [list(group) for group in param_groups]
        measured = None if groups is None else {id(each) for group in groups for each in group}
        plan = plan_layers(model, ignore, only=measured)
        self.loss_reduction, self.accumulate, self.by_samples = loss_reduction, accumulate, False
        self.shard: ProcessShare | None = None
        self.parameters = plan.parameters
        self._statistics = statistics_of(statistics)
        self._deferred = [each for each in self._statistics if each.needs_gradient]
        if self._deferred:
            self._check_not_compiled(model)
        for each in self._statistics:
            each.attach(plan.parameters)
        self.statistics = frozenset(each.name for each in self._statistics)
        self._row_sampler = RowSampler(samples, seed, capacity)
        self._probe_rows = ProbeRows(plan.parameters, groups, per_parameter)
        self._recorder = BackwardRecorder(self._statistics, plan.parameters)
        self.sites = TapSite.all_of(plan, self._probe_rows.row_of, self._recorder,
                                    {} if layout is None else layout.layouts)
        wide = any(each.dtype == torch.float64 for each in plan.parameters.values())
        reference = weakref.ref(self)

        def on_reports_complete(reports: Tensor) -> None:
            hooks = reference()
            if hooks is not None:
                hooks._on_reports_complete()

        self._probes = ProbeSet(
            len(self._probe_rows), len(self.sites),
            1 + 2 * max(len(site.parameters) for site in self.sites), capacity,
            torch.float64 if wide else torch.float32, self._row_sampler, on_reports_complete)
        for name, parameter in plan.parameters.items():
            probe = self._probes.on(parameter.device)
            self._recorder.sum_check.vectors(parameter)
            for each in self._recorder.statistics:
                shape = None if each.per_sample else each.leaf_shape(name)
                if shape is not None:
                    probe.value(each.name, name, shape)
        source = None if layout is None else layout.batch_size_source
        self.roles = Roles() if layout is None else Roles(layout.roles)
        self._placer = ForwardHooks(self.sites, plan.parameters, plan.traced, self._probes,
                                    self._row_sampler, self._recorder, source,
                                    () if layout is None else layout.layouts, self.roles)
        self._finished_task, self._warned_of_open, self._warned_of_left_over = -1, False, False
        self._mixing, self._seen, self._incomplete = [False], set[str](), 0
        # {parameter: the last backward pass in which this process had a gradient of it}.
        self._own_grads: dict[str, int] = {}
        self._watches: list[RemovableHandle] = []
        self._grad_sq_norms = torch.zeros(len(self._probe_rows))
        self.reset()
        self._placer.attach(unwrap(model), self)
        self._identity = ParameterIdentity(unwrap(model), plan.parameters)
        self._placer.check_all = self._identity.check
        self.attached = True

    def _check_not_compiled(self, model: nn.Module) -> None:
        measured = {id(parameter) for parameter in self.parameters.values()}
        parts = [name or "it" for name, part in model.named_modules() if is_compiled(part)
                 and any(id(parameter) in measured for parameter in part.parameters())]
        if parts:
            names = " and ".join(each.name for each in self._deferred)
            raise ValueError(COMPILED.format(names=names, parts=", ".join(parts)))

    @property
    def enabled(self) -> bool:
        return self._placer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._placer.enabled = value
        if value:
            self._placer.put_back()

    @property
    def n_parts(self) -> tuple[int, int]:
        """The numbers of parameter groups and of parameters that have moments of their own."""
        groups = len(set(self._probe_rows.group_of_row))
        return (groups if groups > 1 else 0), len(self._probe_rows.names or ())

    @property
    def n_passes(self) -> int:
        """Measured backward passes since the last collect()."""
        return self._n_passes

    @property
    def samples(self) -> int | None:
        """How many samples of each batch are measured; None for all."""
        return self._row_sampler.samples

    @samples.setter
    def samples(self, value: int | None) -> None:
        check_arguments(self.loss_reduction, samples=value)
        self._row_sampler.choose(value)
        self._probes.reserve_keys()

    def cost(self) -> StepCost:
        """What measuring costs by the cost model, from the shapes of the last measured pass."""
        seen = [(site.layer, *site.shapes, site.sampler is None)
                for site in self.sites
                if site.shapes is not None and site.layer_reference() is not None]
        numel = sum(parameter.numel() for parameter in self.parameters.values())
        operations = self._placer.operation_shapes.values()
        return step_cost(seen, numel, operations, self._statistics)

    def set_norm_weights(self, weights: dict[str, float]) -> None:
        """Factors {parameter: weight} on the values of a model that is sharded over processes."""
        self._recorder.norm_weights = weights

    def check_loss(self, loss: Tensor) -> None:
        """Raise a RuntimeError listing the parameters that the loss uses outside the model's
        forward pass. Cheap: the graph is walked down to the taps only."""
        check_uses_seen(loss, self.parameters, self._probes.leaves)

    # -- the end of a backward pass

    def _on_reports_complete(self) -> None:
        task = running_backward()
        if not self.attached or task == self._finished_task:
            return
        placer = self._placer
        recomputing, placer.recomputing_task = placer.recomputing_task, -1
        if recomputing not in (-1, task):
            self.reset()
            raise RuntimeError(REENTRANT)
        self._finished_task = task
        at_backward_end(self._finish)  # only then are the parameters' gradients complete

    def _finish(self) -> None:
        try:
            with autocast_disabled(self._probes.result_device):
                self._take_pass()
            for callback in self.on_backward_end:
                callback()
        except Exception:
            self.reset()  # half of a pass must not be collected later
            self._identity.check()  # the cause of many other errors
            raise

    def _take_pass(self) -> None:
        probes, placer, sites, task = self._probes, self._placer, self.sites, self._finished_task
        if placer.open_roles:  # observe() says so
            self._recorder.drain(task)
            placer.end_pass(self)
            return
        # On accelerators, after the first pass, the reports are read one step later.
        sizes, late = placer.forward_sizes, None
        if self._seen and probes.remote and len(sizes) == 1:
            late = next(iter(sizes))
        sizes.clear()
        record = self._recorder.drain(task)
        check = self._recorder.sum_check
        rows, reports, sums, leaves = probes.drain(task, record.reports(len(sites)), late)
        if sums:
            check.observe_compiled(task, sums, [site.parameters.values() for site in sites])
        wrong = check.differing(self.by_samples) if check.task == task else []
        if check.left_over and not (self._n_passes or self._warned_of_left_over):
            self._warned_of_left_over = True
            warn_of_left_over(check.left_over)
        if wrong and not self._leave_out(wrong):
            raise RuntimeError(check.describe(wrong, placer.called))
        if isinstance(reports, Tensor):
            assert late is not None
            batch_size = late
        else:
            if placer.packed_size is not None:
                check_packed(reports, sites, placer.packed_size)
            try:
                batch_size = batch_size_of(
                    reports, sites, placer.input_sizes, record.unequal)
            except RuntimeError as error:  # a table that is looked up from this step on, say
                text = f"{error}{placer.outside_remark()}"
                if not placer.trace_always():
                    raise RuntimeError(text) from None
                self._left_out = NotMeasured(UNSEEN_USE, SHAPES.format(error=text))
                self._n_passes += 1
                placer.end_pass(self)
                return
        placer.settle_unfollowed([] if isinstance(reports, Tensor) else reports, batch_size)
        if placer.open_roles:
            placer.end_pass(self)
            return
        if placer.not_followed:
            listed = ", ".join(sorted(placer.not_followed))
            self._left_out = NotMeasured(NEW_LAYERS, NOT_FOLLOWED.format(listed=listed))
        if check.unverified and check.task == task:
            self._left_out = self._left_out or NotMeasured(NEW_PATTERN, check.unverified)
        values, repeated = finish_pass(
            record, rows, leaves, self._recorder.statistics, self._probe_rows.row_of,
            self._recorder.norm_weights, probes)
        for site in sites if repeated else ():
            site.deferred |= not repeated.isdisjoint(site.parameters.values())
        again = False
        for index, site in enumerate(sites):
            seen_calls = site.calls if isinstance(reports, Tensor) else round(reports[index][0])
            again |= seen_calls > site.calls and index in self._counted
            if site.calls and self.accumulate > 1:
                self._counted.add(index)
            site.calls = max(0, site.calls - seen_calls)
        if again:
            raise RuntimeError(SAME_FORWARD.format(k=self.accumulate))
        used = {use.parameter for use in record.uses} | record.noted
        if late is None:
            assert not isinstance(reports, Tensor)
            seen = self._check_now(reports, used)
        else:
            seen = set()
            self._late.append(self._checks(reports, late, used))
        incomplete = len(seen) < len(self._seen)
        self._incomplete += incomplete
        if check.was_due or (incomplete and is_power_of_two(self._incomplete)):
            self._identity.check()
        self._n_passes += 1
        check.is_first = self._n_passes >= self.accumulate
        indices = None
        if self._row_sampler.samples is not None:
            indices = self._row_sampler.rows(batch_size, probes.result_device)
        share = 1.0 if self.shard is None else self.shard.fraction
        step = BackwardPass(batch_size, rows, indices, values, share=share)
        self._passes = [*self._passes, step][-self.accumulate :]
        if self._deferred and self._n_passes <= self.accumulate:
            self._kept.append(DeferredFactors(record))
        if self._n_passes >= self.accumulate and self._left_out is None:
            self._finish_step(seen)
        placer.end_pass(self)

    def _finish_step(self, seen: set[str]) -> None:
        """The step's last pass has ended, its gradient is complete."""
        if seen:
            check_gradients_left(seen, trainable_grads(self.parameters), self.sites)
        of_groups = grad_sq_norms if self.shard is None else self.shard.grad_sq_norms
        self._grad_sq_norms = of_groups(self._probe_rows.groups)
        for each in self._statistics:
            found = each.of_gradient()
            if found:
                self._passes[-1].gradient[each.name] = found
        for each in self._deferred:
            for step, kept in zip(self._passes, self._kept, strict=False):
                values = kept.values(each, self.parameters)
                if each.per_sample:
                    self._add_rows(step.rows, each.name, values)
                else:
                    step.values[each.name] = values
        self._kept.clear()

    def _add_rows(self, rows: dict[str, Rows], name: str, values: dict[str, Tensor]) -> None:
        n_rows, weights = len(self._probe_rows), self._recorder.norm_weights
        rows.setdefault(name, [None] * n_rows)
        for parameter, value in values.items():
            value = self._probes.to_result_device(value)
            value = value if weights is None else value * weights[parameter]
            add_to_row(rows, name, n_rows, self._probe_rows.row_of[parameter], value)

    def _check_now(self, reports: Sequence[Sequence[float]], used: set[str]) -> set[str]:
        """Check a pass whose reports have arrived; the names of parameters that took part."""
        self._mixing[0] = self._mixing[0] or warn_of_mixing(reports, self.sites)
        seen = reported_parameters(reports, self.sites, used)
        if not self._n_passes and self._left_out is None:
            unseen = self._unseen_grads(seen)
            try:
                check_all_seen(seen, unseen)
            except RuntimeError:
                if not self._leave_out(unseen):
                    raise
        self._seen |= seen
        return seen

    def _unseen_grads(self, seen: set[str]) -> dict[str, Tensor]:
        """Gradients that this process has without a tap having seen the parameter. Where processes
        average them, those of layers that only others used are none. The first time is left out,
        and from then on hooks on the parameters tell."""
        grads = {name: parameter.grad for name, parameter in self.parameters.items()
                 if name not in seen and parameter.grad is not None}
        if not grads or not is_distributed():
            return grads
        if not self._watches:
            for name, parameter in self.parameters.items():
                if not is_sharded(parameter) and parameter.requires_grad:
                    self._own_grads[name] = -1
                    self._watches.append(parameter.register_hook(
                        partial(_note_task, self._own_grads, name)))
            message = OTHERS_GRADIENT.format(listed=", ".join(grads))
            if self._watches:
                self._left_out = self._left_out or NotMeasured(OTHERS, message)
        return {name: grad for name, grad in grads.items()
                if self._own_grads.get(name, self._finished_task) == self._finished_task}

    def _leave_out(self, names: Iterable[str]) -> bool:
        """Leave out this step, where tracing the next forward pass may find the uses that it
        missed; False if it cannot."""
        if not self._placer.trace_always():
            return False
        self._left_out = NotMeasured(UNSEEN_USE, NOT_TRACED.format(listed=", ".join(names)))
        return True

    def _checks(
        self, reports: Sequence[Sequence[float]] | Tensor, n_samples: int, used: set[str]
    ) -> BackwardChecks:
        nonzero = {name: torch.count_nonzero(grad)
                   for name, grad in self._unseen_grads(self._seen).items()}
        return BackwardChecks(reports, self.sites, frozenset(self._placer.input_sizes), n_samples,
                              used, trainable_grads(self.parameters), nonzero, self._mixing)

    # -- Estimator

    def observe(
        self, *, weights: Tensor | Sequence[float] | None = None,
        loss_scale: float | StepScale | None = None,
    ) -> PendingMoments:
        """Take the moments of all backward passes since the last step, without waiting for an
        accelerator: its numbers are copied while training continues.

        On an accelerator the first measured backward pass, and every one of a compiled model (only
        the device knows how many samples it had), waits and is checked at once; the checks of the
        others raise in moments().

        Args:
            weights: of the step's samples [m], pass after pass, on any scale, where the loss is a
                weighted mean: their numbers of tokens under a mean over all tokens. Accumulated
                passes each have a weighted mean, divided by `accumulate`. Needs inner products.
            loss_scale: the factor on the loss: a number, or what `LossScale.take()` returns.

        Raises:
            RuntimeError: more measured backward passes than `accumulate`, or none.
            NotMeasured: fewer.
            ValueError: weights without inner products or of another length than the samples; a
                loss_scale that is not a positive number.
        """
        open_roles = dict(self._placer.open_roles)
        if open_roles:
            self.reset()
            listed = ", ".join(name for name, _ in open_roles)
            warns, self._warned_of_open = not self._warned_of_open, True
            self.needs_another_size = True
            return Unmeasured(NotMeasured(OPEN, OPEN_ROLES.format(
                listed=listed, n_samples=next(iter(open_roles.values()))), warns))
        self.needs_another_size = False
        if not self._n_passes:
            raise RuntimeError(NOTHING_MEASURED + self._placer.size_remark())
        try:
            if self._n_passes > self.accumulate:
                raise RuntimeError(TOO_MANY.format(n=self._n_passes, k=self.accumulate))
            if self._n_passes < self.accumulate:
                raise NotMeasured("short accumulation group",
                                  TOO_FEW.format(n=self._n_passes, k=self.accumulate))
            if self._left_out is not None and len(self._passes) < self.accumulate:
                return Unmeasured(self._left_out)
            scale = None if loss_scale is None else step_scale(loss_scale)
            rows, shard = self._probe_rows, self.shard
            options = PoolOptions(
                self.loss_reduction, rows.group_of_row, rows.names, self.by_samples,
                1 if shard is None else shard.world_size, self._statistics)
            return PendingStep(self._passes, self._grad_sq_norms, scale, weights, self._late,
                               options, self._probes.remote, self._left_out)
        finally:
            self.reset()

    def collect(
        self, *, weights: Tensor | Sequence[float] | None = None,
        loss_scale: float | StepScale | None = None,
    ) -> GradientMoments:
        """The moments of the step, now; arguments and errors are those of observe()."""
        return self.observe(weights=weights, loss_scale=loss_scale).moments()

    def tensors_over_samples(self, moments: GradientMoments) -> list[Tensor]:
        return [tensor for each in self._statistics if each.name in moments.statistics
                for tensor in each.over_samples(moments.statistics[each.name])]

    def metrics(self, moments: GradientMoments) -> dict[str, float]:
        return {name: value for each in self._statistics if each.name in moments.statistics
                for name, value in each.metrics(moments.statistics[each.name]).items()}

    def reset(self) -> None:
        """Discard what was measured since the last step, as after a backward pass that failed, and
        draw new rows."""
        self._passes, self._kept, self._late, self._n_passes = [], [], [], 0
        self._left_out = None
        self._counted: set[int] = set()  # layers whose calls were counted in a pass of this step
        placer = self._placer
        placer.recomputing_task = -1
        placer.input_sizes.clear()
        placer.forward_sizes.clear()
        placer.open_roles.clear()
        placer.outside = OutsideCalls()
        self._recorder.discards, self._recorder.sum_check.is_first = False, True
        if self._row_sampler.samples is not None:
            self._row_sampler.redraw()
        self._recorder.clear()
        self._probes.forget()
        for site in self.sites:
            site.calls = 0

    def remove(self) -> None:
        """Take all hooks off the model; nothing else was put on it."""
        while self._watches:
            self._watches.pop().remove()
        self._placer.remove()
        self._probes.clear()
        self.attached = False

    def state_dict(self) -> State:
        """The state of the row draws, and what is known of the layers' inputs: a resumed run
        measures the same rows of the same steps."""
        return {"version": 3, "rows": self._row_sampler.state_dict(),
                "roles": self._placer.roles.state_dict(),
                "followed": [site.name for site in self.sites if site.followed]}

    def load_state_dict(self, state: State) -> None:
        check_version(state, 3, "GradSampleHooks")
        self._placer.roles.load_state_dict(state["roles"])
        for site in self.sites:
            site.followed = site.name in state["followed"]
        self._row_sampler.load_state_dict(state["rows"])

    def __repr__(self) -> str:
        layers = sum(site.sampler is not None for site in self.sites)
        measured = "all samples" if self.samples is None else f"{self.samples} samples of a batch"
        extra = f" with {', '.join(sorted(self.statistics))}" if self.statistics else ""
        state = "" if self.enabled else ", paused"
        return (f"GradSampleHooks({len(self.parameters)} parameters in {layers} layers, "
                f"{measured}{extra}{state if self.attached else ', removed'})")


def _note_task(tasks: dict[str, int], name: str, grad: Tensor) -> None:
    """A parameter's hook: this process has a gradient of it in the backward pass that runs."""
    tasks[name] = running_backward()
