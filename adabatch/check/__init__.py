"""check: settle the layout of every layer, and compare with exact per-sample gradients, before anything is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from adabatch._tree import tensors
from adabatch.check.batches import MAX_SAMPLES, Trial, batch_dims, find_batch_size_source, run_trial, smaller_batch
from adabatch.check.comparison import MAX_COMPARED, compare_with_taps, exact_norms
from adabatch.check.filling import enter_comparison, make_rows, mark_contributions, refuse_differing, refuse_unaccounted
from adabatch.check.inference import draw_weights
from adabatch.check.listening import LossFunction, listen
from adabatch.check.owners import ParameterOwner, find_owners
from adabatch.check.report import CheckReport, CheckRow
from adabatch.check.settling import settle
from adabatch.check.state import batch_norm_by_running_statistics, mixing_batch_norm, plain_arithmetic, restored
from adabatch.grad_sample.plan import unwrap

__all__ = ["CheckReport", "CheckRow", "check"]

EXAMPLE = "lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction='none')"


def check(model: nn.Module, batch: Any, loss_fn: LossFunction, *, verbose: bool = True) -> CheckReport:
    """Find out, layer by layer, whether and how the per-sample gradients of a model can be measured.

    Two backward passes whose samples are weighted differently tell which rows of a layer's output belong to which sample; a backward pass per sample gives
    exact gradients to compare with. At most 8 samples are used, 4 compared. Batch norm runs by its running statistics and autocast is off meanwhile. The model
    is left as it was: parameters, buffers, .grad, training flags, hooks, random states.

    Args:
        model: the model in the mode it is trained in, before GradSampleHooks are attached; looked through where compiled or wrapped for data parallelism.
        batch: what loss_fn takes: a tensor, or tuples, lists, dicts and data classes of them. Of more than 8 samples the first 8 are cut out.
        loss_fn: (model, batch) -> per-sample losses [N], as they are in training, called about a dozen times. It must run the model it is given.
        verbose: print the report.

    Returns:
        CheckReport: a row per layer that owns trainable parameters; `ok`; `layouts` and `batch_size_source` for GradSampleHooks(layout=report).

    Raises:
        ValueError: losses that are not [N] with N of 2 or more, a model without trainable parameters, or a larger batch that cannot be cut.
        TypeError: model, batch, loss_fn or losses of another kind.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batch = torch.randn(7, 5, 3), torch.randn(7, 5, 2)  # time first: 7 positions of 5 samples
        >>> report = check(model, batch, lambda model, batch: (model(batch[0]) - batch[1]).square().mean((0, 2)), verbose=False)
        >>> report["0"].layout.value, report["2"].layout.value, str(report.batch_size_source)
        ('batch_second', 'batch_second', 'input.shape[1]')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_loss_fn(model, batch, loss_fn)
    if isinstance(batch, DataLoader) or hasattr(batch, "batch_sampler"):
        raise TypeError(f"batch must be one batch, as loss_fn takes it, got a {type(batch).__name__}: pass next(iter(loader))")
    model = unwrap(model)
    owners = find_owners(model)
    with plain_arithmetic(model), restored(model):
        report = _check(model, owners, batch, loss_fn)
    if verbose:
        print(report)
    return report


def _check(model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction) -> CheckReport:
    large = _first_trial(model, owners, batch, loss_fn)
    size = len(large.losses)
    if size < 2:
        raise ValueError(f"check() tells samples apart, so it needs a batch of at least 2, got {size}")
    smaller = smaller_batch(model, owners, batch, loss_fn, large, MAX_SAMPLES if size > MAX_SAMPLES else size - 1)
    if smaller is None and size > MAX_SAMPLES:
        raise ValueError(
            f"the batch of {size} could not be cut down to {MAX_SAMPLES} samples: no choice of dimensions gave these samples' own losses. "
            f"Pass a batch of 2 to {MAX_SAMPLES} samples."
        )
    if size > MAX_SAMPLES:
        batch, size = smaller[0], MAX_SAMPLES
    small = smaller and smaller[1]
    dims = batch_dims(large, small) if small else {}
    weights, ratios = draw_weights(size)
    with batch_norm_by_running_statistics(model):
        first, second = (listen(model, owners, batch, loss_fn, w) for w in (weights, weights * ratios))
        settled = {owner.name: settle(owner, first, second, ratios, dims.get(owner.name)) for owner in owners}
        exact = exact_norms(model, {name: parameter for owner in owners for name, parameter in owner.parameters.items()}, batch, loss_fn, size)
    rows = make_rows(owners, settled, first, exact, size)
    report = CheckReport(list(rows.values()), find_batch_size_source(model, large, small), size, min(size, MAX_COMPARED))
    if mixing_batch_norm(model):
        passes = [listen(model, owners, batch, loss_fn, w) for w in (weights, weights * ratios)]
        mark_contributions(rows, owners, passes, ratios, dims)
    with batch_norm_by_running_statistics(model):
        differences, refused, problem = compare_with_taps(model, owners, batch, loss_fn, exact, report)
    enter_comparison(rows, owners, first, exact, differences, refused)
    refuse_unaccounted(rows, owners, first, second, weights, ratios)
    refuse_differing(rows, owners)
    if problem:
        report.notes.append(f"the hooks cannot be used: {problem}")
    return report


def _first_trial(model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction) -> Trial:
    try:
        return run_trial(model, owners, batch, loss_fn)
    except Exception as error:
        if isinstance(error, TypeError) and not any(tensors(batch)):
            raise TypeError(
                f"loss_fn failed ({error}), and batch holds no tensors, got {batch!r:.80}: pass one batch as the loader gives it, next(iter(loader))"
            ) from error
        raise


def _check_loss_fn(model: nn.Module, batch: Any, loss_fn: Callable[..., Any]) -> None:
    """Refuse what is no function of model and batch, a criterion of outputs and targets above all."""
    of_outputs = isinstance(loss_fn, nn.modules.loss._Loss) or getattr(loss_fn, "__module__", None) == "torch.nn.functional"
    if callable(loss_fn) and not of_outputs:
        try:
            inspect.signature(loss_fn).bind(model, batch)
            return
        except ValueError:  # a function that has no signature to be read
            return
        except TypeError as error:
            reason = f", which cannot be called so: {error}"
    else:
        reason = ", a function of outputs and targets" if of_outputs else ""
    name = getattr(loss_fn, "__qualname__", None) or (type(loss_fn).__name__ if of_outputs else repr(loss_fn))
    raise TypeError(f"loss_fn must be a function (model, batch) -> the losses of the batch's samples [N], got {name}{reason}. For instance {EXAMPLE}")
