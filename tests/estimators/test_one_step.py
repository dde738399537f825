"""Intervals of the rules that take one step's raw signal: against Fieller's inequality on the full gradients, and on a quadratic where the truth is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from adabatch import GradientMoments
from adabatch.controllers import InnerProductTest, NormTest
from adabatch.estimators.one_step import signal_error
from tests.estimators.quadratic import Quadratic

RULES = {
    "norm test": lambda: NormTest(theta=0.5, signal="raw"),
    "along": lambda: InnerProductTest(theta=0.5, signal="raw"),
    "across": lambda: InnerProductTest(theta=1e3, nu=0.5, signal="raw"),
}


def moments_of(grads, **options):
    mean = grads.mean(0)
    return GradientMoments(len(grads), torch.from_numpy((grads**2).sum(1)), float(mean @ mean), inner_products=torch.from_numpy(grads @ mean), **options)


def numerators(grads):
    """{rule: terms whose mean, times m/(m − 1), is what the rule divides by ‖g‖²/4}: of the distances, their part along g, and the rest."""
    mean = grads.mean(0)
    along = ((grads - mean) @ mean) ** 2 / (mean @ mean)
    distances = ((grads - mean) ** 2).sum(1)
    return {"norm test": distances, "along": along, "across": distances - along}


@pytest.mark.parametrize("name", RULES)
def test_the_ends_are_those_of_fiellers_inequality(name):
    grads = 1.0 + np.random.default_rng(3).normal(size=(10, 4))
    rule, m, square = RULES[name](), 10, float((grads.mean(0) ** 2).sum())
    proposal = rule.propose(moments_of(grads), loss=1.0, lr=0.1)
    terms = numerators(grads)[name]
    x = terms.mean() * m / (m - 1)
    # All terms share one mean: for normal gradients that takes 1/(m − 1) from their variance.
    variances = {key: value.var(ddof=1) * (m - 1) / (m - 2) / m * (m / (m - 1)) ** 2 for key, value in numerators(grads).items()}
    of_square = 4 * float(np.cov(grads @ grads.mean(0))) / m - variances["norm test"] / m
    quantile = stats.t.ppf(0.95, m - 1)
    assert proposal == pytest.approx(4 * x / square)
    low, high = rule.proposal_interval(0.9)
    assert low < proposal < high
    for end in (low, high):
        assert (x - end / 4 * square) ** 2 == pytest.approx(quantile**2 * (variances[name] + (end / 4) ** 2 * of_square))
    both = InnerProductTest(theta=0.5, nu=0.5, signal="raw")
    both.propose(moments_of(grads), loss=1.0, lr=0.1)
    parts = [RULES[key]() for key in ("along", "across")]
    for part in parts:
        part.propose(moments_of(grads), loss=1.0, lr=0.1)
    assert both.proposal_interval() == tuple(np.maximum(parts[0].proposal_interval(), parts[1].proposal_interval()))


def coverage(dimensions, size, m, n_runs):
    """({rule: share of runs whose 90 % interval holds its ratio}, mean square of SE(‖g‖²) over its variance)."""
    problem = Quadratic(curvature=np.linspace(0.5, 2, dimensions), variances=6 / np.arange(1, dimensions + 1))
    rng, w = np.random.default_rng(7), np.full((1, dimensions), size / math.sqrt(dimensions))
    expected = float(problem.grad_sq_norm(w)[0]) + problem.trace / m
    hits, errors, squares = {name: [] for name in RULES}, [], []
    for _ in range(n_runs):
        grads = problem.batch(w, m, rng)[0][0]
        moments, mean = moments_of(grads), grads.mean(0)
        along = float(problem.variances @ mean**2) / float(mean @ mean)
        truths = {"norm test": problem.trace, "along": along, "across": problem.trace - along}
        for name, make in RULES.items():
            rule = make()
            rule.propose(moments, loss=1.0, lr=0.1)
            low, high = rule.proposal_interval(0.9)
            hits[name].append(low <= 4 * truths[name] / expected <= high)
        errors.append(signal_error(moments) ** 2)
        squares.append(moments.grad_sq_norm)
    return {name: float(np.mean(values)) for name, values in hits.items()}, np.mean(errors) / np.var(squares)


@pytest.mark.parametrize(("dimensions", "size", "m"), [(12, 0.8, 16), (12, 0.3, 64), (100, 0.8, 64), (12, 2.0, 64)])
def test_intervals_cover_the_ratio(dimensions, size, m):
    found, variance = coverage(dimensions, size, m, 1000)
    print(dimensions, size, m, found, round(variance, 3))
    assert all(0.85 <= share <= 0.95 for share in found.values()), found
    assert 0.9 < variance < 1.25  # the larger of two estimates that agree on average where noise prevails


def test_without_inner_products_or_samples_enough_there_is_no_interval():
    grads = 1.0 + np.random.default_rng(3).normal(size=(6, 4))
    bare = GradientMoments(6, torch.from_numpy((grads**2).sum(1)), float((grads.mean(0) ** 2).sum()))
    for moments in (bare, moments_of(grads[:2])):
        rule = NormTest(signal="raw")
        assert all(math.isnan(end) for end in rule.proposal_interval())
        assert rule.propose(moments, loss=1.0, lr=0.1) > 0
        assert all(math.isnan(end) for end in rule.proposal_interval())
    rule = InnerProductTest(nu=1.0, signal="raw")
    assert all(math.isnan(end) for end in rule.proposal_interval())
    rule.propose(moments_of(grads[:2]), loss=1.0, lr=0.1)
    assert all(math.isnan(end) for end in rule.proposal_interval())
