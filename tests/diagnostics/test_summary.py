"""The table against numbers worked out from the rows."""

import math

import numpy as np
import pytest

from adabatch.diagnostics import Diagnostics
from tests.diagnostics.synthetic import fill, steps


def table(text):
    """{label: [first, last, min, mean, max]} of the lines below the head."""
    lines = text.splitlines()
    head = next(
        index
        for index, line in enumerate(lines)
        if line.split() == ["first", "last", "min", "mean", "max"]
    )
    parsed = {}
    for line in lines[head + 1 :]:
        cells = (
            line.replace(",", "").split()
            if not line.startswith("loss,")
            else line.replace("loss, ", "loss_").replace(",", "").split()
        )
        parsed[" ".join(cells[:-5])] = [
            math.nan if cell == "-" else float(cell) for cell in cells[-5:]
        ]
    return parsed


def test_numbers():
    rows = steps(40, every=2)
    shown = table(fill(Diagnostics(), rows).summary())
    sizes = np.array([row["batch_size"] for row in rows], float)
    assert shown["batch size"] == pytest.approx(
        [sizes[0], sizes[-1], sizes.min(), sizes.mean(), sizes.max()], rel=1e-3
    )
    for label, name in {
        "loss": "loss",
        "variance trace": "variance_trace",
        "true gradient norm²": "true_grad_sq_norm",
    }.items():
        values = np.array([row[name] for row in rows])
        finite = np.isfinite(values)
        mean = (sizes[finite] * values[finite]).sum() / sizes[finite].sum()
        values = values[finite]
        assert shown[label] == pytest.approx(
            [values[0], values[-1], values.min(), mean, values.max()], rel=1e-3
        )
    seconds = np.array([row["seconds"] for row in rows])
    assert shown["samples per second"][3] == pytest.approx(sizes.sum() / seconds.sum(), rel=1e-3)


def test_mean_noise_scale_is_a_ratio_of_sums():
    history = Diagnostics()
    for step, (size, trace, signal) in enumerate(
        [(10, 4.0, 1.0), (30, 8.0, 3.0), (20, 6.0, -0.5)], start=1
    ):
        history.append(
            step=step,
            samples_seen=step,
            batch_size=size,
            next_batch_size=size,
            lr=0.1,
            variance_trace=trace,
            true_grad_sq_norm=signal,
            measured=True,
        )
    assert table(history.summary())["noise scale smoothed"][3] == pytest.approx(
        (40 + 240 + 120) / (10 + 90 - 10), rel=1e-3
    )


def test_heading_counts():
    rows = steps(20)
    lines = fill(Diagnostics(), rows).summary().splitlines()
    assert lines[0].startswith(f"20 steps, {rows[-1]['samples_seen']:,} samples, ")
    assert lines[1] == "measured 17, dropped 3: non-finite loss 2, batch of one 1"
    assert lines[2].startswith("now: loss ")
    assert len({len(line) for line in lines[4:]}) == 1


def test_how_sure_the_latest_numbers_are():
    history = fill(Diagnostics(), steps(20))
    fixed = {"batch_size": 16, "next_batch_size": 16, "lr": 0.1, "samples_seen": 9999}
    history.append(
        step=21,
        proposed_batch_size=33.0,
        proposed_low=21.0,
        proposed_high=math.inf,
        f_star=0.31,
        f_star_std_error=0.02,
        **fixed,
    )
    now, latest = history.summary().splitlines()[2], history.latest
    assert (
        f"variance trace {latest.variance_trace_ema:.4g} ± {latest.variance_trace_std_error:.3g}, "
        in now
    )
    assert (
        f"true gradient norm² {latest.true_grad_sq_norm_ema:.4g} "
        f"± {latest.true_grad_sq_norm_std_error:.3g}, "
        in now
    )
    assert "f_star 0.31 ± 0.02, " in now
    assert "proposed size 33 (above 21)" in now
    history.append(
        step=22,
        proposed_batch_size=33.0,
        proposed_low=21.0,
        proposed_high=60.0,
        f_star=0.0,
        f_star_std_error=0.0,
        **fixed,
    )
    assert "proposed size 33 (21 to 60)" in history.summary()
    assert "f_star" not in history.summary().splitlines()[2]


def test_bounded_memory_is_said():
    assert (
        "(the table is of the 5 in memory)" in fill(Diagnostics(max_records=5), steps(20)).summary()
    )


def test_nothing_measured_and_empty():
    history = Diagnostics()
    assert history.summary().splitlines() == [
        "0 steps",
        "measured 0, dropped 0",
        "no record in memory",
    ]
    history.append(step=1, samples_seen=16, batch_size=16, next_batch_size=16, lr=0.1)
    assert set(table(history.summary())) == {"batch size", "lr effective"}
