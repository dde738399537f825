"""On a noisy quadratic whose T, G², tr(PΣ), loss and floor are known: the estimates converge to them, and 90 % intervals hold them in 85 to 95 % of the runs.

Where the parameters move, what an average estimates is the mean of the truth over its window, with the average's own shares.
"""

import math

import numpy as np
import pytest
import torch

from adabatch import CABS, GradientMoments
from adabatch.estimators import floor
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.confidence import JointAverages
from adabatch.estimators.floor import LossFloor
from tests.estimators.quadratic import Quadratic, runs

STEPS = 120
SIZES = {
    "fixed": [16] * STEPS,
    "small": [8] * STEPS,
    "alternating": [4, 64] * (STEPS // 2),
    "mixed": [64, 16, 8, 32] * (STEPS // 4),
    "growing": [16 + step for step in range(STEPS)],
    "jump": [16] * (STEPS - 6) + [128] * 6,
    "few steps": [16] * 6,
}
WINDOW = 0.95
FEWER = 250  # runs of the tests that are not marked slow


def covers(interval, truth):
    return interval[0] <= truth <= interval[1]


class Tracked:
    """The averages of one run: T̂ with its errors and by residuals, Ĝ², loss, tr(PΣ), and both ratios' joints."""

    def __init__(self):
        self.dotted, self.plain, self.weighted = MovingAverage(WINDOW), MovingAverage(WINDOW), MovingAverage(WINDOW)
        self.signal, self.loss, self.gap = MovingAverage(WINDOW), MovingAverage(WINDOW), MovingAverage(WINDOW)
        self.noise_scale, self.wish = JointAverages(self.dotted, self.signal), JointAverages(self.plain, self.gap)

    def update(self, step, run, floor):
        m = step["m"]
        trace, loss = float(step["trace"][run]), float(step["loss"][run])
        self.noise_scale.update((trace, m, float(step["error"][run]), m - 1), (float(step["signal"][run]), m))
        self.wish.update((trace, m), (loss - floor, m))
        self.loss.update(loss, m)
        self.weighted.update(float(step["weighted"][run]), m)


def coverage(problem, start, sizes, lr, seed=0):
    """{name: share of the runs whose 90 % interval holds the truth}."""
    n_runs = len(start)
    tracked = [Tracked() for _ in range(n_runs)]
    signals, losses = [], []
    for step, signal, loss in runs(problem, start, sizes, lr, seed):
        signals.append(signal)
        losses.append(loss)
        for run, averages in enumerate(tracked):
            averages.update(step, run, problem.floor)
    shares = WINDOW ** np.arange(len(sizes) - 1, -1, -1.0) * np.array(sizes, float)
    shares /= shares.sum()
    signal, loss, trace = shares @ np.array(signals), shares @ np.array(losses), problem.trace
    hits = {
        "T of the last step": [covers(last_step(step, run), trace) for run in range(n_runs)],
        "T, dots": [covers(averages.dotted.interval(), trace) for averages in tracked],
        "T, residuals": [covers(averages.plain.interval(), trace) for averages in tracked],
        "tr(PΣ)": [covers(averages.weighted.interval(), problem.preconditioned_trace) for averages in tracked],
        "G²": [covers(averages.signal.interval(), signal[run]) for run, averages in enumerate(tracked)],
        "loss": [covers(averages.loss.interval(), loss[run]) for run, averages in enumerate(tracked)],
        "noise scale": [covers(averages.noise_scale.ratio_interval(), trace / signal[run]) for run, averages in enumerate(tracked)],
        "wish of CABS": [covers(averages.wish.ratio_interval(), trace / (loss[run] - problem.floor)) for run, averages in enumerate(tracked)],
    }
    return {name: float(np.mean(values)) for name, values in hits.items()}


def last_step(step, run):
    """The interval of GradientMoments for one run's last batch."""
    distances, square = step["distances"][run], float((step["mean"][run] ** 2).sum())
    # Norms and inner products that belong to these distances: the interval depends on nothing else.
    dots = torch.full((step["m"],), square, dtype=torch.float64)
    return GradientMoments(step["m"], torch.tensor(distances + square), square, dots=dots).interval(0.9)


def starts(n_runs, size=0.8):
    return np.full((n_runs, 12), size / math.sqrt(12))


@pytest.mark.parametrize("name", SIZES)
def test_intervals_cover_the_truth(name):
    found = coverage(Quadratic(), starts(FEWER), SIZES[name], lr=0.0)
    assert all(0.83 <= share <= 0.97 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.0, 0.002, 0.02], ids=["held", "slow", "fast"])
@pytest.mark.parametrize("name", SIZES)
def test_intervals_cover_the_truth_in_1000_runs(name, lr):
    found = coverage(Quadratic(), starts(1000), SIZES[name], lr, seed=1)
    print(name, lr, {key: round(value, 3) for key, value in found.items()})
    assert all(0.85 <= share <= 0.95 for share in found.values()), found


def test_estimates_converge_to_the_truth():
    """The longer the window, the nearer: within three of its errors, which fall as the root of the steps."""
    problem, errors = Quadratic(), {}
    for window, steps in ((0.99, 600), (0.999, 6000)):
        averages = {name: MovingAverage(window) for name in ("trace", "signal", "weighted", "loss")}
        for step, *_ in runs(problem, starts(1), [16] * steps, seed=2):
            for name, average in averages.items():
                average.update(float(step[name][0]), 16)
        signal, loss = problem.grad_sq_norm(starts(1))[0], problem.loss(starts(1))[0]
        truths = {"trace": problem.trace, "signal": signal, "weighted": problem.preconditioned_trace, "loss": loss}
        for name, truth in truths.items():
            assert abs(averages[name].average - truth) < 3 * averages[name].std_error()
        errors[window] = {name: average.std_error() / truths[name] for name, average in averages.items()}
    for name, error in errors[0.999].items():
        assert error == pytest.approx(errors[0.99][name] / math.sqrt(10), rel=0.35)
        assert error < 0.06


FLOORS = {
    "power": lambda step, steps: 0.5 + 2 * (step + 5) ** -0.5,
    "hyperbola": lambda step, steps: 0.5 + 3 / (1 + step / 20),
    "exponential": lambda step, steps: 0.5 + 2 * math.exp(-5 * step / steps),
}


def floor_coverage(form, n_runs, monkeypatch, steps=500):
    """(share of runs whose 90 % interval holds F*, mean of F*): fitted once, at the end."""
    hits, values = [], []
    for seed in range(n_runs):
        noise = 0.08 * np.random.default_rng(seed).normal(size=steps)
        fitted = LossFloor()
        with monkeypatch.context() as patch:
            patch.setattr(floor, "SMALLEST_SPAN", math.inf)
            for step in range(1, steps + 1):
                fitted.update(FLOORS[form](step, steps) + noise[step - 1], 16, lr=0.1)
        fitted._fit()
        hits.append(covers(fitted.interval(0.9), 0.5))
        values.append(fitted.value)
    return np.mean(hits), np.median(values)


@pytest.mark.parametrize("form", FLOORS)
def test_the_floor_and_its_interval(form, monkeypatch):
    share, middle = floor_coverage(form, 60, monkeypatch)
    assert 0.8 <= share <= 0.98
    assert middle == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("form", FLOORS)
def test_intervals_of_the_floor_cover_it_in_1000_runs(form, monkeypatch):
    share, _ = floor_coverage(form, 1000, monkeypatch)
    print(form, share)
    assert 0.85 <= share <= 0.95


@pytest.mark.parametrize(
    ("scale", "lr"), [(1.0, 0.1), (2.0, 0.05), pytest.param(1.0, 0.02, marks=pytest.mark.slow), pytest.param(0.75, 0.1, marks=pytest.mark.slow)]
)
def test_cabs_with_a_floor_of_zero_stalls_at_the_predicted_excess(scale, lr):
    """E F − F* = lr·T/(4m) and m = c·lr·T/F give F*/(4c − 1), whatever the lr while lr·h/2 is small. T is chosen for batches of about 100."""
    problem = Quadratic(curvature=np.linspace(0.7, 1.5, 12), variances=np.full(12, 100 / (12 * scale * lr)), floor=1.0, loss_noise=0.3)
    rule, rng, w, losses, sizes = CABS(scale=scale), np.random.default_rng(5), np.full((1, 12), 0.3), [], []
    m = 64
    for _ in range(round(600 / lr)):
        grads, values = problem.batch(w, m, rng)
        mean = grads.mean(1)
        moments = GradientMoments(m, torch.from_numpy((grads[0] ** 2).sum(1)), float((mean**2).sum()))
        losses.append(float(problem.loss(w)[0]))
        sizes.append(m)
        wish = rule.propose(moments, loss=float(values.mean()), lr=lr)
        m = round(wish)
        w = w - lr * mean
    settled = len(losses) // 4
    stalled = float(np.mean(losses[settled:])) - problem.floor
    predicted = problem.floor / (4 * scale - 1)
    assert stalled == pytest.approx(predicted, rel=0.15)
    assert np.mean(sizes[settled:]) == pytest.approx(scale * lr * problem.trace / (problem.floor + predicted), rel=0.1)
