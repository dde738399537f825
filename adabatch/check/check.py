"""The function adabatch.check."""

from __future__ import annotations

import inspect

from torch import nn
from torch.utils.data import DataLoader

from adabatch._tree import tensors
from adabatch._types import Batch, LossFn
from adabatch.check import layouts
from adabatch.check.compare import MAX_COMPARED, Findings, exact_norms, measure_with_taps
from adabatch.check.isolate import mixing_batch_norm, plain_arithmetic, restored, running_statistics
from adabatch.check.layouts import MAX_SAMPLES
from adabatch.check.passes import CheckedModel, PassRecord, find_owners, record_pass, run_trial
from adabatch.check.report import CheckReport
from adabatch.grad_sample.plan import unwrap

EXAMPLE = ("lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], "
           "reduction='none')")


def check(model: nn.Module, batch: Batch, loss_fn: LossFn, *, verbose: bool = True) -> CheckReport:
    """Find out, layer by layer, whether and how a model's per-sample gradients can be measured.

    Two backward passes whose samples are weighted differently show which rows of a layer's output
    belong to which sample; a backward pass per sample gives exact gradients to compare with. At
    most 8 samples are used, 4 compared. Meanwhile batch norm uses its running statistics and
    autocast is off. The model and the random states are left as they were.

    Args:
        model: in the mode it is trained in, without GradSampleHooks; the module inside is checked
            where it is compiled or wrapped for data parallelism.
        batch: what loss_fn takes: a tensor, or tuples, lists, dicts and data classes of them. Only
            the first 8 samples are used.
        loss_fn: (model, batch) -> per-sample losses [N], as they are in training; called about a
            dozen times. It must call the model that it is given.
        verbose: print the report.

    Returns:
        CheckReport: a row per layer that owns trainable parameters; `ok`; `layouts` and
        `batch_size_source`, for GradSampleHooks(layout=report).

    Raises:
        ValueError: losses that are not [N] with N of 2 or more, a model without trainable
            parameters, or a larger batch that cannot be cut.
        TypeError: model, batch, loss_fn or losses of another kind.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batch = torch.randn(7, 5, 3), torch.randn(7, 5, 2)  # 7 positions of 5 samples
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean((0, 2))
        >>> report = check(model, batch, loss_fn, verbose=False)
        >>> report["0"].layout.value, report["2"].layout.value, str(report.batch_size_source)
        ('batch_second', 'batch_second', 'input.shape[1]')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_loss_fn(model, batch, loss_fn)
    if isinstance(batch, DataLoader) or hasattr(batch, "batch_sampler"):
        raise TypeError("batch must be one batch, as loss_fn takes it, got a "
                        f"{type(batch).__name__}: pass next(iter(loader))")
    model = unwrap(model)
    checked = CheckedModel(model, find_owners(model), loss_fn)
    with plain_arithmetic(model), restored(model):
        report = _check(checked, batch)
    if verbose:
        print(report)
    return report


def _check(checked: CheckedModel, batch: Batch) -> CheckReport:
    model, owners = checked.model, checked.owners
    large = _first_trial(checked, batch)
    size = len(large.losses)
    if size < 2:
        raise ValueError(f"check() compares samples, so it needs a batch of at least 2, got {size}")
    n_samples = MAX_SAMPLES if size > MAX_SAMPLES else size - 1
    smaller = layouts.smaller_batch(checked, batch, large, n_samples)
    if smaller is None and size > MAX_SAMPLES:
        raise ValueError(f"the batch of {size} could not be cut down to {MAX_SAMPLES} samples: no "
                         "choice of dimensions gave these samples' own losses. Pass a batch of 2 "
                         f"to {MAX_SAMPLES} samples.")
    small = None if smaller is None else smaller[1]
    if smaller is not None and size > MAX_SAMPLES:
        batch, size = smaller[0], MAX_SAMPLES
    dims = layouts.batch_dims(large, small)
    weights, ratios = layouts.draw_weights(size)

    def two_passes() -> tuple[PassRecord, PassRecord]:
        return record_pass(checked, batch, weights), record_pass(checked, batch, weights * ratios)

    def infer(passes: tuple[PassRecord, PassRecord]) -> dict[str, layouts.LayoutResult]:
        return {owner.name: layouts.infer_layout(owner, *passes, ratios, dims.get(owner.name))
                for owner in owners}

    with running_statistics(model):
        passes = two_passes()
        found = infer(passes)
        exact = exact_norms(checked, batch, size)
    findings = Findings(owners, found, passes, exact, size)
    source = layouts.find_batch_size_source(model, large, small)
    report = CheckReport(list(findings.rows.values()), source, size, min(size, MAX_COMPARED))
    if mixing_batch_norm(model):
        findings.mark_contributions(infer(two_passes()))
    with running_statistics(model):
        taps = measure_with_taps(checked, batch, report)
    findings.enter_errors(taps)
    findings.refuse_unaccounted(float((weights * ratios).sum() / weights.sum()))
    findings.refuse_wrong()
    if taps.problem:
        report.notes.append(f"the hooks cannot be used: {taps.problem}")
    return report


def _first_trial(checked: CheckedModel, batch: Batch) -> PassRecord:
    try:
        return run_trial(checked, batch)
    except TypeError as error:
        if tensors(batch):
            raise
        raise TypeError(f"loss_fn failed ({error}), and batch holds no tensors, got {batch!r:.80}: "
                        "pass one batch as the loader gives it, next(iter(loader))") from error


def _check_loss_fn(model: nn.Module, batch: Batch, loss_fn: object) -> None:
    """Refuse what is not a function of model and batch, such as a criterion of outputs."""
    criterion = isinstance(loss_fn, nn.modules.loss._Loss)
    of_outputs = criterion or (
        inspect.isfunction(loss_fn) and loss_fn.__module__ == "torch.nn.functional")
    reason = ", a function of outputs and targets" if of_outputs else ""
    if callable(loss_fn) and not of_outputs:
        try:
            inspect.signature(loss_fn).bind(model, batch)
            return
        except ValueError:  # a function without a readable signature
            return
        except TypeError as error:
            reason = f", which cannot be called in this way: {error}"
    name = loss_fn.__qualname__ if inspect.isfunction(loss_fn) else repr(loss_fn)
    name = type(loss_fn).__name__ if criterion else name
    raise TypeError("loss_fn must be a function (model, batch) -> the losses of the batch's "
                    f"samples [N], got {name}{reason}. For instance {EXAMPLE}")
