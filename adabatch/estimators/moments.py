"""GradientMoments: the raw, unbiased moments of one step's per-sample gradients; and how they come
from the sums of the step's passes, where loss reduction, accumulation and loss scale are undone.

Autograd's contribution of sample i in pass j is z_i = a_i·g_i·(loss scale), with a_i = 1/(k·m_j)
for a mean-reduced loss divided by the k accumulated passes, and the step's gradient is Σ z_i. For a
sum-reduced loss a_i = 1, and the step's gradient is divided by the number of samples.

Samples of unequal weight n_i (tokens under a token mean) have a_i = n_i/(k·Σ_pass n): of each pass
its own weighted mean, divided by k. They are known only through m·z_i = w_i·g_i with w_i = m·a_i.

Legend: m samples in the step, m_j in pass j of k, s and s_j of them measured, g_i the gradient of
sample i's loss, g the mean over the m samples, c = m/(m − 1), K probe rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adabatch._types import Argument, Kwargs
from adabatch.estimators.totals import Totals

if TYPE_CHECKING:
    from adabatch.interfaces import Statistic

FEW = 1024  # numbers that Python adds up in 20 microseconds

NO_INNER_PRODUCTS = (
    "{name} needs the inner products of the per-sample gradients with their mean: the spread of "
    "the norms alone is not the error of the trace, as the noise of ‖g‖² is correlated with it. "
    "Pass estimator=adabatch.PerSample(inner_products=True) to wrap, or "
    'statistics=["inner_products"] to GradSampleHooks, or take the error of the '
    "smoothed trace from its residuals from step to step (the history's variance_trace_std_error)."
)
NO_WEIGHTS = (
    "weights describe a mean over tokens. Under loss_reduction='sum' every sample's gradient "
    "counts fully, and the plain trace is right: omit weights"
)


@dataclass(frozen=True, eq=False, repr=False)
class GradientMoments:
    """Moments of the per-sample gradients of one optimizer step, nothing smoothed or clamped.

    Samples of unequal weight (`weights` w_i with mean 1; a mean over tokens where sample i has n_i
    of them: w_i = m·n_i/Σn): everywhere below g_i stands for z_i = m × the contribution of sample i
    to g, which is w_i times the gradient of its own mean loss, and T̂ = c·mean_S ‖z_i − w_i g‖². For
    this trace Cov(g) = T/m, to first order in 1/m; without weights the lengths' spread
    CV²(n)·‖g‖² would count as noise, which dividing by Σn takes out.

    Attributes:
        batch_size: m, samples in the step (all accumulated passes together).
        sq_norms: ‖g_i‖² of the measured samples, [s], of the per-sample loss (the loss reduction is
            undone); float32 or float64.
        grad_sq_norm: ‖g‖² of the batch-mean gradient, before any clipping.
        effective_batch_size: m_eff = 1/Σ a_i² for a gradient Σ a_i g_i; None where it is m: it
            differs where accumulated passes had unequal sizes.
        indices: rows of the batch that were measured, [s], or None for all.
        by_group: {index of the parameter group: its moments}, where there are several groups.
        by_parameter: {name: ‖g_i‖² of that parameter, [s]}, on request.
        parameter_grad_sq_norms, parameter_inner_products: ‖g‖² {name: number} and ⟨g_i, g⟩
            {name: [s]} of each parameter, with by_parameter.
        inner_products: ⟨g_i, g⟩ [s], on request. With them T̂ is never negative, and far steadier
            where s < m and the signal is strong.
        weights: w_i [s], float64, where samples have unequal weights. They need inner products.
        corrections: factors [s] on the terms of T̂ where accumulated passes had unequal sizes.
        statistics: {name: what another Statistic gave}: "second_moment" is {parameter: Σ_i g_i²
            over the measured samples, elementwise}.
        share: the fraction of the step's samples that this process had, where several share a
            batch and `totals` is still to come; grad_sq_norm is then this process's part of ‖g‖².
        totals: means over the samples of all processes that share the batch; T̂ and the rest come
            from them. batch_size, grad_sq_norm and n_measured are then the same on every process,
            tensors with one value a sample are of this process's samples.

    Raises:
        ValueError: weights without inner products.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> moments.variance_trace, moments.true_grad_sq_norm
        (2.0, 0.0)
        >>> moments
        GradientMoments(batch 2, 2 measured, trace 2, ‖g‖² 1, noise scale inf)
    """

    batch_size: int
    sq_norms: Tensor
    grad_sq_norm: float
    effective_batch_size: float | None = None
    indices: Tensor | None = None
    by_group: dict[int, GradientMoments] = field(default_factory=dict)
    by_parameter: dict[str, Tensor] = field(default_factory=dict)
    parameter_grad_sq_norms: dict[str, float] = field(default_factory=dict)
    parameter_inner_products: dict[str, Tensor] = field(default_factory=dict)
    inner_products: Tensor | None = None
    weights: Tensor | None = None
    corrections: Tensor | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    totals: Totals | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.inner_products is None:
            name = "the trace of samples of unequal weight"
            raise ValueError(NO_INNER_PRODUCTS.format(name=name))

    def __repr__(self) -> str:
        try:
            trace = f"trace {self.variance_trace:.4g}, "
            scale = f", noise scale {self.noise_scale:.4g}"
        except ValueError:
            trace = scale = ""
        more = "".join(f", {name}" for name in self.statistics)
        return (f"GradientMoments(batch {self.batch_size}, {self.n_measured} measured, {trace}"
                f"‖g‖² {self.grad_sq_norm:.4g}{scale}{more})")

    @property
    def m_eff(self) -> float:
        """effective_batch_size, or m."""
        size = self.effective_batch_size
        return float(self.batch_size) if size is None else size

    @property
    def second_moment(self) -> dict[str, Tensor]:
        """statistics["second_moment"]; empty where it was not measured."""
        return self.statistics.get("second_moment", {})

    @property
    def n_measured(self) -> int:
        """s, the number of measured samples."""
        return self.sq_norms.numel() if self.totals is None else self.totals.n_measured

    @cached_property
    def mean_sq_norm(self) -> float:
        """mean over the measured samples of ‖g_i‖²."""
        return mean_of(self.sq_norms) if self.totals is None else self.totals.mean_sq_norm

    @cached_property
    def biased_variance_trace(self) -> float:
        """mean ‖g_i‖² − ‖g‖², with inner products mean_S d_i: the trace with divisor m, as
        reference implementations of CABS use it."""
        if self.inner_products is None:
            return self.mean_sq_norm - self.grad_sq_norm
        if self.totals is not None and self.totals.mean_term is not None:
            return self.totals.mean_term
        return mean_of(self._terms())

    @property
    def centred_sq_norms(self) -> Tensor:
        """d_i = ‖g_i − g‖² = ‖g_i‖² − 2⟨g_i, g⟩ + ‖g‖² [s], float64; with weights
        ‖z_i − w_i g‖². Below 0 only by rounding, which is cut off.

        Raises:
            ValueError: measured without inner products.
        """
        constant, factor = centred_terms(self, "centred_sq_norms")
        return (constant + factor * self.grad_sq_norm).clamp(min=0)

    @cached_property
    def variance_trace(self) -> float:
        """T̂ = (mean_S ‖g_i‖² − ‖g‖²)/(1 − 1/m_eff), with inner products mean_S d_i/(1 − 1/m_eff):
        unbiased for tr Cov(g_i) (divisor m − 1), also for s < m.

        Raises:
            ValueError: a batch of one has no variance.
        """
        self._check_size()
        return self.biased_variance_trace / (1 - 1 / self.m_eff)

    @property
    def std_error(self) -> float:
        """Standard error of T̂ as an estimate of the data's tr Cov(g_i):
        c·√(var_S(d_i)/s · ((m − 1)² + s − 1)/(m(m − 2))), var with divisor s − 1.

        The last factor takes out that all d_i share one g, so that they spread less than
        independent ones: exact for normal gradients (8 % of the error at m = s = 8), to first order
        in 1/m for others. Of an estimate from the gradients of k processes
        (totals.degrees_of_freedom: f = k − 1) T̂·√(2/f): that of noise in one direction.

        Raises:
            ValueError: measured without inner products, fewer than two measured samples, or a batch
                of two, in which both lie at the same distance from their mean.
        """
        self._check_size()
        if self.totals is not None and self.totals.degrees_of_freedom:
            return self.variance_trace * math.sqrt(2 / self.totals.degrees_of_freedom)
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="std_error"))
        if self.n_measured < 2:
            raise ValueError("the standard error needs at least 2 measured samples, got 1: measure "
                             "more (samples=)")
        if self.m_eff <= 2:
            raise ValueError(f"the standard error needs a batch of at least 3 samples, got "
                             f"{self.batch_size}: of two, both lie at one distance from their mean")
        return self.error_of_mean(self._term_spread())

    def error_of_mean(self, spread: float) -> float:
        """Standard error of c·mean_S x_i for terms of standard deviation `spread` that are centred
        at the batch's own mean gradient, as those of T̂."""
        m, s = self.m_eff, self.n_measured
        shared = ((m - 1) ** 2 + s - 1) / (m * (m - 2))
        return spread * math.sqrt(shared / s) / (1 - 1 / m)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) = (T̂/(1 + t·r), T̂/(1 − t·r)), r = std_error/T̂, t the quantile of Student's
        distribution with s − 1 degrees of freedom; high is infinite where t·r >= 1.

        The error of a variance grows with the variance: r is taken to hold at the true T. Where
        ‖g_i − g‖² has heavy tails it covers less than its level until s is large; see
        adabatch/diagnostics/README.md.

        Raises:
            ValueError: measured without inner products, too few samples for an error, or a level
                outside (0, 1).

        Example:
            >>> import torch
            >>> g = torch.tensor([1.0, 2.0, 3.0, 6.0])
            >>> moments = GradientMoments(4, g**2, 9.0, inner_products=3 * g)
            >>> round(moments.variance_trace, 3), [round(end, 2) for end in moments.interval(0.5)]
            (4.667, [3.03, 10.16])
        """
        from scipy.special import stdtrit

        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, both excluded, got {level!r}; 0.9 "
                             "is usual")
        trace = self.variance_trace
        half = float(stdtrit(self.n_measured - 1, (1 + level) / 2)) * self.std_error
        if not trace > 0:
            return 0.0, half
        return trace**2 / (trace + half), trace**2 / (trace - half) if half < trace else math.inf

    @property
    def inner_product_variance(self) -> float:
        """Var_i⟨g_i, g⟩ = mean_S (⟨g_i, g⟩ − ‖g‖²)²/(1 − 1/m_eff), divisor m − 1; with weights
        ⟨z_i − w_i g, g⟩. The part of the trace along g, times ‖g‖².

        Raises:
            ValueError: measured without inner products, or a batch of one.
        """
        if self.inner_products is None:
            raise ValueError(NO_INNER_PRODUCTS.format(name="inner_product_variance"))
        self._check_size()
        if self.totals is not None and self.totals.mean_inner is not None:
            return self.totals.mean_inner / (1 - 1 / self.m_eff)
        weights = 1.0 if self.weights is None else self.weights
        squares = (self.inner_products.double() - weights * self.grad_sq_norm).square()
        if self.corrections is not None:
            squares = self.corrections * squares
        return float(squares.mean()) / (1 - 1 / self.m_eff)

    @property
    def true_grad_sq_norm(self) -> float:
        """Ĝ² = ‖g‖² − T̂/m_eff, unbiased for ‖E g_i‖²; may be negative on one batch: smooth first,
        clamp after."""
        return self.grad_sq_norm - self.variance_trace / self.m_eff

    @property
    def noise_scale(self) -> float:
        """T̂/Ĝ² of this batch alone (in samples). A ratio of single estimates: for a steady figure
        divide smoothed ones. Infinite if Ĝ² is 0."""
        return _ratio(self.variance_trace, self.true_grad_sq_norm)

    @property
    def snr(self) -> float:
        """m·Ĝ²/T̂, the signal-to-noise ratio of the batch gradient. Infinite if T̂ is 0."""
        return _ratio(self.m_eff * self.true_grad_sq_norm, self.variance_trace)

    @property
    def is_finite(self) -> bool:
        """Whether all moments are finite numbers."""
        if self.totals is not None:
            return math.isfinite(self.grad_sq_norm) and math.isfinite(self.mean_sq_norm)
        finite = math.isfinite(self.grad_sq_norm) and math.isfinite(self.mean_sq_norm)
        products = self.inner_products
        return finite and (products is None or bool(products.isfinite().all()))

    def _terms(self) -> Tensor:
        """Values [s] whose mean is T̂·(1 − 1/m_eff)."""
        terms = self.centred_sq_norms
        return terms if self.corrections is None else self.corrections * terms

    def _term_spread(self) -> float:
        """Their standard deviation, divisor s − 1."""
        totals, s = self.totals, self.n_measured
        if totals is None or totals.mean_term is None or totals.mean_square_term is None:
            return float(self._terms().std())
        variance = totals.mean_square_term - totals.mean_term**2
        return math.sqrt(max(0.0, variance) * s / (s - 1))

    def _check_size(self) -> None:
        if self.m_eff <= 1:
            raise ValueError("the variance of the gradient needs at least 2 samples, got a batch "
                             f"of {self.batch_size}")
        if not self.n_measured:
            raise ValueError("no sample was measured")


def centred_terms(moments: GradientMoments, name: str = "the trace") -> tuple[Tensor, Tensor]:
    """(a, b) [s], float64, with ‖g_i − w_i g‖² = a_i + b_i ‖g‖²: a_i = ‖g_i‖² − 2 w_i ⟨g_i, g⟩,
    b_i = w_i².

    Raises:
        ValueError: measured without inner products.
    """
    if moments.inner_products is None:
        raise ValueError(NO_INNER_PRODUCTS.format(name=name))
    norms, products = moments.sq_norms.double(), moments.inner_products.double()
    weights = torch.ones_like(norms) if moments.weights is None else moments.weights.double()
    return norms - 2 * weights * products, weights**2


def mean_of(values: Tensor) -> float:
    """The mean, added up in float64. Few values are added up in Python: the first reduction in a
    step takes longer than that.

    Example:
        >>> mean_of(torch.tensor([1.0, 2.0]))
        1.5
    """
    n = values.numel()
    if n > FEW:
        return float(values.mean(dtype=torch.float64))
    return sum(values.tolist()) / n if n else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.nan if numerator == 0 else math.copysign(math.inf, numerator)


def trace_error(moments: GradientMoments) -> tuple[float, float]:
    """(std_error, degrees of freedom) of this step's T̂, for MovingAverage.update.

    (NaN, 0) where inner_products were not measured or samples are too few.

    Example:
        >>> import torch
        >>> trace_error(GradientMoments(4, sq_norms=torch.ones(4), grad_sq_norm=0.5))
        (nan, 0.0)
    """
    totals = moments.totals
    if moments.inner_products is None and not (totals and totals.degrees_of_freedom):
        return math.nan, 0.0
    try:
        return moments.std_error, moments.n_measured - 1.0
    except ValueError:
        return math.nan, 0.0


def trace_and_signal(moments: GradientMoments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """T̂ with s and its error, and Ĝ² with m: what JointAverages.update takes.

    Example:
        >>> import torch
        >>> moments = GradientMoments(2, sq_norms=torch.tensor([4.0, 8.0]), grad_sq_norm=4.0)
        >>> trace_and_signal(moments)
        ((4.0, 2, nan, 0.0), (2.0, 2))
    """
    trace = moments.variance_trace, moments.n_measured, *trace_error(moments)
    return trace, (moments.true_grad_sq_norm, moments.batch_size)


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


class PoolOptions(NamedTuple):
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
    weights: Tensor | Sequence[float] | None = None, options: PoolOptions = PoolOptions(),  # noqa: B008
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
    sizes = [step.whole for step in passes]
    whole_size = sum(sizes)
    batch_size, k = round(whole_size), len(passes)
    mean, by_samples = options.loss_reduction == "mean", options.by_samples
    loss_scale *= options.world_size
    share = sum([step.batch_size for step in passes]) / whole_size if batch_size else 1.0
    common: Kwargs = {
        "batch_size": batch_size, "indices": _indices(passes), "share": share}
    if weights is None:
        factor = 1 if by_samples else k
        scales = [(size * factor if mean else 1) / loss_scale for size in sizes]
        if k > 1:
            m_eff = _effective(passes) if mean and not by_samples else None
            common |= {"effective_batch_size": m_eff, "corrections": _corrections(passes, m_eff)}
    else:
        scales = [(size if by_samples else whole_size) / loss_scale for size in sizes]
        sample_weights = measured_weights(passes, weights, options.loss_reduction, by_samples)
        common |= {"weights": sample_weights, "corrections": _strata(passes)}
    whole = (1 if mean else 1 / max(1, batch_size)) * options.world_size / loss_scale
    n_rows = range(len(options.group_of_row))
    squares = [each**2 for each in scales]
    norms = [_row(passes, "sq_norms", row, squares) for row in n_rows]
    products: list[Tensor] | None = None
    if "inner_products" in passes[0].rows:
        factors = [each * whole for each in scales]
        products = [_row(passes, "inner_products", row, factors) for row in n_rows]
    batch_norms = [float(value) * whole**2 for value in grad_sq_norms.tolist()]

    def moments(of_group: int | None = None, **more: Argument) -> GradientMoments:
        """Over the rows of a group, or over all."""
        of_norms, of_products, of_batch = norms, products, batch_norms
        if of_group is not None:
            rows = [row for row in n_rows if options.group_of_row[row] == of_group]
            of_norms, of_batch = [norms[row] for row in rows], [batch_norms[row] for row in rows]
            of_products = None if products is None else [products[row] for row in rows]
        return GradientMoments(
            sq_norms=_sum(of_norms), grad_sq_norm=sum(of_batch),
            inner_products=None if of_products is None else _sum(of_products), **common, **more)

    groups = sorted(set(options.group_of_row)) if len(n_rows) > 1 else []
    more: Kwargs = {}
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
    return moments(**more)


def _statistics(
    passes: Sequence[BackwardPass], scales: Sequence[float], statistics: Sequence[Statistic]
) -> Kwargs:
    pooled: Kwargs = {}
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
    parts, offset = [], 0
    for step in passes:
        if step.indices is not None:
            break
    else:
        return None
    for step in passes:
        rows = torch.arange(step.batch_size) if step.indices is None else step.indices.cpu()
        parts.append(rows + offset)
        offset += step.batch_size
    return parts[0] if len(parts) == 1 else torch.cat(parts)
