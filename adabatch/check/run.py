"""The steps of adabatch.check, and its checks of model, batch and loss_fn."""

from __future__ import annotations

import inspect

from torch import nn
from torch.utils.data import DataLoader

from adabatch._tree import tensors
from adabatch._types import Batch, LossFn
from adabatch.check import layouts
from adabatch.check.compare import (
    MAX_COMPARED, Findings, exact_norms, measure_with_taps, settle_roles,
)
from adabatch.check.isolate import mixing_batch_norm, plain_arithmetic, restored, running_statistics
from adabatch.check.layouts import MAX_SAMPLES
from adabatch.check.passes import CheckedModel, PassRecord, find_owners, record_pass, run_trial
from adabatch.check.report import CheckReport
from adabatch.grad_sample.plan import unwrap

EXAMPLE = ("lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], "
           "reduction='none')")


def run_check(model: nn.Module, batch: Batch, loss_fn: LossFn) -> CheckReport:
    """What `adabatch.check` returns."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_loss_fn(model, batch, loss_fn)
    if isinstance(batch, DataLoader) or hasattr(batch, "batch_sampler"):
        raise TypeError("batch must be one batch, as loss_fn takes it, got a "
                        f"{type(batch).__name__}: pass next(iter(loader))")
    model = unwrap(model)
    checked = CheckedModel(model, find_owners(model), loss_fn)
    with plain_arithmetic(model), restored(model):
        return _check(checked, batch)


def _check(checked: CheckedModel, batch: Batch) -> CheckReport:
    model, owners = checked.model, checked.owners
    whole = large = _first_trial(checked, batch)
    size = len(large.losses)
    if size < 2:
        raise ValueError(f"check() compares samples, so it needs a batch of at least 2, got {size}")
    wrong = [sample for sample, ok in enumerate(large.losses.isfinite().tolist()) if not ok]
    if wrong:
        raise ValueError(
            f"the losses of {len(wrong)} of {size} samples are not finite (first: sample "
            f"{wrong[0]}), so that nothing can be compared: pass a batch without NaN, and a model "
            "whose losses on it are finite")
    n_samples = MAX_SAMPLES if size > MAX_SAMPLES else size - 1
    part, small, cut = layouts.smaller_batch(checked, batch, large, n_samples) or (None,) * 3
    if size > MAX_SAMPLES:
        if small is None:
            raise ValueError(f"the batch of {size} could not be cut down to {MAX_SAMPLES} samples: "
                             "no choice of dimensions gave these samples' own losses, or they "
                             "depend on the other samples of the batch. Pass a batch of 2 to "
                             f"{MAX_SAMPLES} samples, which shows which.")
        batch, size = part, MAX_SAMPLES
        whole = small
    dims = layouts.batch_dims(large, small)
    weights, ratios = layouts.draw_weights(size)

    def two_passes() -> tuple[PassRecord, PassRecord]:
        return record_pass(checked, batch, weights), record_pass(checked, batch, weights * ratios)

    def infer(passes: tuple[PassRecord, PassRecord]) -> dict[str, layouts.LayoutResult]:
        return {owner.name: layouts.infer_layout(owner, *passes, ratios, dims.get(owner.name))
                for owner in owners}

    with running_statistics(model):
        passes = two_passes()
        exact = exact_norms(checked, batch, size)
    findings = Findings(owners, infer(passes), passes, exact, size)
    source = layouts.find_batch_size_source(model, large, small)
    report = CheckReport(list(findings.rows.values()), source, size, min(size, MAX_COMPARED))
    if mixing_batch_norm(model):
        findings.mark_contributions(infer(two_passes()))
    with running_statistics(model):
        if cut is not None:
            settle_roles(checked, (layouts.cut_batch(batch, cut, size - 1), batch), report)
        taps = measure_with_taps(checked, batch, report)
    findings.enter_errors(taps)
    findings.refuse_unaccounted(float((weights * ratios).sum() / weights.sum()))
    findings.refuse_wrong()
    with restored(model):
        model.eval()
        dependent = not mixing_batch_norm(model) and layouts.depends_on_others(
            checked, batch, whole, cut)
    if dependent:
        findings.mark_dependent()
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
