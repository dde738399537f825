"""The figure: what is drawn on which panel, and that awkward histories are drawn too."""

import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from adabatch.diagnostics import Diagnostics, draw, plot
from tests.diagnostics.synthetic import fill, steps

pytest.importorskip("matplotlib")


def awkward(**values):
    history = Diagnostics()
    for step in range(1, 6):
        row = {
            "loss": 1.0,
            "lr": 0.1,
            "variance_trace": 2.0,
            "grad_sq_norm": 1.0,
            "true_grad_sq_norm": 0.5,
            "measured": True,
            **values,
        }
        history.append(step=step, samples_seen=16 * step, batch_size=16, next_batch_size=16, **row)
    return history


HISTORIES = {
    "usual": lambda: fill(Diagnostics(), steps(200)),
    "rarely measured": lambda: fill(Diagnostics(), steps(200, every=10)),
    "empty": Diagnostics,
    "one step": lambda: fill(Diagnostics(), steps(1)),
    "never measured": lambda: awkward(measured=False),
    "all NaN": lambda: awkward(loss=math.nan, lr=math.nan, dropped="non-finite loss"),
    "negative": lambda: awkward(
        loss=-1.0, variance_trace=-2.0, true_grad_sq_norm=-1.0, proposed_batch_size=-4.0
    ),
    "zero": lambda: awkward(
        loss=0.0,
        lr=0.0,
        variance_trace=0.0,
        grad_sq_norm=0.0,
        true_grad_sq_norm=0.0,
        proposed_batch_size=0.0,
    ),
    "infinite": lambda: awkward(
        loss=math.inf, proposed_batch_size=math.inf, variance_trace=math.inf
    ),
    "huge": lambda: awkward(
        loss=1e300, proposed_batch_size=1e300, variance_trace=1e38, true_grad_sq_norm=1e-300
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HISTORIES)
def test_writes_a_png(tmp_path, name):
    path = tmp_path / "run.png"
    HISTORIES[name]().plot(path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600
    assert height > 600
    assert len(content) > 10_000


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_other_formats(tmp_path, ending):
    plot(fill(Diagnostics(), steps(20)), tmp_path / f"run.{ending}")
    assert (tmp_path / f"run.{ending}").stat().st_size > 5000


def test_lines_show_the_columns():
    history = fill(Diagnostics(), steps(50))
    size, lr, loss, trace, scale = draw(history).axes
    samples = history.column("samples_seen")

    def line(panel, index):
        assert panel.lines[index].get_xdata().tolist() == samples.tolist()
        return panel.lines[index].get_ydata()

    np.testing.assert_array_equal(line(size, 0), history.column("batch_size"))
    proposal = history.column("proposed_batch_size")
    np.testing.assert_array_equal(
        size.lines[1].get_xydata(), np.stack([samples, proposal], 1)[np.isfinite(proposal)]
    )
    np.testing.assert_array_equal(line(lr, 0), history.column("lr"))
    np.testing.assert_array_equal(line(loss, 1), history.column("loss_ema"))
    np.testing.assert_array_equal(line(trace, 1), history.column("variance_trace_ema"))
    average = history.column("noise_scale_ema")
    np.testing.assert_array_equal(line(scale, 1), np.where(np.isfinite(average), average, np.nan))
    dropped = history.column("dropped") != ""
    assert trace.lines[2].get_xdata().tolist() == samples[dropped].tolist()
    assert (size.get_yscale(), trace.get_yscale(), scale.get_yscale()) == ("log", "log", "log")


def test_band_is_one_standard_error():
    history = fill(Diagnostics(), steps(50))
    band = draw(history).axes[3].collections[0].get_paths()[0].vertices
    average, error = (
        history.column("variance_trace_ema")[-1],
        history.column("variance_trace_std_error")[-1],
    )
    at_end = band[band[:, 0] == history.latest.samples_seen][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((average - error, average + error))


def test_intervals_are_bands_that_end_with_the_panel():
    history, rows = Diagnostics(), steps(60, seed=1)
    for row in rows:
        row["true_grad_sq_norm"] += 0.3
        proposal = row["proposed_batch_size"]
        history.append(
            **row,
            proposed_low=proposal / 2,
            proposed_high=math.inf,
            f_star=0.2,
            f_star_std_error=0.05,
        )
    size, _, loss, _, scale = draw(history).axes
    proposal, samples = history.column("proposed_batch_size"), history.column("samples_seen")
    made = np.isfinite(proposal)
    band = size.collections[0].get_paths()[0].vertices
    bottom, top = size.get_ylim()
    assert band[:, 1].max() == top
    at_end = band[band[:, 0] == samples[made][-1]][:, 1]
    assert at_end.min() == pytest.approx(max(bottom, proposal[made][-1] / 2))
    assert [line.get_label() for line in loss.lines][-1] == "f_star"
    floor = loss.collections[1].get_paths()[0].vertices
    assert (floor[:, 1].min(), floor[:, 1].max()) == pytest.approx((0.15, 0.25))
    drawn = scale.collections[0].get_paths()[-1].vertices
    bottom, top = scale.get_ylim()
    at_end = drawn[drawn[:, 0] == samples[-1]][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx(
        (max(bottom, history.latest.noise_scale_low), min(top, history.latest.noise_scale_high))
    )


def test_band_stays_where_the_average_is_negative():
    history = awkward()
    history.append(
        step=6,
        samples_seen=96,
        batch_size=4096,
        next_batch_size=16,
        lr=0.1,
        variance_trace=-50.0,
        true_grad_sq_norm=1.0,
        measured=True,
    )
    low, high = draw(history).axes[3].get_ylim()
    assert 0 < low < 2 < high < 10


def test_a_wild_proposal_does_not_flatten_the_sizes():
    low, high = draw(awkward(proposed_batch_size=1e9)).axes[0].get_ylim()
    assert low > 4
    assert high < 256


def test_pyplot_is_left_alone(tmp_path):
    code = f"""
import sys
from adabatch.diagnostics import Diagnostics
assert not any(name.startswith("matplotlib") for name in sys.modules)
Diagnostics().plot({str(tmp_path / "run.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_history_gives_its_figure():
    history = fill(Diagnostics(), steps(20))
    assert len(history.draw().axes) == len(draw(history).axes) == 5


def test_without_matplotlib(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Diagnostics().plot(tmp_path / "run.png")
