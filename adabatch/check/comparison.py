"""The check itself against exact gradients: one backward pass per sample, what the layers' calls account for, and what the taps report.

Legend: N samples in the batch, S of them compared.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adabatch.check.listening import LossFunction, PassRecord
from adabatch.check.owners import ParameterOwner
from adabatch.check.state import no_gradients_yet, restored
from adabatch.grad_sample.hooks import GradSampleHooks

MAX_COMPARED = 4

ADDED_TERM = (
    "part of its gradient does not depend on the samples: a penalty on the weights inside the loss, which the per-sample norms cannot contain. "
    "Take it out of the loss and use the optimizer's weight_decay"
)
OUTSIDE = (
    "part of its gradient comes from a use outside the layer's own forward pass, such as F.linear(x, layer.weight), or from reentrant checkpointing. "
    "Call the layer instead, or pass ignore=[...]"
)


@dataclass(frozen=True)
class ExactNorms:
    """Per-sample gradients by one backward pass each.

    Attributes:
        sq_norms: {parameter's name: ‖g_i‖² of the first S samples, [S], float64}.
        variance_trace: {parameter's name: Σ_i ‖g_i − ḡ‖² / (S − 1)}.
    """

    sq_norms: dict[str, Tensor]
    variance_trace: dict[str, float]


def exact_norms(model: nn.Module, parameters: dict[str, Tensor], batch: Any, loss_fn: LossFunction, n_samples: int) -> ExactNorms:
    """Norms of ∇l_i for the first samples: a pass each, over the whole batch, so that a model that mixes samples is seen as it is."""
    n_compared = min(n_samples, MAX_COMPARED)
    norms: dict[str, list[float]] = {name: [] for name in parameters}
    means: dict[str, Tensor] = {}
    scatter = dict.fromkeys(parameters, 0.0)
    for sample in range(n_compared):
        with restored(model):
            grads = torch.autograd.grad(loss_fn(model, batch)[sample], list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            value = torch.zeros_like(parameter, dtype=_wide(parameter)) if grad is None else grad.to_dense().to(_wide(parameter))
            norms[name].append(float(value.double().square().sum()))
            # Welford's update: the difference of large sums of squares would cancel in float32
            mean = means.get(name, torch.zeros_like(value))
            scatter[name] += float((value - mean).double().square().sum()) * sample / (sample + 1)
            means[name] = mean + (value - mean) / (sample + 1)
    return ExactNorms(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in norms.items()},
        {name: value / (n_compared - 1) for name, value in scatter.items()},
    )


def unaccounted(name: str, first: PassRecord, second: PassRecord, weight_ratio: float) -> str | None:
    """Why the calls of the layers do not account for a parameter's whole gradient, or None if they do.

    A part r that is the same for every sample grows from pass to pass like the sum of the weights: r' = r·Σw'/Σw.
    """
    rests = [_rest(name, listened) for listened in (first, second)]
    if all(rest is None for rest in rests):
        return None
    r, r_again = (torch.zeros_like(first.grads[name], dtype=torch.float64) if rest is None else rest for rest in rests)
    error = float((r_again - weight_ratio * r).norm()) / max(float(r_again.norm()), 1e-300)
    return ADDED_TERM if error < 0.05 else OUTSIDE


def compare_with_taps(
    model: nn.Module, owners: list[ParameterOwner], batch: Any, loss_fn: LossFunction, exact: ExactNorms, layouts: Any
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Measure the batch with GradSampleHooks. Layers that the hooks' error names are left out, and the rest is tried again.

    Returns:
        {parameter's name: the taps' ‖g_i‖² less the exact ones, [S]}; {layer's name: why the hooks cannot measure it}; an error that names no layer, or ''.
    """
    refused: dict[str, str] = {}
    while True:
        found, problem = _measure(model, batch, loss_fn, ignore=list(refused), layout=layouts)
        about = {owner.name: lines_about([owner.title, *owner.parameters], problem) for owner in owners if owner.name not in refused}
        named = {name: lines for name, lines in about.items() if lines}
        if not named:
            differences = {name: _difference(value, exact.sq_norms[name]) for name, value in found.items() if name in exact.sq_norms}
            return differences, refused, "" if len(refused) == len(owners) else problem
        refused.update(named)


def _measure(model: nn.Module, batch: Any, loss_fn: LossFunction, **options: Any) -> tuple[dict[str, Tensor], str]:
    hooks = None
    try:
        with restored(model), no_gradients_yet(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooks = GradSampleHooks(model, loss_reduction="sum", per_parameter=True, **options)
            loss_fn(model, batch).sum().backward()
            return hooks.collect().by_parameter, ""
    except Exception as error:  # whatever the reason, it belongs into the report
        return {}, str(error) or type(error).__name__
    finally:
        if hooks is not None:
            hooks.remove()


def relative_error(names: Iterable[str], differences: dict[str, Tensor], exact: ExactNorms, floor: float) -> float:
    """max_i |Σ_p difference| / max_i Σ_p ‖g_i‖² over some parameters p; NaN if none was compared.

    The denominator is at least `floor` times that of the whole model: a parameter whose gradient is zero but for rounding has no relative error.
    """
    compared = [name for name in names if name in differences]
    if not compared:
        return float("nan")
    own = float(sum(exact.sq_norms[name] for name in compared).max())
    total = float(sum(exact.sq_norms.values()).max())
    error = float(sum(differences[name].abs() for name in compared).max())
    return error / max(own, floor * total, 1e-300)


def lines_about(names: Iterable[str], message: str) -> str:
    """Those lines of an error message that speak of a layer or of its parameters: 'Type (layer)', 'layer (...)' or the parameter's name.

    Example:
        >>> lines_about(["block.0", "block.0.weight"], "these fail:\\n  - Foo (block.0): no rule\\n  - Foo (block.0.fc): no rule")
        'Foo (block.0): no rule'
    """
    escaped = [re.escape(name) for name in names]
    patterns = [rf"\({escaped[0]}\)", rf"(?<![\w.(]){escaped[0]} \(", *(rf"(?<![\w.]){name}(?![\w.])" for name in escaped[1:])]
    return "; ".join(line.strip(" -") for line in message.splitlines() if re.search("|".join(patterns), line))


def _rest(name: str, listened: PassRecord) -> Tensor | None:
    """A parameter's gradient less what came through its layers' calls, or None if nothing is left but rounding."""
    grad, parts = listened.grads[name], list(listened.inside.get(name, {}).values())
    if grad is None:
        return None
    rest = grad.to_dense().double() - sum(part.double() for part in parts)
    uses = listened.uses.get(name, 0)
    # One use hands its gradient on bit for bit; several are added up in the parameter's own type
    rounding = 4 * torch.finfo(grad.dtype).eps * uses**0.5 if uses > 1 else 0.0
    scale = float(grad.to_dense().double().norm()) + sum(float(part.double().norm()) for part in parts)
    return rest if float(rest.norm()) > rounding * scale else None


def _difference(value: Tensor, exact: Tensor) -> Tensor:
    return value[: len(exact)].cpu().double() - exact if len(value) >= len(exact) else torch.full_like(exact, float("inf"))


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
