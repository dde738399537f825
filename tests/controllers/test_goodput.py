"""Goodput: the fitted step time against the one that made the times, the chosen size against closed
forms and a search by brute force."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from adabatch import GradientMoments
from adabatch.controllers import Goodput
from adabatch.controllers.goodput import REFIT, StepTime, fit_step_time
from tests.estimators.quadratic import Quadratic, statistics


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_fit_finds_the_times_it_was_made_from(seed, noise):
    rng = np.random.default_rng(seed)
    truth = StepTime(10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-6, -3))
    sizes = np.unique(rng.integers(8, 4000, 12))
    seconds = [truth.seconds(size) * math.exp(noise * rng.normal()) for size in sizes]
    fitted = fit_step_time(sizes, seconds, np.ones(len(sizes)))
    for size in sizes:
        assert fitted.seconds(size) == pytest.approx(truth.seconds(size),
                                                     rel=1e-3 if noise == 0 else 3 * noise)


def test_the_fit_of_several_replicas_predicts_times_within_the_range():
    truth = StepTime(0.01, 1e-3, network=0.2, gamma=2.0, replicas=4)
    sizes = np.geomspace(16, 8192, 20)
    fitted = fit_step_time(sizes, [truth.seconds(size) for size in sizes], np.ones(20), replicas=4)
    assert [fitted.seconds(size) for size in sizes] == pytest.approx(
        [truth.seconds(size) for size in sizes], rel=0.02
    )


def test_the_fit_weights_each_size_by_its_count():
    """The line passes through the two sizes of many steps, and by the third where that has more."""
    truth, sizes = StepTime(1.0, 0.01), [16, 64, 256]
    seconds = [truth.seconds(16), 2 * truth.seconds(64), truth.seconds(256)]
    fitted = fit_step_time(sizes, seconds, [1e6, 1, 1e6])
    for size in (16, 256):
        assert fitted.seconds(size) == pytest.approx(truth.seconds(size), rel=1e-3)
    evenly, by_third = (fit_step_time(sizes, seconds, [1, n, 1]).seconds(64) for n in (1, 1e6))
    assert truth.seconds(64) < evenly < 0.95 * by_third
    assert by_third == pytest.approx(2 * truth.seconds(64), rel=1e-2)


def test_network_and_compute_overlap_by_gamma():
    assert StepTime(3.0, 0.0, network=4.0, gamma=1.0, replicas=2).seconds(8) == pytest.approx(7.0)
    assert StepTime(3.0, 0.0, network=4.0, gamma=2.0, replicas=2).seconds(8) == pytest.approx(5.0)


@pytest.mark.parametrize(("per_step", "per_sample", "noise_scale"),
                         [(0.1, 1e-3, 50.0), (0.01, 1e-4, 1e4), (1.0, 1e-3, 300.0)])
def test_on_one_process_the_best_size_is_the_closed_form(per_step, per_sample, noise_scale):
    best = Goodput(16).best_size(StepTime(per_step, per_sample), noise_scale, 1e6)
    assert best == pytest.approx(math.sqrt(noise_scale * per_step / per_sample), rel=1e-3)


class Steps:
    """Hands a controller steps of known duration and moments of a known noise scale."""

    def __init__(self, truth, noise_scale, **options):
        self.truth, self.noise_scale, self.now = truth, noise_scale, 0.0
        self.rule = Goodput(16, clock=lambda: self.now, **options)

    def take(self, size, n=REFIT):
        for _ in range(n):
            self.now += self.truth.seconds(size)
            self.rule.on_step(samples=size, epoch=0)
            square = 1.0 + self.noise_scale / size
            moments = GradientMoments(size, torch.full((size,), 1.0 + self.noise_scale,
                                                       dtype=torch.float64), square)
            proposal = self.rule.propose(moments, loss=1.0, lr=0.1)
        return proposal


def test_it_doubles_once_then_maximizes_goodput_at_most_doubling():
    steps = Steps(StepTime(0.1, 1e-3), noise_scale=100.0)  # the best size is √(100 · 100) = 100
    assert steps.take(16) == 32
    assert steps.take(32) == 64
    assert steps.take(64) == pytest.approx(100, rel=0.01)
    assert steps.take(100) == pytest.approx(100, rel=0.01)


def test_a_gain_below_the_threshold_moves_nothing():
    truth = StepTime(0.1, 1e-3)

    def goodput(size):
        return size / truth.seconds(size) / (100.0 + size)

    assert goodput(100) / goodput(85) - 1 < 0.05 < goodput(100) / goodput(40) - 1
    steps = Steps(truth, noise_scale=100.0)
    for size, proposal in ((16, 32), (32, 64)):
        assert steps.take(size) == proposal
    steps.rule.proposal = 85.0
    assert steps.take(85) == 85.0
    eager = Steps(truth, noise_scale=100.0, gain=0.0)
    eager.take(16), eager.take(32)
    eager.rule.proposal = 85.0
    assert eager.take(85) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_outliers_among_the_times_do_not_count(seed):
    rng, truth = np.random.default_rng(seed), StepTime(1e-3, 2e-5)
    steps, size = Steps(truth, noise_scale=100.0), 16

    class Busy:
        def seconds(self, size):
            return truth.seconds(size) * math.exp(0.1 * rng.normal()) * (
                rng.uniform(3, 20) if rng.random() < 0.1 else 1.0
            )

    steps.truth = Busy()
    for _ in range(40):
        size = max(16, round(steps.take(size)))

    def goodput(size):
        return size / truth.seconds(size) / (100.0 + size)

    assert goodput(size) > 0.93 * goodput(math.sqrt(100 * 50))  # the best, by the closed form


def test_the_times_kept_are_the_latest_ones():
    rule = Goodput(16, clock=lambda: 0.0)
    for samples in [*range(1, 2000), *[7] * 100]:
        rule.on_step(samples=samples, epoch=0)
    assert len(rule.sizes) == len(rule.seconds) <= 992
    now = iter(range(10_000))
    rule = Goodput(16, clock=lambda: next(now))
    for samples in [16, 32] * 200:
        rule.on_step(samples=samples, epoch=0)
    assert len(rule.sizes) == 62
    assert set(rule.seconds) == {1}


def test_no_size_beyond_the_bound():
    steps = Steps(StepTime(0.1, 1e-3), noise_scale=1e6, max_batch_size=50)
    assert [steps.take(16), steps.take(32), steps.take(50)] == [32, 50, 50]


def test_a_saved_run_continues():
    steps, other = (Steps(StepTime(0.1, 1e-3), noise_scale=100.0) for _ in range(2))
    steps.take(16), steps.take(32)
    other.rule.load_state_dict(steps.rule.state_dict())
    assert other.take(64) == pytest.approx(steps.take(64))


@pytest.mark.parametrize("seed", range(20))
def test_a_larger_noise_scale_never_makes_a_smaller_size_best(seed):
    rng = np.random.default_rng(seed)
    network = {"network": 10 ** rng.uniform(-3, 1), "gamma": rng.uniform(1, 10),
               "replicas": 4} if seed % 2 else {}
    truth = StepTime(10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-6, -2), **network)
    rule = Goodput(16)
    sizes = [rule.best_size(truth, noise_scale, 8192)
             for noise_scale in [0.0, *np.geomspace(1, 1e6, 12), math.inf]]
    assert all(first <= second * (1 + 1e-4) for first, second in pairwise(sizes))


def noisy_run(seed, gain, truth, problem, sizes=(64, 256), n=2 * REFIT, size=0.8):
    """A rule after n steps of alternating sizes, and the statistics of each."""
    rng, w, now = np.random.default_rng(seed), np.full((1, 12), size / math.sqrt(12)), [0.0]
    rule, seen = Goodput(16, gain=gain, clock=lambda: now[0]), []
    for step in range(n):
        m = sizes[step % 2]
        grads = problem.batch(w, m, rng)[0]
        found = statistics(problem, grads, np.zeros((1, m)))
        seen.append((m, float(found["trace"][0]), float(found["signal"][0])))
        now[0] += truth.seconds(m)
        rule.on_step(samples=m, epoch=0)
        moments = GradientMoments(m, torch.from_numpy((grads[0] ** 2).sum(1)),
                                  float((found["mean"][0] ** 2).sum()))
        rule.propose(moments, loss=1.0, lr=0.1)
    return rule, np.array(seen), w


def ratio_ends(seen, smoothing=0.95):
    """The ends of the noise scale's interval, by a fine grid on Fieller's inequality."""
    m, x, y = seen.T
    p = smoothing ** np.arange(len(m) - 1, -1, -1.0) * m
    p /= p.sum()
    dx, dy = x - p @ x, y - p @ y
    lost = 1 - 2 * (p**3).sum() / (p**2).sum() + (p**2).sum()
    cov = [[(p**2 * a * b).sum() / lost for a in (dx, dy)] for b in (dx, dy)]
    shares = p**2 / m
    quantile = stats.t.ppf(0.95, shares.sum() ** 2 / (shares**2).sum() - 1)
    ratios = np.geomspace(0.1, 1e4, 200_000)
    kept = (p @ x - ratios * (p @ y)) ** 2 <= quantile**2 * (cov[0][0] - 2 * ratios * cov[0][1]
                                                             + ratios**2 * cov[1][1])
    return ratios[kept][0], ratios[kept][-1]


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_the_interval_is_what_would_be_decided_at_the_ends_of_the_noise_scale(gain):
    truth, problem = StepTime(1.0, 1e-3), Quadratic()
    rule, seen, _ = noisy_run(0, gain, truth, problem, n=REFIT)

    def goodput(size, noise_scale):
        return size / truth.seconds(size) / (noise_scale + size)

    # The first decision is by both models; until then the proposal is the first size.
    grid, before = np.geomspace(16, 512, 20_000), 64.0
    expected = []
    for end in ratio_ends(seen):
        best = grid[np.argmax([goodput(size, end) for size in grid])]
        expected.append(best if goodput(best, end) > (1 + gain) * goodput(64, end) else before)
    low, high = rule.interval(0.9)
    assert (low, high) == pytest.approx((min(*expected, rule.proposal),
                                         max(*expected, rule.proposal)), rel=2e-3)
    assert low <= rule.proposal <= high


def test_the_interval_holds_the_best_size():
    problem, hits = Quadratic(), []
    square = problem.grad_sq_norm(np.full((1, 12), 0.8 / math.sqrt(12)))[0]
    noise_scale = problem.trace / float(square)
    truth = StepTime(200.0**2 / noise_scale, 1.0)  # the best size is √(φ·a/b) = 200
    for seed in range(120):
        low, high = noisy_run(seed, 0.0, truth, problem)[0].interval(0.9)
        hits.append(low <= 200 <= high)
    print("Goodput", np.mean(hits))
    assert 0.82 <= np.mean(hits) <= 0.97


def test_before_two_sizes_are_timed_there_is_no_interval():
    steps = Steps(StepTime(0.1, 1e-3), noise_scale=100.0)
    steps.take(16)
    assert all(math.isnan(end) for end in steps.rule.interval())
    steps.take(32), steps.take(64)
    assert steps.rule.interval() == pytest.approx((100, 100), rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Goodput(16, max_batch_size=8), "must not be below base_batch_size"),
        (lambda: Goodput(16, gain=-1), "gain must be a number >= 0, got -1"),
        (lambda: fit_step_time([16, 16], [1.0, 1.0], [1, 1]), "at least two batch sizes"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
