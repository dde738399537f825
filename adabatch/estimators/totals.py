"""Sums over the samples of all processes: what each adds to one small vector, and the moments read
from the sum of these vectors.

Legend: m samples in the step over all processes, m_r of them and s_r measured ones on process r,
G = ‖g‖²; per measured sample its norm n_i = ‖g_i‖², its inner product p_i = ⟨g_i, g⟩, its weight
w_i and its correction c_i (see GradientMoments).

The mean over the measured of any x_i is (1/m) Σ_r m_r · mean over r's measured samples, so that
processes that measured different fractions of their samples count as they should. A term of T̂ is
c_i‖g_i − w_i g‖² = a_i + b_i G (see `centred_terms`), whose sums are known before G is: one round
of communication serves ‖g‖² in shards, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adabatch.estimators.moments import GradientMoments

N_SUMS = 10


@dataclass(frozen=True)
class Totals:
    """Means over the measured samples of all processes.

    Attributes:
        n_measured: s, measured samples of all processes; of an estimate from gradients of whole
            processes, their number.
        mean_sq_norm: mean ‖g_i‖².
        mean_term, mean_square_term: mean and mean square of the terms of T̂; None without inner
            products.
        mean_inner: mean of c_i(⟨g_i, g⟩ − w_i‖g‖²)²; None without inner products.
        parameter_terms: {name: mean of that parameter's terms of T̂}, on request.
        degrees_of_freedom: of T̂, where it does not come from samples: k − 1 for k processes.
    """

    n_measured: int
    mean_sq_norm: float
    mean_term: float | None = None
    mean_square_term: float | None = None
    mean_inner: float | None = None
    parameter_terms: dict[str, float] = field(default_factory=dict)
    degrees_of_freedom: int | None = None


def sums_of(moments: GradientMoments, share: float, replica: int = 1) -> list[float]:
    """What one process adds to the vector: N_SUMS numbers, 0 for those that need inner products
    where there are none.

    Args:
        moments: of the process's samples; grad_sq_norm is its part of ‖g‖², such that the parts of
            all processes add up.
        share: m_r/m.
        replica: number of processes that measure the same samples, each its part of their norms.

    Example:
        >>> from adabatch.estimators.moments import GradientMoments
        >>> moments = GradientMoments(2, sq_norms=torch.tensor([1.0, 3.0]), grad_sq_norm=1.0)
        >>> sums_of(moments, share=1.0)[:3]
        [1.0, 2.0, 4.0]
    """
    from adabatch.estimators.moments import centred_terms

    norms = moments.sq_norms.double()
    measured, rows = len(norms), moments.batch_size * share
    per_sample = [norms]
    if moments.inner_products is not None:
        products, one = moments.inner_products.double(), torch.ones_like(norms)
        weights = one if moments.weights is None else moments.weights.double()
        factors = one if moments.corrections is None else moments.corrections.double()
        a, b = (factors * each for each in centred_terms(moments))
        per_sample += [a, b, a * a, a * b, b * b, factors * products**2]
        per_sample.append(factors * weights * products)
    sums = (torch.stack(per_sample).mean(1) * rows).tolist() if measured else [0.0]
    rest = [0.0] * (N_SUMS - 2 - len(sums))
    return [moments.grad_sq_norm, measured / replica, *sums, *rest]


def totals_of(
    sums: Sequence[float] | Tensor, batch_size: int, has_inner_products: bool
) -> tuple[float, Totals]:
    """(‖g‖², the means), from the vectors of all processes added up.

    Example:
        >>> whole, totals = totals_of([1.0, 2.0, 4.0] + [0.0] * 7, 2, has_inner_products=False)
        >>> whole, totals.n_measured, totals.mean_sq_norm
        (1.0, 2, 2.0)
    """
    whole, measured, *rest = [float(value) for value in sums]
    norms, a, b, aa, ab, bb, pp, wp = (value / batch_size for value in rest)
    if not has_inner_products:
        return whole, Totals(round(measured), norms)
    # Below 0 only by rounding, as are the squares.
    term, square = a + b * whole, aa + 2 * ab * whole + bb * whole**2
    inner = pp - 2 * whole * wp + b * whole**2
    return whole, Totals(
        round(measured), norms, max(0.0, term), max(0.0, square), max(0.0, inner))


def between_processes(totals: Totals, grad_sq_norm: float, batch_size: int) -> Totals:
    """Totals of k processes' gradients g_r of b_r samples each, with mean_sq_norm = Σ b_r‖g_r‖²/m,
    as Totals that give the trace between them:

        T̂ = Σ_r b_r‖g_r − ḡ‖²/(k − 1) = (Σ_r b_r‖g_r‖² − m‖ḡ‖²)/(k − 1)

    unbiased for tr Cov(g_i), also for unequal b_r, with the spread of k − 1 degrees of freedom.

    Example:
        >>> found = between_processes(Totals(2, mean_sq_norm=2.0), grad_sq_norm=1.0, batch_size=4)
        >>> found.mean_sq_norm, found.degrees_of_freedom
        (4.0, 1)
    """
    freedom = totals.n_measured - 1
    trace = batch_size * (totals.mean_sq_norm - grad_sq_norm) / freedom
    mean = grad_sq_norm + (1 - 1 / batch_size) * trace
    return replace(totals, mean_sq_norm=mean, degrees_of_freedom=freedom)
