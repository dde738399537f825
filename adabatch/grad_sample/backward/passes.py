"""What the taps reported in one backward pass: shared uses are squared, and the whole is checked to be complete."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adabatch.grad_sample.backward.recorder import ParameterUse
from adabatch.grad_sample.factors.merge import merge_factors
from adabatch.grad_sample.statistics.preconditioned import SecondMoments
from adabatch.grad_sample.taps.base import TapSite

NOTHING_MEASURED = (
    "no measured backward pass since the last collect(). Possible causes: backward() was not called; scheduler.step() was called twice for one; the hooks are "
    "paused or removed; gradients were taken with torch.autograd.grad or backward(inputs=...), which leave nothing to harvest (call loss.backward()); or the "
    "model was compiled and run before the hooks were attached (attach first, or call torch._dynamo.reset())."
)
REENTRANT = "reentrant activation checkpointing cannot be measured: its backward passes run inside another. Use checkpoint(..., use_reentrant=False)"


def add_uses(
    norms: list[Tensor | None],
    moments: dict[str, Tensor],
    uses: Iterable[ParameterUse],
    row_of: dict[str, int],
    second_moments: SecondMoments | None,
    to_result_device: Callable[[Tensor], Tensor],
    shares: Mapping[str, float] | None = None,
) -> set[str]:
    """Square the stashed uses, parameter by parameter, into the rows; names of the parameters that had several uses."""
    grouped: dict[str, list] = {}
    if second_moments is not None:
        second_moments.finish(moments)
    for use in uses:
        grouped.setdefault(use.parameter, []).append(use.factor)
    for name, factors in grouped.items():
        merged = merge_factors(factors)
        row, value = row_of[name], to_result_device(merged.sq_norms())
        value = value if shares is None else value * shares[name]
        norms[row] = value if norms[row] is None else norms[row] + value
        value = None if second_moments is None else second_moments.of(name, merged)
        if value is not None:
            moments[name] = value
    return {name for name, factors in grouped.items() if len(factors) > 1}


def batch_size_of(reports: Sequence[Sequence[float]], sites: Sequence[TapSite], input_sizes: Collection[int] = ()) -> int:
    """The number of samples, from the layers' reports [n_layers, 2] of (uses, rows).

    Raises:
        RuntimeError: a layer was used twice where that cannot be undone, or layers saw different numbers of rows, or all the same one which is no dimension of
            the model's inputs (where some are known): samples and positions were flattened together before the first layer. All are listed.
    """
    sizes = {total for uses, total in reports if uses}
    if len(sizes) == 1 and max(uses for uses, _ in reports) == 1 and (not input_sizes or not sizes.isdisjoint(input_sizes)):
        return round(sizes.pop())
    problems = []
    rows: dict[str, int] = {}
    for site, (uses, total) in zip(sites, reports, strict=True):
        if uses > 1 and not (site.deferred or site.calls > 1):
            problems.append(
                f"{site.name} was called {int(uses)} times, and the hooks did not see it called: inside a compiled graph (run the model without torch.compile, "
                "or compile its parts), or before the last collect() (call it after the backward pass)"
            )
        if uses:
            rows[site.name] = round(total / uses)
    size = Counter(rows.values()).most_common(1)[0][0]
    odd = {name: n for name, n in rows.items() if n != size}
    if odd:
        listed = ", ".join(f"{name} ({n})" for name, n in odd.items())
        problems.append(f"the first dimension of these layers' outputs is not the batch of {size}: {listed}. Settle the layouts with adabatch.check(...)")
    if input_sizes and size not in input_sizes:
        problems.append(f"all layers saw {size} rows, which is no dimension of the model's inputs. Settle the layouts with adabatch.check(...)")
    if problems:
        raise RuntimeError("per-sample gradients of this backward pass are not exact:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return size


def warn_of_mixing(reports: Sequence[Sequence[float]], sites: Sequence[TapSite]) -> bool:
    """Warn if a layer that took part mixes the samples of the batch; whether it did."""
    mixing = [site.name for site, (uses, _) in zip(sites, reports, strict=True) if uses and site.mixes_samples]
    if mixing:
        warnings.warn(
            f"{', '.join(mixing)}: batch normalization in train mode mixes the samples of a batch. What is measured is each sample's contribution to the "
            "gradient: contributions add up to it exactly, but their variance is a proxy of the variance over fresh batches, and usually larger.",
            stacklevel=8,  # the caller of loss.backward()
        )
    return bool(mixing)


def reported_parameters(reports: Sequence[Sequence[float]], sites: Sequence[TapSite], uses: Iterable[ParameterUse]) -> set[str]:
    """Names of the parameters that took part in the pass as far as the taps saw."""
    return {name for site, (count, _) in zip(sites, reports, strict=True) if count for name in site.parameters.values()} | {use.parameter for use in uses}


def check_gradients_left(seen: Collection[str], parameters: dict[str, Tensor], sites: Sequence[TapSite]) -> None:
    """Raise when a parameter was measured but has no gradient at the end of the backward pass, so that ‖g‖² would lack it.

    A layer that is run again may leave some of its parameters without use; their contributions are zero.

    Raises:
        RuntimeError: listing the parameters.
    """
    gone = [name for name, parameter in parameters.items() if name in seen and parameter.requires_grad and parameter.grad is None]
    unused = {name for site in sites if site.sampler is None for name in site.parameters.values()}
    if gone and not (unused.issuperset(gone) and any(parameters[name].grad is not None for name in seen)):
        raise RuntimeError(
            f"these parameters were measured but have no gradient when the backward pass ends: {', '.join(gone)}. An optimizer that steps inside backward, or "
            "torch.func.functional_call with other tensors, leaves none to compare with: keep the gradients until optimizer.step(), or pause the hooks"
        )


def check_all_seen(seen: Collection[str], parameters: dict[str, Tensor]) -> None:
    """Raise when a parameter has a non-zero gradient although none of its layers reported; a skipped branch has no gradient and is fine.

    Raises:
        RuntimeError: listing the parameters whose gradient the taps never saw.
    """
    missing = [name for name, parameter in parameters.items() if name not in seen and parameter.grad is not None and bool(torch.count_nonzero(parameter.grad))]
    if missing:
        raise RuntimeError(
            f"these parameters have a gradient that no tap saw: {', '.join(missing)}. Either they are used without calling their layer "
            "(F.linear(x, layer.weight)), or parts of the model are called instead of the model itself, or their "
            "gradient is left from an earlier step (call optimizer.zero_grad()), or the model was compiled and run "
            "before the hooks were attached (attach first, or call torch._dynamo.reset()). To leave a layer out, pass ignore=[...]."
        )
