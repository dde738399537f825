"""On a noisy quadratic whose T, G², tr(PΣ), loss and floor are known: the estimates converge to them, and 90 % intervals hold them in 85 to 95 % of the runs.

Where the parameters move, what an average estimates is the mean of the truth over its window, with the average's own shares.
"""

import math

import numpy as np
import pytest
import torch

from adabatch import GradientMoments
from adabatch.estimators.averages import MovingAverage
from adabatch.estimators.confidence import JointAverages
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
