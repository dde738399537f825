"""What estimators share: the end of a backward pass, ‖g‖² of the finished gradient, and the way
from the sums of a step's passes to GradientMoments: the loss reduction, the
accumulation and the loss scale are undone here, and only here.

Autograd's contribution of sample i in pass j is z_i = a_i·g_i·(loss scale), with a_i = 1/(k·m_j)
for a mean-reduced loss divided by the k accumulated passes, and the step's gradient is Σ z_i. For a
sum-reduced loss a_i = 1, and the step's gradient is divided by the number of samples.

Samples of unequal weight n_i (tokens under a token mean) have a_i = n_i/(k·Σ_pass n): of each pass
its own weighted mean, divided by k. They are known only through m·z_i = w_i·g_i with w_i = m·a_i.

Legend: m samples in the step, m_j in pass j of k, s and s_j of them measured, K probe rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.utils import get_total_norm

from adabatch.estimators.moments import GradientMoments
from adabatch.kernels.operators import LONGEST_SUM

if TYPE_CHECKING:
    from adabatch.interfaces import Statistic

LOSS_REDUCTIONS = ("mean", "sum")
# The id of the backward pass that runs in this thread, -1 outside of one.
running_backward = torch._C._current_graph_task_id
NO_WEIGHTS = (
    "weights describe a mean over tokens. Under loss_reduction='sum' every sample's gradient "
    "counts fully, and the plain trace is right: omit weights"
)


def at_backward_end(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running has ended and the gradients are final.

    Queued twice: DistributedDataParallel writes the averaged gradients in a callback that it queues
    during the pass, so that a callback queued once may run before it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> handle = weight.register_hook(
        ...     lambda grad: at_backward_end(lambda: print(weight.grad.item())))
        >>> (3 * weight).sum().backward()
        3.0
    """
    engine = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(callback))


def check_arguments(loss_reduction: str, **counts: int | None) -> None:
    """Raise for an unknown reduction or for counts that are not positive integers; `samples` may
    be None.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_arguments("mean", samples=None, accumulate=1)
    """
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {loss_reduction!r}")
    for name, value in counts.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            optional = " or None" if name == "samples" else ""
            raise ValueError(f"{name} must be a positive integer{optional}, got {value!r}")


@dataclass
class BackwardPass:
    """Sums of one backward pass, in the scale autograd gave them (nothing undone yet).

    Attributes:
        batch_size: samples in the pass.
        rows: {per-sample statistic: [K] values [s], None where no parameter of the row took part};
            "sq_norms" always, "inner_products" with the step's finished gradient.
        indices: the measured rows of the batch [s], or None for all.
        values: {other statistic: {parameter: value}}.
        share: where processes share a batch, the fraction of the pass's samples that this one had.
        gradient: {statistic: {parameter: what it read of the finished gradient}}, last pass only.
    """

    batch_size: int
    rows: dict[str, list[Tensor | None]]
    indices: Tensor | None = None
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    share: float = 1.0
    gradient: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """m_j, samples in the pass over all processes."""
        return self.batch_size / self.share

    @property
    def measured(self) -> Tensor:
        """Some value [s]."""
        return next(value for value in self.rows["sq_norms"] if value is not None)


@dataclass(frozen=True)
class PoolOptions:
    """How passes are pooled.

    Attributes:
        loss_reduction: "mean" or "sum", over the samples of a pass.
        group_of_row: parameter group of each probe row.
        row_names: parameter name of each row, if each parameter has one.
        by_samples: pass j's fraction of the gradient is m_j/m, applied after the taps
            (micro-batches), and not 1/k, divided out of the loss.
        world_size: W processes share each pass, of which this one had `share`: its gradients were
            multiplied by W·share (by W for a summed loss) before they were averaged.
        statistics: what was measured besides the squared norms.
    """

    loss_reduction: str = "mean"
    group_of_row: Sequence[int] = (0,)
    row_names: Sequence[str] | None = None
    by_samples: bool = False
    world_size: int = 1
    statistics: Sequence[Statistic] = ()


def pool_passes(
    passes: Sequence[BackwardPass], grad_sq_norms: Tensor, *, loss_scale: float = 1.0,
    weights: Tensor | Sequence[float] | None = None, options: PoolOptions = PoolOptions(),
) -> GradientMoments:
    """Pool the passes of one step.

    Args:
        passes: what each backward pass left, all with the same K probe rows.
        grad_sq_norms: squared norm of the finished gradient of each row's parameters, [K].
        loss_scale: the factor on the loss.
        weights: of the samples, [m], one pass after another, on any scale: numbers of tokens for
            instance. None: all equal.
        options: the rest.

    Returns:
        GradientMoments with T̂ unbiased: equal passes give m_eff = m, unequal ones
        m_eff = k²/Σ_j(1/m_j).

    Raises:
        ValueError: weights that are not m numbers >= 0 with a positive sum in each pass; weights
            under a summed loss, or without inner products.
    """
    whole_size = sum(step.whole for step in passes)
    batch_size, k = round(whole_size), len(passes)
    mean, by_samples = options.loss_reduction == "mean", options.by_samples
    loss_scale *= options.world_size
    share = sum(step.batch_size for step in passes) / whole_size if batch_size else 1.0
    common: dict[str, Any] = {
        "batch_size": batch_size, "indices": _indices(passes), "share": share}
    if weights is None:
        factor = 1 if by_samples else k
        scales = [(step.whole * factor if mean else 1) / loss_scale for step in passes]
        if k > 1:
            m_eff = _effective(passes) if mean and not by_samples else None
            common |= {"effective_batch_size": m_eff, "corrections": _corrections(passes, m_eff)}
    else:
        scales = [(step.whole if by_samples else whole_size) / loss_scale for step in passes]
        sample_weights = measured_weights(passes, weights, options.loss_reduction, by_samples)
        common |= {"weights": sample_weights, "corrections": _strata(passes)}
    whole = (1 if mean else 1 / max(1, batch_size)) * options.world_size / loss_scale
    n_rows = range(len(options.group_of_row))
    norms = [_row(passes, "sq_norms", row, [each**2 for each in scales]) for row in n_rows]
    products: list[Tensor] | None = None
    if "inner_products" in passes[0].rows:
        products = [_row(passes, "inner_products", row, [each * whole for each in scales])
                    for row in n_rows]
    batch_norms = [float(value) * whole**2 for value in grad_sq_norms.tolist()]

    def moments(of_group: int | None, **more: Any) -> GradientMoments:
        """Over the rows of a group, or over all."""
        chosen = [row for row, group in enumerate(options.group_of_row)
                  if of_group in (None, group)]
        sums = None if products is None else _sum([products[row] for row in chosen])
        return GradientMoments(
            sq_norms=_sum([norms[row] for row in chosen]),
            grad_sq_norm=sum(batch_norms[row] for row in chosen),
            inner_products=sums, **common, **more)

    groups = sorted(set(options.group_of_row)) if len(n_rows) > 1 else []
    more: dict[str, Any] = {}
    names = options.row_names
    if names:
        more["by_parameter"] = dict(zip(names, norms, strict=True))
        more["parameter_grad_sq_norms"] = dict(zip(names, batch_norms, strict=True))
        if products is not None:
            more["parameter_inner_products"] = dict(zip(names, products, strict=True))
    if len(groups) > 1:
        more["by_group"] = {group: moments(group) for group in groups}
    if options.statistics:
        more["statistics"] = _statistics(passes, scales, options.statistics)
    return moments(None, **more)


def _statistics(
    passes: Sequence[BackwardPass], scales: Sequence[float], statistics: Sequence[Statistic]
) -> dict[str, Any]:
    pooled: dict[str, Any] = {}
    for each in statistics:
        name = each.name
        if name == "inner_products":
            continue
        if each.per_sample:
            rows = range(len(passes[0].rows[name]))
            factors = [each.scaled(scale) for scale in scales]
            pooled[name] = _sum([_row(passes, name, row, factors) for row in rows])
        else:
            values: list[Mapping[str, Tensor]] = [step.values.get(name, {}) for step in passes]
            pooled[name] = each.pool(values, scales, passes[-1].gradient.get(name, {}))
    return pooled


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def _row(passes: Sequence[BackwardPass], name: str, row: int, scales: Sequence[float]) -> Tensor:
    """One probe row's values over all passes, [s]; zeros where no layer reported to it."""
    parts = []
    for step, scale in zip(passes, scales, strict=True):
        value = step.rows[name][row]
        parts.append(torch.zeros_like(step.measured) if value is None else value * scale)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _effective(passes: Sequence[BackwardPass]) -> float | None:
    sizes = [round(step.whole) for step in passes]
    if len(set(sizes)) <= 1 or 0 in sizes:
        return None
    return len(sizes) ** 2 / sum(1 / size for size in sizes)


def measured_weights(
    passes: Sequence[BackwardPass], weights: Tensor | Sequence[float], loss_reduction: str,
    by_samples: bool = False,
) -> Tensor:
    """w_i = m·a_i of the measured samples, [s] float64, a_i = n_i/(k·Σ_pass n), or by_samples
    (m_j/m)·n_i/Σ_pass n.

    Example:
        >>> step = BackwardPass(3, {"sq_norms": [torch.ones(2)]}, torch.tensor([0, 2]))
        >>> measured_weights([step], [10, 20, 30], "mean")
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    if loss_reduction != "mean":
        raise ValueError(NO_WEIGHTS)
    sizes = [step.batch_size for step in passes]
    given = torch.as_tensor(weights).detach().double()
    if given.shape != (sum(sizes),):
        raise ValueError(f"weights must have one number for each of the {sum(sizes)} samples of "
                         f"the step, got the shape {tuple(given.shape)}")
    parts = given.split(sizes)
    finite = bool(given.isfinite().all()) and not bool((given < 0).any())
    if not finite or not all(float(part.sum()) > 0 for part in parts):
        raise ValueError("weights must be finite numbers >= 0 with a positive sum in each backward "
                         "pass, numbers of tokens for instance")
    whole = sum(step.whole for step in passes)
    scales = [step.batch_size if by_samples else whole / len(passes) * step.share
              for step in passes]
    scaled = [scale * part / part.sum() for part, scale in zip(parts, scales, strict=True)]
    picked = [each if step.indices is None else each[step.indices.to(each.device)]
              for each, step in zip(scaled, passes, strict=True)]
    return torch.cat(picked).to(passes[0].measured.device)


def _strata(passes: Sequence[BackwardPass]) -> Tensor | None:
    """(m_j/m)/(s_j/s) for each measured sample, [s]: where passes were not measured at one rate,
    the mean over the measured must weight them as they are in the batch."""
    rates = [len(step.measured) / max(1, step.batch_size) for step in passes]
    if len(set(rates)) == 1:
        return None
    measured = sum(len(step.measured) for step in passes)
    whole = measured / sum(step.batch_size for step in passes)
    return _by_pass(passes, [whole / rate for rate in rates])


def _corrections(passes: Sequence[BackwardPass], m_eff: float | None) -> Tensor | None:
    """(1 − 1/m_eff)/(1 − 2a_i + 1/m_eff) for each measured sample, [s], as
    E‖g_i − g‖² = T·(1 − 2a_i + 1/m_eff): for unequal passes with inner products."""
    if m_eff is None or "inner_products" not in passes[0].rows:
        return None
    k = len(passes)
    factors = [(1 - 1 / m_eff) / (1 - 2 / (k * step.whole) + 1 / m_eff) for step in passes]
    return _by_pass(passes, factors)


def _by_pass(passes: Sequence[BackwardPass], values: Sequence[float]) -> Tensor:
    """One value per pass, for each measured sample [s]."""
    return torch.cat([torch.full_like(step.measured, value, dtype=torch.float64)
                      for step, value in zip(passes, values, strict=True)])


def _indices(passes: Sequence[BackwardPass]) -> Tensor | None:
    """Measured rows counted through the passes, or None where every pass measured all rows."""
    if all(step.indices is None for step in passes):
        return None
    parts, offset = [], 0
    for step in passes:
        rows = torch.arange(step.batch_size) if step.indices is None else step.indices.cpu()
        parts.append(rows + offset)
        offset += step.batch_size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- the finished gradient


def gradients(group: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]


def grad_sq_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ over the group's parameters of ‖p.grad‖², one value per group, [K], at least float32.

    A parameter without a gradient counts 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> grad_sq_norms([[p], []])
        tensor([25.,  0.])
    """
    norms = stacked([total_norm(gradients(group)) for group in groups])
    return norms * norms


def stacked(values: Sequence[Tensor]) -> Tensor:
    """On the accelerator of any of them."""
    devices = [value.device for value in values if value.numel() and value.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    return torch.stack([value.to(device) for value in values])


def _shortened(grad: Tensor) -> Tensor:
    """A tensor of the same norm.

    On a CPU one float32 sum of a large gradient's squares loses the small ones; two stages do not,
    and cost no more.
    """
    if grad.dim() < 2 or grad.numel() <= LONGEST_SUM:
        return grad
    return torch.linalg.vector_norm(grad.flatten(1), dim=1)


def _dense(grad: Tensor) -> Tensor:
    """The values of the gradient, at least float32."""
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    grads = [_dense(grad) for grad in grads]
    plain = [grad.is_cpu and type(grad) is Tensor for grad in grads]
    grads = [_shortened(grad) if local else grad for grad, local in zip(grads, plain, strict=True)]
    if all(plain):  # get_total_norm takes ten times the calls for the same
        return torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        )
    from adabatch.distributed.grad_norms import full_tensor  # which imports this module

    return full_tensor(get_total_norm(grads))
