"""AdaDamp, PadaDamp and GeoDamp against their formulas written out."""

import math

import numpy as np
import pytest

from adabatch.controllers import AdaDamp, GeoDamp, PadaDamp


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("f_star", "initial_loss", "smoothing"),
                         [(0.0, None, 0.9), (0.2, 3.0, 0.5), (-1.0, None, 0.0)])
def test_adadamp_is_the_ratio_of_the_excess_losses(seed, f_star, initial_loss, smoothing):
    rng = np.random.default_rng(seed)
    rule = AdaDamp(16, f_star, initial_loss, smoothing)
    losses, sizes = [], []
    for step in range(30):
        losses.append(float(2 * math.exp(-step / 10) + rng.uniform(0.3, 0.5)))
        sizes.append(int(rng.integers(2, 100)))
        rule.on_step(samples=sizes[-1], epoch=0)
        average = np.average(losses,
                             weights=np.array(sizes) * smoothing ** np.arange(step, -1, -1.0))
        start = losses[0] if initial_loss is None else initial_loss
        assert rule.propose(None, loss=losses[-1], lr=0.1) == pytest.approx(
            16 * (start - f_star) / (average - f_star)
        )


def test_adadamp_at_its_floor_proposes_infinity_and_skips_nan():
    rule = AdaDamp(16, f_star=0.5, smoothing=0.0)
    assert rule.propose(None, loss=math.nan, lr=0.1) == 16
    assert [rule.propose(None, loss=loss, lr=0.1) for loss in (1.0, math.nan, 0.75, 0.5)] == [
        16, 16, 32, math.inf
    ]


def test_padadamp_counts_steps_and_geodamp_epochs():
    linear, doubling = PadaDamp(16, rate=0.3), GeoDamp(16, factor=3.0, every=2)
    for step in range(1, 8):
        for rule in (linear, doubling):
            rule.on_step(samples=5, epoch=step)
        assert linear.propose(None, loss=1.0, lr=0.1) == pytest.approx(16 + 0.3 * step)
        assert doubling.propose(None, loss=1.0, lr=0.1) == 16 * 3.0 ** (step // 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaDamp(0), "batch_size must be a positive number, got 0"),
        (lambda: AdaDamp(16, f_star=math.inf), "f_star must be a finite number, got inf"),
        (lambda: AdaDamp(16, initial_loss=math.nan),
         "initial_loss must be a finite number, got nan"),
        (lambda: PadaDamp(16, rate=-1.0), "rate must be a number >= 0, got -1.0"),
        (lambda: GeoDamp(16, factor=0.0), "factor must be a positive number, got 0.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
