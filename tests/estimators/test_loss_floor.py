"""LossFloor on losses whose floor is known."""

import math

import numpy as np
import pytest
import torch

from adabatch import CABS, GradientMoments
from adabatch.estimators.loss_floor import SMALLEST_SPAN, LossFloor

LOSSES = {
    "power": lambda step, steps: 0.5 + 2 * (step + 5) ** -0.5,
    "hyperbola": lambda step, steps: 0.5 + 3 / (1 + step / 20),
    "exponential": lambda step, steps: 0.5 + 2 * math.exp(-5 * step / steps),
}


def fitted(loss, steps, seed=0, noise=0.08, samples=16):
    rng, floor = np.random.default_rng(seed), LossFloor()
    for step in range(1, steps + 1):
        floor.update(loss(step, steps) + noise * rng.normal(), samples, lr=0.1)
    return floor


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_floor_is_found_within_its_error(loss):
    found = [fitted(loss, 2000, seed) for seed in range(4)]
    assert np.mean([floor.bounded for floor in found]) == pytest.approx(0.5, abs=0.03)
    for floor in found:
        assert abs(floor.value - 0.5) < 4 * floor.std_error + 0.01


def test_no_estimate_while_the_samples_span_too_little():
    assert math.isnan(fitted(LOSSES["power"], int(SMALLEST_SPAN)).bounded)
    assert math.isfinite(fitted(LOSSES["power"], int(2 * SMALLEST_SPAN)).bounded)


def test_an_lr_drop_begins_anew_and_keeps_the_old_estimate_until_then():
    floor = fitted(LOSSES["exponential"], 500)
    before = floor.value
    for step in range(1, 400):
        floor.update(0.3 + 0.2 * math.exp(-step / 50), 16, lr=0.02)
        if step == 20:
            assert (floor.value, floor.samples) == (before, 20 * 16)
    assert floor.bounded == pytest.approx(0.3, abs=0.02)


def test_never_above_the_smallest_averaged_loss_nor_below_zero_where_no_loss_is():
    rising = LossFloor()
    for step in range(1, 200):
        rising.update(1 + step / 100, 16, lr=0.1)
    assert 0 <= rising.bounded <= 1.2
    steep = LossFloor()
    for step in range(1, 200):
        steep.update(1 / step**0.1, 16, lr=0.1)
    assert steep.bounded >= 0


def test_a_saved_estimate_goes_on_bit_for_bit():
    whole = fitted(LOSSES["power"], 300)
    first = fitted(LOSSES["power"], 150)
    resumed = LossFloor()
    resumed.load_state_dict(first.state_dict())
    rng = np.random.default_rng(0)
    noises = [0.08 * rng.normal() for _ in range(300)]
    for step in range(151, 301):
        resumed.update(LOSSES["power"](step, 300) + noises[step - 1], 16, lr=0.1)
    assert resumed.value == whole.value
    with pytest.raises(ValueError, match="LossFloor has version 7"):
        resumed.load_state_dict({"version": 7})


def test_cabs_takes_the_floor_and_never_divides_by_less_than_its_error():
    rule, rng = CABS(f_star="auto"), np.random.default_rng(0)
    moments = GradientMoments(16, torch.full((16,), 4.0), 1.0)
    for step in range(1, 1500):
        loss = 0.5 + 2 * math.exp(-step / 100) + 0.08 * rng.normal()
        proposal = rule.propose(moments, loss=loss, lr=0.1)
    floor = rule.floor
    gap = max(rule.loss.average - floor.bounded, math.hypot(rule.loss.std_error(), floor.std_error))
    assert math.isfinite(proposal)
    assert proposal == pytest.approx(0.1 * moments.variance_trace / gap)
    assert floor.bounded == pytest.approx(0.5, abs=0.02)
