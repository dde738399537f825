"""wrap: wires estimator, loader and scheduler in one call."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DataLoader

from adabatch._checks import suggest_keywords
from adabatch._types import Argument, Batch, Kwargs
from adabatch.config import (
    DEFAULT_SHARE, BatchSizes, Coupling, CouplingRule, CrossRank, EstimatorOptions, Every, Measure,
    MicroBatch, MicroBatches, PerSample, checked_together, measure_of, plain,
)
from adabatch.controllers import CABS
from adabatch.data.loader import AdaptiveDataLoader
from adabatch.diagnostics import Diagnostics
from adabatch.distributed.setup import DistributedSetup
from adabatch.estimators.cross_rank import CrossRankEstimator
from adabatch.estimators.gradients import check_arguments
from adabatch.estimators.loss_scale import LossScale
from adabatch.estimators.micro_batch import MicroBatchEstimator
from adabatch.estimators.null import NullEstimator
from adabatch.grad_sample import GradSampleHooks
from adabatch.grad_sample.statistics import PreconditionedTrace, statistics_of
from adabatch.grad_sample.taps.placement import put_all_back
from adabatch.interfaces import Estimator, Proposer, RunContext
from adabatch.micro_batches.optimizer import AccumulatingOptimizer, MicroBatching
from adabatch.micro_batches.single_samples import naming_batch_norm
from adabatch.preconditioners import preconditioner_reader
from adabatch.scheduler.decision import as_controller
from adabatch.scheduler.lr import is_scaled
from adabatch.scheduler.record import Recorder
from adabatch.scheduler.scheduler import (BatchSizeScheduler, check_optimizer, needs_moments,
                                          without_moments)

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

# What calls of wrap() attached: {estimator: (optimizer, scheduler, what undoes the loader's part)}.
_wrapped: weakref.WeakKeyDictionary[Estimator, tuple[
    weakref.ref[Optimizer], weakref.ref[BatchSizeScheduler], Callable[[], None]]]
_wrapped = weakref.WeakKeyDictionary()
KINDS = {PerSample: "per_sample", MicroBatch: "micro_batch", CrossRank: "cross_rank"}


@suggest_keywords
def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Batch] | AdaptiveDataLoader,
    *,
    controller: Proposer | None = None,
    batch_sizes: BatchSizes | tuple[int, int] = BatchSizes(),  # noqa: B008
    coupling: Coupling | str | CouplingRule = "none",
    measure: Measure = "auto",
    estimator: EstimatorOptions | None = None,
    micro_batches: MicroBatches | int | None = None,
    loss_reduction: str = "mean",
    accumulate: int = 1,
    grad_scaler: GradScaler | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    diagnostics: Diagnostics | None = None,
) -> tuple[Optimizer, AdaptiveDataLoader, BatchSizeScheduler]:
    """Let a training loop choose its own batch size.

    The loop stays as it was; after optimizer.step() it calls scheduler.step(loss). The first batch
    has the loader's own size, clipped to the bounds.

    Args:
        model: any module; layers without a grad_sample rule are run again for each sample, and
            what cannot be exact is refused. Wrap before the first compiled run.
        optimizer: torch.optim.SGD; with CABS also Adam, AdamW, RMSprop or Adagrad; others with a
            controller that is given an effective_lr. Its parameters are the ones measured.
        loader: a map-style DataLoader with a batch_size. A shuffling one gets an order keyed by a
            seed drawn from its generator; all other options are kept.
        controller: proposes the batch size; default adabatch.CABS(), with coupling="seesaw"
            controllers.Seesaw().
        batch_sizes: (minimum, maximum) of a step, in samples, or `BatchSizes`.
        coupling: how the lr follows the batch size: a rule's name, a callable, or `Coupling`.
        measure: "auto": a share of 0.05 of the training time where controller, coupling or
            estimator= need moments, nothing where they do not; a share, which a cost model of the
            layers turns into samples and interval (`scheduler.measurement_plan`), held against the
            clock, so that two runs may measure other steps; `Every(k)`; "all" for every sample of
            every step: runs are then the same again; None for nothing. MicroBatch and CrossRank,
            whose cost is small, measure at every step or as Every(k) says.
        estimator: `PerSample` (the default), `MicroBatch` or `CrossRank`.
        micro_batches: the most samples that arrive at once, or `MicroBatches`: the loop gets larger
            batches as nearly equal micro-batches; optimizer.step() steps on the last of them.
        loss_reduction: "mean" or "sum", of the loss that is differentiated.
        accumulate: backward passes per optimizer step in the user's own accumulation, counted from
            epoch to epoch; the loader's batches are that much smaller than the step's.
        grad_scaler: the GradScaler that scales the loss under float16; scheduler.step(loss) takes
            the loss without its scale.
        process_group: the processes that share each batch, where torch.distributed is initialised:
            a ProcessGroup or DeviceMesh (with tensor parallelism its data-parallel part); default
            all. All sizes are then those of the whole batch. Every process calls wrap with the same
            arguments.
        diagnostics: a history to append to; default a new one.

    Returns:
        (optimizer, loader, scheduler): the optimizer itself, or around it one that waits for the
        last micro-batch; the adaptive loader to iterate over; and the scheduler.

    Raises:
        ValueError: layers that cannot be measured exactly (all listed), options that do not go
            together, a model that GradSampleHooks or a monitor measures already, processes set up
            differently. What an earlier call of wrap() put on them is removed, with a warning.
        RuntimeError: several processes were launched, but no process group is initialised.
        TypeError: a loader or optimizer of another kind, an unknown keyword.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4))
        >>> optimizer, loader, scheduler = wrap(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1),
        ...     DataLoader(data, batch_size=8, shuffle=True), batch_sizes=(8, 64))
        >>> for (inputs,) in loader:
        ...     optimizer.zero_grad()
        ...     loss = (model(inputs) - 1).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step(loss)
        >>> scheduler.diagnostics.latest.samples_seen
        64
    """
    check_optimizer(optimizer)
    accumulate = plain(accumulate)
    sizes, lr_rule, micro_options, measured, how, chosen, *_ = checked_together(
        lambda: BatchSizes.of(batch_sizes), lambda: Coupling.of(coupling),
        lambda: MicroBatches.of(micro_batches), lambda: measure_of(measure),
        lambda: estimator_options(estimator),
        lambda: None if controller is None else as_controller(controller),
        *run_checks(loss_reduction, accumulate, grad_scaler, diagnostics))
    optimizer = _unwrapped(model, optimizer)
    check_not_hooked(model)
    settings = {
        "controller": controller, "loss_reduction": loss_reduction, "accumulate": accumulate,
        "measure": measured, "max_micro_batch_size": micro_options.size,
        "max_grad_norm": micro_options.max_grad_norm, "estimator": KINDS[type(how)],
        **_settings(sizes), **_settings(lr_rule), **_settings(how, but=("layout", "comm_hook")),
    }
    parallel = DistributedSetup.find(process_group, KINDS[type(how)], model)
    adaptive = _adaptive(loader, parallel, model, optimizer, settings)
    if chosen is None and lr_rule.rule != "seesaw":
        chosen = CABS()
    if chosen is not None:
        chosen.bind(RunContext(optimizer, max_grad_norm=micro_options.max_grad_norm))
    needs: frozenset[str] = frozenset() if chosen is None else chosen.requires
    micro = MicroBatching(
        adaptive, micro_options.size, accumulate, KINDS[type(how)], micro_options.loss_fn)
    adaptive.micro_batches.single = naming_batch_norm(model, adaptive.micro_batches)
    needed = needs_moments(chosen, lr_rule.rule)
    interval, share = plan_of(measured, how, needed)
    if interval is not None or share is not None:
        check_one_pass(optimizer)
    samples = interval.samples if interval is not None else None
    samples = samples if parallel is None else parallel.samples_here(samples)
    hooks: Estimator
    if interval is None and share is None:
        if needed and measure is None:
            names, fixes = without_moments(chosen, lr_rule.rule)
            raise ValueError(f"{names} gradient moments, got measure=None: omit measure=, or use "
                             f"{fixes}")
        hooks = NullEstimator(accumulate, loss_reduction)
    elif isinstance(how, MicroBatch):
        parameters = [each for params in _groups(optimizer) for each in params]
        hooks = MicroBatchEstimator(
            parameters, adaptive.micro_batches, loss_reduction=loss_reduction)
    elif isinstance(how, CrossRank):
        assert parallel is not None  # find() requires a process group
        hooks = CrossRankEstimator(
            model, parallel.shard, accumulate=accumulate, loss_reduction=loss_reduction,
            comm_hook=how.comm_hook, comm_state=how.comm_state)
    else:
        hooks = per_sample_hooks(
            model, optimizer, how, needs, samples=samples, accumulate=accumulate,
            capacity=sizes.maximum, loss_reduction=loss_reduction)
    scheduler, before = None, (adaptive.batch_size, adaptive.drop_last)
    try:
        micro.find_limit(model, optimizer, hooks, sizes.maximum)
        if parallel is not None:
            parallel.agree_on_limit(adaptive)
        scheduler = BatchSizeScheduler(
            optimizer, adaptive, hooks, chosen, batch_sizes=sizes, coupling=lr_rule,
            measure=share if interval is None else Every(interval.k), grad_scaler=grad_scaler,
            diagnostics=diagnostics)
        scheduler.process_group = process_group
        if parallel is not None:
            parallel.join(model, hooks, scheduler, between_processes=isinstance(how, CrossRank))
        if not isinstance(hooks, (NullEstimator, MicroBatchEstimator)):
            warn_of_foreign_parameters(model, optimizer)
        inner, optimizer = optimizer, micro.accumulating(
            optimizer, hooks, grad_scaler=grad_scaler, lr_scheduler=micro_options.lr_scheduler,
            max_grad_norm=micro_options.max_grad_norm)
        _wrapped[scheduler.estimator] = weakref.ref(inner), weakref.ref(scheduler), micro.undo
    except Exception:
        (hooks if scheduler is None else scheduler).remove()
        micro.undo()
        adaptive.batch_size, adaptive.drop_last = before
        raise
    return optimizer, adaptive, scheduler


def plan_of(
    measure: float | Every | Literal["auto"] | None, how: EstimatorOptions, needed: bool
) -> tuple[Every | None, float | None]:
    """(interval, share of the training time): one of the two, or neither to measure nothing.

    Args:
        measure: from measure_of().
        how: the estimator's options; those that request a record of their own count as a need.
        needed: whether controller or coupling reads moments.
    """
    if not isinstance(how, PerSample):
        if isinstance(measure, float) or (isinstance(measure, Every) and measure.samples):
            raise ValueError(
                f"measure={measure!r} chooses among samples, which estimator={type(how).__name__}"
                "() does not measure: omit measure=, or pass adabatch.Every(k)")
        return Every(1) if measure == "auto" else measure, None
    if isinstance(measure, Every):
        return measure, None
    if isinstance(measure, float) or measure is None:
        return None, measure
    needed = needed or how.per_parameter or how.inner_products or bool(how.statistics)
    return None, DEFAULT_SHARE if needed else None


def run_checks(
    loss_reduction: str, accumulate: int, grad_scaler: GradScaler | None,
    diagnostics: Diagnostics | None,
) -> tuple[Callable[[], object], ...]:
    """Checks of what wrap and monitor both take, for checked_together()."""
    return (lambda: check_arguments(loss_reduction),
            lambda: check_arguments("mean", accumulate=accumulate),
            lambda: LossScale(grad_scaler), lambda: diagnostics is None or Recorder(diagnostics))


def estimator_options(given: EstimatorOptions | None) -> EstimatorOptions:
    """PerSample() for None; ValueError: anything but estimator options."""
    if given is None:
        return PerSample()
    if not isinstance(given, (PerSample, MicroBatch, CrossRank)):
        raise ValueError(
            "estimator must be None, adabatch.PerSample(...), adabatch.MicroBatch() or "
            f"adabatch.CrossRank(...), got {given!r}; an Estimator of your own is passed to "
            "adabatch.BatchSizeScheduler(optimizer, adabatch.AdaptiveDataLoader(...), estimator)")
    return given


def per_sample_hooks(
    model: nn.Module, optimizer: Optimizer, how: PerSample, needs: frozenset[str],
    **options: Argument,
) -> GradSampleHooks:
    """Hooks on the parameters that the optimizer holds, with the statistics in `needs`."""
    names = needs | {"inner_products"} if how.inner_products else needs
    given = statistics_of(how.statistics)
    statistics = [*given, *(
        PreconditionedTrace(preconditioner_reader(optimizer)) if name == "preconditioned_trace"
        else name for name in sorted(names - {each.name for each in given}))]
    return GradSampleHooks(
        model, param_groups=_groups(optimizer), statistics=statistics, layout=how.layout,
        ignore=how.ignore, seed=how.seed, per_parameter=how.per_parameter, **options)


def _unwrapped(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Undo earlier calls of wrap() for this model or optimizer, with a warning; the user's own
    optimizer. Measurement that others attached stays."""
    if isinstance(optimizer, AccumulatingOptimizer):
        optimizer.remove()
        optimizer = optimizer.optimizer
    owners = _owners(model)
    for hooks, (stepped, reference, undo) in list(_wrapped.items()):
        if hooks not in owners and not (stepped() is optimizer and is_scaled(optimizer)):
            continue
        scheduler = reference()
        (hooks if scheduler is None else scheduler).remove()
        undo()
        warnings.warn(
            "this model or optimizer was wrapped before: what the earlier call put on them is "
            "removed, and its scheduler and loader are out of use. Call wrap() once, or "
            "scheduler.remove() before it is called again", stacklevel=4)
    return optimizer


def _owners(model: nn.Module) -> set[GradSampleHooks]:
    """Those that measure the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    put_all_back()
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    owners = (getattr(hook, "owner", None) for hook in hooks)
    return {owner for owner in owners if isinstance(owner, GradSampleHooks)}


def warn_of_foreign_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn of parameters that the optimizer steps and the model does not hold."""
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [each for params in _groups(optimizer) for each in params
               if each.requires_grad and id(each) not in own]
    if foreign:
        shapes = ", ".join(str(list(each.shape)) for each in foreign[:3])
        warnings.warn(
            f"the optimizer also holds {len(foreign)} parameters that are not the model's (of "
            f"shapes {shapes}{', …' if len(foreign) > 3 else ''}): variance, gradient norm and "
            "batch size are those of the model's parameters alone. Pass a module that holds all "
            "that is trained, torch.nn.ModuleList([model, other]), as the model; or step the "
            "others with an optimizer of their own", stacklevel=4)


def check_one_pass(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer whose step has several backward passes."""
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "a step of LBFGS has several backward passes over the same samples, of which none is "
            "the step's: it cannot be measured. Use a controller that measures nothing, "
            "controllers.Scheduled(...), or another optimizer")


def check_not_hooked(model: nn.Module) -> None:
    """Raise ValueError for a model that is measured already, TypeError for what is no module."""
    if _owners(model):
        raise ValueError(
            "the model's gradients are measured already: call remove() of the scheduler, monitor "
            "or GradSampleHooks that measures them, or use that one")


def _adaptive(
    loader: DataLoader[Batch] | AdaptiveDataLoader, parallel: DistributedSetup | None,
    model: nn.Module, optimizer: Optimizer, settings: Kwargs,
) -> AdaptiveDataLoader:
    """The adaptive loader of the processes that share each batch, whose set-ups are compared."""
    if parallel is None:
        if isinstance(loader, AdaptiveDataLoader):
            return loader
        return AdaptiveDataLoader.from_loader(loader)
    adaptive = parallel.take_loader(loader, summed=settings["loss_reduction"] == "sum")
    parallel.check_same(model, optimizer, adaptive, settings)
    return adaptive


def _groups(optimizer: Optimizer) -> list[list[Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _settings(options: object, but: tuple[str, ...] = ()) -> Kwargs:
    """The fields of an option object, as all processes must have them."""
    return {name: value for name, value in vars(options).items() if name not in but}
