"""Goodput: the fitted step time against the one that made the times, the chosen size against closed forms and a search by brute force."""

import math

import numpy as np
import pytest
import torch

from adabatch import GradientMoments
from adabatch.controllers import Goodput
from adabatch.controllers.goodput import REFIT
from adabatch.controllers.throughput import StepTime, fit_step_time


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_fit_finds_the_times_it_was_made_from(seed, noise):
    rng = np.random.default_rng(seed)
    truth = StepTime(10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-6, -3))
    sizes = np.unique(rng.integers(8, 4000, 12))
    seconds = [truth.seconds(size) * math.exp(noise * rng.normal()) for size in sizes]
    fitted = fit_step_time(sizes, seconds, np.ones(len(sizes)))
    for size in sizes:
        assert fitted.seconds(size) == pytest.approx(truth.seconds(size), rel=1e-3 if noise == 0 else 3 * noise)


def test_the_fit_of_several_replicas_predicts_times_within_the_range():
    truth = StepTime(0.01, 1e-3, network=0.2, gamma=2.0, replicas=4)
    sizes = np.geomspace(16, 8192, 20)
    fitted = fit_step_time(sizes, [truth.seconds(size) for size in sizes], np.ones(20), replicas=4)
    assert [fitted.seconds(size) for size in sizes] == pytest.approx([truth.seconds(size) for size in sizes], rel=0.02)


def test_network_and_compute_overlap_by_gamma():
    assert StepTime(3.0, 0.0, network=4.0, gamma=1.0, replicas=2).seconds(8) == pytest.approx(7.0)
    assert StepTime(3.0, 0.0, network=4.0, gamma=2.0, replicas=2).seconds(8) == pytest.approx(5.0)


@pytest.mark.parametrize(("per_step", "per_sample", "noise_scale"), [(0.1, 1e-3, 50.0), (0.01, 1e-4, 1e4), (1.0, 1e-3, 300.0)])
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
            self.rule.advance(samples=size, epoch=0)
            square = 1.0 + self.noise_scale / size
            moments = GradientMoments(size, torch.full((size,), 1.0 + self.noise_scale, dtype=torch.float64), square)
            wish = self.rule.propose(moments, loss=1.0, lr=0.1)
        return wish


def test_it_doubles_once_to_learn_then_goes_where_goodput_is_greatest_no_faster_than_doubling():
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
    for size, wish in ((16, 32), (32, 64)):
        assert steps.take(size) == wish
    steps.rule.wish = 85.0
    assert steps.take(85) == 85.0
    eager = Steps(truth, noise_scale=100.0, gain=0.0)
    eager.take(16), eager.take(32)
    eager.rule.wish = 85.0
    assert eager.take(85) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_something_else_held_up_do_not_count(seed):
    rng, truth = np.random.default_rng(seed), StepTime(1e-3, 2e-5)
    steps, size = Steps(truth, noise_scale=100.0), 16

    class Busy:
        def seconds(self, size):
            return truth.seconds(size) * math.exp(0.1 * rng.normal()) * (rng.uniform(3, 20) if rng.random() < 0.1 else 1.0)

    steps.truth = Busy()
    for _ in range(40):
        size = max(16, round(steps.take(size)))

    def goodput(size):
        return size / truth.seconds(size) / (100.0 + size)

    assert goodput(size) > 0.93 * goodput(math.sqrt(100 * 50))  # the best, by the closed form


def test_the_times_kept_are_the_latest_ones():
    rule = Goodput(16, clock=lambda: 0.0)
    for samples in [*range(1, 2000), *[7] * 100]:
        rule.advance(samples=samples, epoch=0)
    assert len(rule.sizes) == len(rule.seconds) <= 992
    now = iter(range(10_000))
    rule = Goodput(16, clock=lambda: next(now))
    for samples in [16, 32] * 200:
        rule.advance(samples=samples, epoch=0)
    assert len(rule.sizes) == 62
    assert set(rule.seconds) == {1}


def test_no_size_beyond_the_bound():
    steps = Steps(StepTime(0.1, 1e-3), noise_scale=1e6, max_batch_size=50)
    assert [steps.take(16), steps.take(32), steps.take(50)] == [32, 50, 50]


def test_a_saved_run_goes_on():
    steps, other = (Steps(StepTime(0.1, 1e-3), noise_scale=100.0) for _ in range(2))
    steps.take(16), steps.take(32)
    other.rule.load_state_dict(steps.rule.state_dict())
    assert other.take(64) == pytest.approx(steps.take(64))


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
