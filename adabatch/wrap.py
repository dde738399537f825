"""wrap: wires hooks, loader and scheduler in one call. Nothing imports this module but the package itself."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from adabatch.check import CheckReport
from adabatch.controllers import CABS
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.distributed.setup import DistributedSetup
from adabatch.estimators.cross_rank import CrossRankEstimator
from adabatch.estimators.micro_batch import MicroBatchEstimator
from adabatch.estimators.null import NullEstimator
from adabatch.grad_sample import GradSampleHooks
from adabatch.micro_batches.search import LossFn
from adabatch.micro_batches.optimizer import MicroBatching
from adabatch.preconditioners import preconditioner_reader
from adabatch.scheduler.arguments import bind_controller, check_switches, needs_moments
from adabatch.scheduler.effective_lr import EffectiveLr
from adabatch.scheduler.plan import DEFAULT_OVERHEAD, budget_of_wrap
from adabatch.scheduler.scheduler import BatchSizeScheduler
from adabatch.scheduler.sizing import SizeRule


def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader | AdaptiveDataLoader,
    *,
    controller: Any = None,
    min_batch_size: int = 16,
    max_batch_size: int = 2048,
    overhead: float | None = DEFAULT_OVERHEAD,
    loss_reduction: str = "mean",
    samples: int | None = None,
    accumulate: int = 1,
    ignore: Collection[str] = (),
    layout: CheckReport | None = None,
    seed: int = 0,
    inner_products: bool = False,
    grad_scaler: Any = None,
    effective_lr: EffectiveLr | None = None,
    max_micro_batch_size: int | str | None = None,
    loss_fn: LossFn | None = None,
    estimator: str = "per_sample",
    lr_scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    per_parameter: bool = False,
    group: Any = None,
    comm_hook: Any = None,
    comm_state: Any = None,
    **scheduler_options: Any,
) -> tuple[Optimizer, AdaptiveDataLoader, BatchSizeScheduler]:
    """Let a training loop choose its own batch size.

    The loop stays as it was; after optimizer.step() it calls scheduler.step(loss). The first batch has the loader's own size, clipped to the bounds.

    Args:
        model: any module whose trainable layers have a grad_sample rule. Wrap before the first compiled run.
        optimizer: torch.optim.SGD; with CABS also Adam, AdamW, RMSprop or Adagrad; any other with effective_lr=. The parameters it holds are the ones measured.
        loader: a map-style DataLoader with a batch_size. A shuffling one gets an order keyed by a seed drawn from its generator; sampler,
            collate_fn, workers, pinning, generator and worker_init_fn are kept.
        controller: default adabatch.CABS(). Where neither it nor the coupling needs moments (controllers.Scheduled, Seesaw, OnlineSelection), the model is
            measured only if overhead=, samples=, inner_products= or every= asks for it.
        min_batch_size, max_batch_size: bounds of a step's size, in samples.
        overhead: the share of a step that measuring may cost on average, by a cost model of the model's layers: the samples measured and the interval follow
            from it, see `adabatch.scheduler.plan.Budget` and scheduler.measurement. None measures all samples at every step.
        loss_reduction: 'mean' or 'sum', of the loss that is differentiated.
        samples: measure so many samples of each batch, at every step or one in every=, instead of what the default overhead chooses.
        accumulate: backward passes per optimizer step in the caller's own accumulation; the loader's batches are that much smaller than the step's. The
            number of batches in an epoch is not known beforehand: count the passes on from epoch to epoch, so that a step may span two.
        ignore: names of modules to leave out of the measurement.
        layout: what adabatch.check(model, batch, loss_fn) found, for models whose layers do not all see their samples along dimension 0.
        seed: of the choice of measured samples.
        inner_products: measure inner products with the mean gradient too, which scheduler.step(loss, weights=...) needs; a controller that
            needs them asks for them itself. See GradSampleHooks.
        grad_scaler: the GradScaler that scales the loss under float16; scheduler.step(loss) takes the loss without its scale.
        effective_lr: a callable of a param group, for optimizers other than SGD.
        max_micro_batch_size: a larger batch arrives as nearly equal micro-batches, through the same loop: optimizer.step() steps on the last of them,
            scheduler.step(loss) pools their losses and moments. 'auto' finds the largest that fits (see find_micro_batch_size), with loss_fn.
        loss_fn: (model, batch) -> the loss that is differentiated, for 'auto'.
        estimator: 'per_sample', or 'micro_batch': from the gradients of micro-batches, at least two a batch, for models that cannot be measured per sample;
            or 'cross_rank': from the gradients of at least two processes, at no cost.
        lr_scheduler, max_grad_norm: run by optimizer.step() after the last micro-batch's step, and before it. So is grad_scaler's whole part, where any of
            these or max_micro_batch_size is given. CABS is told of the clipping.
        per_parameter: record each parameter's moments too, for scheduler.diagnostics.layers(); with a controller that needs none, this asks to measure.
        group: where a process group is initialised: the processes that share each batch, a ProcessGroup or DeviceMesh; default all. Beside tensor
            parallelism it is the data-parallel part of the mesh. All sizes are then those of the whole batch. Every process calls wrap with the same arguments.
        comm_hook, comm_state: for 'cross_rank', a communication hook of DistributedDataParallel's that averages (compresses) in place of the default.
        scheduler_options: of BatchSizeScheduler: multiple_of, every, dwell, hysteresis, confidence, ladder, spill, short_batch, coupling, base_batch_size,
            scale_betas, diagnostics.

    Returns:
        (optimizer, loader, scheduler): the optimizer itself, or around it one that waits for the last micro-batch; the adaptive loader to iterate over; and
        the scheduler.

    Raises:
        ValueError: layers that cannot be measured exactly (all listed), bounds out of order, arguments that do not go together, processes that are set up
            differently.
        RuntimeError: several processes were launched, but no process group is initialised.
        TypeError: a loader or optimizer of another kind, a keyword that is not known.

    Example:
        >>> import torch
        >>> model, data = torch.nn.Linear(4, 1), torch.utils.data.TensorDataset(torch.randn(64, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer, loader, scheduler = wrap(model, optimizer, DataLoader(data, batch_size=8, shuffle=True), min_batch_size=8, max_batch_size=64)
        >>> for (inputs,) in loader:
        ...     optimizer.zero_grad()
        ...     loss = (model(inputs) - 1).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step(loss)
        >>> scheduler.diagnostics.latest.samples_seen
        64
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    SizeRule(min_batch_size, max_batch_size)  # refuses what are no bounds under their names here, before the hooks reserve room for the largest size
    _check_names(scheduler_options)
    _check_arguments(seed, layout, ignore, estimator, comm_hook=comm_hook, comm_state=comm_state, inner_products=inner_products, per_parameter=per_parameter)
    settings = {"min_batch_size": min_batch_size, "max_batch_size": max_batch_size, "loss_reduction": loss_reduction, "samples": samples}
    settings |= {"accumulate": accumulate, "ignore": ignore, "seed": seed, "inner_products": inner_products, "max_micro_batch_size": max_micro_batch_size}
    settings |= {"controller": controller, "estimator": estimator, "max_grad_norm": max_grad_norm, "per_parameter": per_parameter, **scheduler_options}
    parallel = DistributedSetup.find(group, estimator, model)
    adaptive = _adaptive(loader, parallel, model, optimizer, settings)
    samples = samples if parallel is None else parallel.samples_here(samples)
    coupling = scheduler_options.get("coupling", "none")
    controller = CABS() if controller is None and coupling != "seesaw" else controller
    if max_grad_norm is not None and hasattr(controller, "clips"):
        controller.clips(max_grad_norm)
    needs = bind_controller(controller, optimizer, effective_lr)
    asked = samples is not None or inner_products or per_parameter or "every" in scheduler_options or overhead is not DEFAULT_OVERHEAD
    overhead = budget_of_wrap(overhead, samples, scheduler_options)
    micro = MicroBatching(adaptive, max_micro_batch_size, accumulate, estimator, loss_fn)
    common: dict[str, Any] = {"loss_reduction": loss_reduction, "grad_scaler": grad_scaler}
    hooks: Any
    if estimator == "micro_batch":
        hooks = MicroBatchEstimator([parameter for params in _groups(optimizer) for parameter in params], adaptive.micro_batches, **common)
    elif estimator == "cross_rank":
        hooks = CrossRankEstimator(model, parallel.shard, accumulate=accumulate, comm_hook=comm_hook, comm_state=comm_state, **common)
    elif asked or needs_moments(controller, coupling):
        common |= {"samples": samples, "seed": seed, "accumulate": accumulate, "ignore": ignore, "layout": layout, "inner_products": inner_products or "inner_products" in needs}
        common |= {"capacity": max_batch_size, "per_parameter": per_parameter}
        hooks = _hooks(model, optimizer, needs, common)
    else:
        hooks = NullEstimator(accumulate, loss_reduction)
    scheduler, before = None, (adaptive.batch_size, adaptive.drop_last)
    try:
        micro.find_limit(model, optimizer, hooks, max_batch_size)
        if parallel is not None:
            parallel.agree_on_limit(adaptive)
        options = {"min_batch_size": min_batch_size, "max_batch_size": max_batch_size, "effective_lr": effective_lr, **scheduler_options}
        options["overhead"] = None if overhead is DEFAULT_OVERHEAD and hooks.cost() is None else overhead
        scheduler = BatchSizeScheduler(optimizer, adaptive, hooks, controller, **options)
        if parallel is not None:
            parallel.join(model, hooks, scheduler, between_processes=estimator == "cross_rank")
        optimizer = micro.accumulating(optimizer, hooks, grad_scaler=grad_scaler, lr_scheduler=lr_scheduler, max_grad_norm=max_grad_norm)
    except Exception:
        (hooks if scheduler is None else scheduler).remove()
        micro.undo()
        adaptive.batch_size, adaptive.drop_last = before
        raise
    return optimizer, adaptive, scheduler


def _adaptive(
    loader: DataLoader | AdaptiveDataLoader, parallel: DistributedSetup | None, model: nn.Module, optimizer: Optimizer, settings: dict[str, Any]
) -> AdaptiveDataLoader:
    """The adaptive loader, of all processes that share each batch, whose set-ups are compared."""
    if parallel is None:
        return loader if isinstance(loader, AdaptiveDataLoader) else AdaptiveDataLoader.from_loader(loader)
    adaptive = parallel.take_loader(loader, summed=settings["loss_reduction"] == "sum")
    parallel.check_same(model, optimizer, adaptive, settings)
    return adaptive


def _hooks(model: nn.Module, optimizer: Optimizer, needs: Collection[str], options: dict[str, Any]) -> GradSampleHooks:
    """Hooks on the parameters that the optimizer holds, with what the controller needs beside norms."""
    preconditioner = preconditioner_reader(optimizer) if "preconditioned_trace" in needs else None
    return GradSampleHooks(model, param_groups=_groups(optimizer), second_moment="second_moment" in needs, preconditioner=preconditioner, **options)


def _groups(optimizer: Optimizer) -> list[list[Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _check_names(scheduler_options: Collection[str]) -> None:
    """Refuse a keyword that neither wrap nor BatchSizeScheduler takes, as wrap's own."""
    own = inspect.signature(wrap).parameters.keys()
    passed_on = {name for name, each in inspect.signature(BatchSizeScheduler).parameters.items() if each.kind is each.KEYWORD_ONLY}
    for name in scheduler_options:
        if name not in passed_on:
            near = difflib.get_close_matches(name, [*own - {"scheduler_options"}, *passed_on - own], n=1)
            cure = f"did you mean {near[0]}=?" if near else f"beside its own it takes {', '.join(sorted(passed_on - own))}"
            raise TypeError(f"wrap() got an unexpected keyword argument {name!r}: {cure}")


def _check_arguments(
    seed: int, layout: CheckReport | None, ignore: Collection[str], estimator: str, *, comm_hook: Any, comm_state: Any, inner_products: bool, per_parameter: bool
) -> None:
    """Refuse arguments that nothing else looks at."""
    check_switches(inner_products=inner_products, per_parameter=per_parameter)
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if layout is not None:
        _check_layout(layout, ignore)
    if per_parameter and estimator != "per_sample":
        raise ValueError(f"per_parameter=True needs estimator='per_sample', got {estimator!r}: the other estimators see the gradient as a whole")
    given = [name for name, value in (("comm_hook", comm_hook), ("comm_state", comm_state)) if value is not None]
    if given and estimator != "cross_rank":
        raise ValueError(
            f"only estimator='cross_rank' takes {'= and '.join(given)}=, got estimator={estimator!r}: pass estimator='cross_rank', or give the hook to the "
            "model itself, model.register_comm_hook(state, hook)"
        )


def _check_layout(layout: CheckReport, ignore: Collection[str]) -> None:
    """Refuse a model some of whose layers check refused, unless they are left out."""
    if not isinstance(layout, CheckReport):
        raise TypeError(f"layout must be what adabatch.check(model, batch, loss_fn) returned, got {layout!r}")
    refused = {name: why for name, why in layout.refused.items() if not any(name == prefix or name.startswith(prefix + ".") for prefix in ignore)}
    if refused:
        lines = "\n".join(f"  - {name}: {why}" for name, why in refused.items())
        raise ValueError(f"adabatch.check refused these layers; mend them, or leave them out with ignore={sorted(refused)}:\n{lines}")
