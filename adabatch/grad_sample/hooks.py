"""GradSampleHooks: attaches taps to a model's layers and collects what they report.

Legend: N samples in a backward pass, S of them measured, K probe rows.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adabatch._checks import check_version
from adabatch.distributed.shard import BatchShard
from adabatch.estimators.loss_scale import LossScale
from adabatch.estimators.moments import GradientMoments
from adabatch.estimators.pooling import BackwardPass, check_arguments
from adabatch.grad_sample.backward import passes
from adabatch.grad_sample.backward.finish import BackwardChecks, check_backward, queue_finish
from adabatch.grad_sample.backward.loss_graph import check_uses_seen
from adabatch.grad_sample.backward.passes import add_uses, batch_size_of, check_gradients_left
from adabatch.grad_sample.backward.pending import PendingMoments
from adabatch.grad_sample.backward.probe import INITIAL_CAPACITY, ProbeSet
from adabatch.grad_sample.backward.recorder import BackwardRecorder
from adabatch.grad_sample.compat import autocast_disabled
from adabatch.grad_sample.cost import StepCost, step_cost
from adabatch.grad_sample.plan import plan_layers, unwrap
from adabatch.grad_sample.probe_rows import ProbeRows
from adabatch.grad_sample.rows import RowSampler
from adabatch.grad_sample.statistics.inner_products import DeferredInnerProducts, check_not_compiled
from adabatch.grad_sample.statistics.preconditioned import Preconditioner, SecondMoments, gradient_shares
from adabatch.grad_sample.taps.base import TapSite
from adabatch.grad_sample.taps.placement import ForwardHooks


class GradSampleHooks:
    """Per-sample gradient moments of a model, measured while its backward pass runs.

    Every layer with trainable parameters gets a forward hook that puts an identity node, the tap, behind it. After loss.backward() the taps have
    summed ‖g_i‖² over all layers; no second pass is run, no per-sample gradient is kept, and nothing is stored on the model.

    Args:
        model: the model; may be wrapped by torch.compile or DistributedDataParallel. Attach before the first compiled run.
        loss_reduction: 'mean' (the loss is the mean over the batch) or 'sum'.
        samples: how many samples of each batch to measure, random rows drawn anew for each step; None measures all.
        seed: of the generator that draws the rows.
        accumulate: backward passes per optimizer step in the caller's own gradient accumulation. With loss_reduction='mean' each pass's loss
            is its mean divided by `accumulate`.
        ignore: names of modules that are left out, with all below them; their parameters count neither in the norms nor in ‖g‖².
        param_groups: lists of parameters whose moments are wanted apart (`GradientMoments.by_group`), as in an optimizer's param_groups.
        capacity: the largest batch to expect. Grows on demand in eager mode; under torch.compile it must be given.
        layout: what adabatch.check found; without it the samples are assumed to lie along dimension 0 everywhere.
        per_parameter: also give the norms of each parameter (`by_parameter`).
        second_moment: also give Σ_i g_i², elementwise, of each parameter (`second_moment`).
        preconditioner: parameter -> P of its shape, or None: give Σ P∘Σ_i g_i² of each parameter instead, a number (see adabatch.preconditioners).
        inner_products: also give ⟨g_i, g⟩ (`inner_products`), and with them a steadier trace, its standard error and interval. The measured rows of all layers' activations and
            output gradients are kept until the step's last backward pass has ended; not under torch.compile. Under DistributedDataParallel g is the gradient
            averaged over the processes, g_i are this process's samples.
        grad_scaler: the GradScaler that scales the loss. Its scale is read when a backward pass ends, before scaler.update() can change it.

    Attributes:
        shard: what is known of batches that several processes share; of one process alone to begin with. What collect() then gives is this process's part.
        loss_scale: the `LossScale`; loss_scale.watch(optimizer), as wrap does, lets collect() refuse steps by a GradScaler that was not given.
        by_samples: the passes of a step are micro-batches that weigh by their samples (see pool_passes). It and accumulate may be set between steps.

    Raises:
        ValueError: on attaching, listing all layers that cannot be measured exactly, with the cure.
        RuntimeError: from loss.backward(), when the pass cannot be measured exactly (layers that saw another number of rows, higher-order gradients).

    Shapes and units: `sq_norms` [S], float32 (float64 if any parameter is), of per-sample gradients of the per-sample loss: the loss reduction is undone.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> hooks = GradSampleHooks(model)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> moments = hooks.collect()
        >>> moments.batch_size, tuple(moments.sq_norms.shape)
        (8, (8,))
        >>> hooks.remove()
    """

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
        layout: Any = None,
        per_parameter: bool = False,
        second_moment: bool = False,
        preconditioner: Preconditioner | None = None,
        inner_products: bool = False,
        grad_scaler: Any = None,
    ):
        check_arguments(loss_reduction, samples=samples, accumulate=accumulate, capacity=capacity)
        param_groups = None if param_groups is None else [list(group) for group in param_groups]
        plan = plan_layers(model, ignore, only=None if param_groups is None else {id(parameter) for group in param_groups for parameter in group})
        self.loss_reduction, self.accumulate, self.by_samples = loss_reduction, accumulate, False
        self.shard = BatchShard()
        self.on_backward_end: list[Any] = []
        self.parameters = plan.parameters
        if inner_products:
            check_not_compiled(model, plan.parameters)
        self._row_sampler = RowSampler(samples, seed, capacity)
        self._probe_rows = ProbeRows(plan.parameters, param_groups, per_parameter)
        self._second_moment, self._dots, self.loss_scale = second_moment, inner_products, LossScale(grad_scaler)
        self._stash = BackwardRecorder()
        self._stash.second_moments = SecondMoments.wanted(plan.parameters, second_moment, preconditioner)
        self.sites = TapSite.all_of(plan, self._probe_rows.row_of, self._stash, getattr(layout, "layouts", {}))
        for site in self.sites:
            site.deferred |= inner_products
        wide = any(parameter.dtype == torch.float64 for parameter in plan.parameters.values())
        on_complete = functools.partial(queue_finish, weakref.ref(self))
        self._probes = ProbeSet(len(self._probe_rows), len(self.sites), capacity, torch.float64 if wide else torch.float32, self._row_sampler, on_complete)
        for name, parameter in plan.parameters.items():
            probe = self._probes.on(parameter.device)
            if self._stash.second_moments is not None:
                probe.second_moment(name, parameter.shape)
        source = getattr(layout, "batch_size_source", None)
        self._placer = ForwardHooks(self.sites, plan.parameters, plan.traced, self._probes, self._row_sampler, self._stash, source)
        self._harvested_task = -1
        self._mixing, self._seen = [False], set()
        self._grad_sq_norms = torch.zeros(len(self._probe_rows))
        self.reset()
        self._placer.attach(unwrap(model), self)
        self._attached = True

    @property
    def statistics(self) -> frozenset[str]:
        """What is measured beside norms: 'inner_products', 'second_moment', 'preconditioned_trace' (which a second moment tells as well)."""
        wanted = {"inner_products": self._dots, "second_moment": self._second_moment, "preconditioned_trace": self._stash.second_moments is not None}
        return frozenset(name for name, measured in wanted.items() if measured)

    @property
    def enabled(self) -> bool:
        """Whether forward passes are measured; may be set between steps."""
        return self._placer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._placer.enabled = value

    @property
    def n_passes(self) -> int:
        """Measured backward passes since the last collect()."""
        return self._n_passes

    @property
    def samples(self) -> int | None:
        """How many samples of each batch are measured; None for all. May be set between steps."""
        return self._row_sampler.samples

    @samples.setter
    def samples(self, value: int | None) -> None:
        check_arguments(self.loss_reduction, samples=value)
        self._row_sampler.choose(value)
        self._probes.reserve_keys()

    def cost(self) -> StepCost:
        """What measuring costs by the cost model, from the shapes of the last measured forward pass; the same on every process that saw the same shapes."""
        seen = [(site.layer, *site.shapes, site.sampler is None) for site in self.sites if site.shapes is not None]
        return step_cost(seen, sum(parameter.numel() for parameter in self.parameters.values()), self._placer.operation_shapes.values(), self.statistics)

    def _harvest(self) -> None:
        """Runs in the engine's last callback of a backward pass: every layer has reported, and the gradients are complete, also under DDP."""
        try:
            with autocast_disabled(self._probes.home):
                self._take_pass()
            for callback in self.on_backward_end:
                callback()
        except Exception:
            self.reset()  # half of a pass must not be collected by a caller who goes on
            raise

    def _take_pass(self) -> None:
        # On accelerators, after the first pass, the reports are read one step later.
        late = self._placer.forward_sizes.known_batch_size(self._probes.home, first=not self._seen)
        notes = self._stash.drain(self._harvested_task)
        norms, reports, moments = self._probes.drain(self._harvested_task, notes.reports(len(self.sites)), late)
        batch_size = late if isinstance(reports, Tensor) else batch_size_of(reports, self.sites, self._placer.input_sizes)
        notes.add_norms(norms, self._probes.to_result_device)
        uses = notes.uses
        repeated = add_uses(norms, moments, uses, self._probe_rows.row_of, self._stash.second_moments, self._probes.to_result_device, self._stash.shares)
        for site in self.sites if repeated else ():
            site.deferred |= not repeated.isdisjoint(site.parameters.values())
        for index, site in enumerate(self.sites):
            site.calls = 0 if isinstance(reports, Tensor) else max(0, site.calls - round(reports[index][0]))
        seen = check_backward(self, reports, uses) if late is None else set()
        if late is not None:
            self._late.append(BackwardChecks.of(reports, self, late, {use.parameter for use in uses}))
        self._n_passes += 1
        rows = self._row_sampler.rows(batch_size, self._probes.home)
        self._passes = [*self._passes, BackwardPass(batch_size, norms, rows, moments, share=self.shard.fraction)][-self.accumulate :]
        self.loss_scale.read()
        if self._dots and self._n_passes <= self.accumulate:
            self._held.append(DeferredInnerProducts(uses))
        if self._n_passes >= self.accumulate:
            check_gradients_left(seen, self.parameters, self.sites)
            self._grad_sq_norms = self.shard.grad_sq_norms(self._probe_rows.groups)
            if self._stash.second_moments is not None:
                self._passes[-1].preconditioned = gradient_shares(self._stash.second_moments)
            for step, held in zip(self._passes, self._held, strict=False):
                step.inner_products = held.inner_products(self.parameters, self._probe_rows.row_of, self._probes.to_result_device)
            self._held.clear()

    def collect(self, *, loss_scale: float | None = None, weights: Tensor | Sequence[float] | None = None) -> GradientMoments:
        """Moments of the step: of all backward passes since the last collect().

        Args:
            loss_scale: the factor on the loss. With a GradScaler pass grad_scaler= to the hooks instead: scaler.get_scale() is another number after
                scaler.update().
            weights: of the samples of the step [m], pass after pass, where the loss is a mean over unequal shares of them: the numbers of tokens of a mean
                over all tokens of a padded batch. On any scale; of accumulated passes each has its own weighted mean, divided by `accumulate`. Needs inner_products.

        Raises:
            RuntimeError: no measured backward pass, or another number of them than `accumulate`.
            ValueError: weights without inner_products or that do not fit the samples; a loss_scale that is no positive number, or beside a grad_scaler.
        """
        return self.observe(loss_scale=loss_scale, weights=weights).moments()

    def observe(self, *, loss_scale: float | None = None, weights: Tensor | Sequence[float] | None = None) -> PendingMoments:
        """As collect(), without waiting for an accelerator: its numbers are copied while training goes on. Call moments() on what it gives, a step later.

        On an accelerator the first measured backward pass is checked at once, and waits; the checks of the others raise in moments(). So does every pass
        of a compiled model, of which only the device knows how many samples it had.

        Raises:
            RuntimeError: no measured backward pass, or another number of them than `accumulate`.
        """
        if not self._n_passes:
            raise RuntimeError(passes.NOTHING_MEASURED)
        try:
            return self._pool(loss_scale, weights)
        finally:
            self.reset()

    def _pool(self, loss_scale: float | None, weights: Tensor | Sequence[float] | None) -> PendingMoments:
        if self._n_passes != self.accumulate:
            raise RuntimeError(
                f"saw {self._n_passes} backward passes since the last collect(), but accumulate={self.accumulate}: pass accumulate=k for k backward passes per "
                "step, and pause the hooks (hooks.paused()) around backward passes that do not belong to it"
            )
        rows = self._probe_rows
        options = {"loss_reduction": self.loss_reduction, "group_of_row": rows.group_of_row, "row_names": rows.names, "weights": weights}
        options |= {"by_samples": self.by_samples, "world_size": self.shard.world_size}
        return PendingMoments(self._passes, self._grad_sq_norms, self.loss_scale.noted(loss_scale), self._late, options)

    def set_norm_weights(self, shares: dict[str, float]) -> None:
        """Take each parameter's norms times its share: of a model that several processes hold in parts."""
        self._stash.shares = shares

    def check_loss(self, loss: Tensor) -> None:
        """Check that the differentiated loss reaches the measured parameters through their layers alone. Cheap: the graph is walked down to the taps only.

        Raises:
            RuntimeError: listing the parameters used outside the model's forward pass, in the loss function or in a penalty inside the loss.
        """
        check_uses_seen(loss, self.parameters, self._probes.reports)

    def reset(self) -> None:
        """Forget what was measured since the last collect(), e.g. after a backward pass that failed half way, and draw new rows."""
        self._passes: list[BackwardPass] = []
        self._held: list[DeferredInnerProducts] = []
        self._late: list[BackwardChecks] = []
        self.loss_scale.clear()
        self._n_passes = 0
        self._placer.recomputing_task = -1
        self._placer.input_sizes.clear()
        self._placer.forward_sizes.clear()
        self._row_sampler.redraw()
        self._stash.clear()
        self._probes.forget()
        for site in self.sites:
            site.calls = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is measured inside: forward passes add no node to the graph."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def remove(self) -> None:
        """Take all hooks off the model. Nothing else was ever put on it."""
        self._placer.remove()
        self.loss_scale.remove()
        self._probes.clear()
        self._attached = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the row draws, so that a resumed run measures the same rows."""
        return {"version": 2, "rows": self._row_sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict()."""
        check_version(state, 2, "GradSampleHooks")
        self._row_sampler.load_state_dict(state["rows"])
