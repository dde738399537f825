"""The history as a sequence: what each record holds, counts, columns, memory bound, state."""

import io
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

import adabatch
from adabatch.diagnostics import Diagnostics
from adabatch.diagnostics.record import FIELDS
from tests.diagnostics.synthetic import fill, same_records, steps
from tests.estimators.test_averages import by_definition

MEASURED_FIELDS = ["variance_trace", "grad_sq_norm", "true_grad_sq_norm", "noise_scale", "snr"]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["loss", "variance_trace", "grad_sq_norm", "true_grad_sq_norm"])
def test_averages_are_weighted_by_samples(name, every):
    rows = steps(every=every)
    history = fill(Diagnostics(smoothing=0.9), rows)
    for count, record in enumerate(history, start=1):
        used = [row for row in rows[:count] if math.isfinite(row[name])]
        if len(used) < 2:
            continue
        average, error = by_definition(
            [row[name] for row in used], [row["batch_size"] for row in used], 0.9
        )
        assert getattr(record, f"{name}_ema") == pytest.approx(average, rel=1e-10)
        if name == "variance_trace":
            assert record.variance_trace_std_error == pytest.approx(error, rel=1e-8)


def test_ratios_and_speed():
    rows = steps()
    for row, record in zip(rows, fill(Diagnostics(), rows), strict=True):
        assert record.samples_per_second == row["batch_size"] / row["seconds"]
        if not row["measured"]:
            continue
        trace, signal = row["variance_trace"], row["true_grad_sq_norm"]
        assert record.noise_scale == (trace / signal if signal > 0 else math.inf)
        assert record.snr == pytest.approx(row["batch_size"] * max(signal, 0) / trace)
        if record.true_grad_sq_norm_ema > 0:
            assert (
                record.noise_scale_ema == record.variance_trace_ema / record.true_grad_sq_norm_ema
            )
            assert record.snr_ema == pytest.approx(
                row["batch_size"] * record.true_grad_sq_norm_ema / record.variance_trace_ema
            )


def test_steps_that_measure_nothing():
    rows = steps(every=4)
    history = fill(Diagnostics(), rows)
    for before, record in pairwise(history):
        if not record.measured:
            assert all(math.isnan(getattr(record, name)) for name in MEASURED_FIELDS)
            for name in ("variance_trace_ema", "variance_trace_std_error", "noise_scale_ema"):
                assert getattr(record, name) == pytest.approx(getattr(before, name), nan_ok=True)
    assert math.isnan(history[0].variance_trace_ema)


def test_moments_of_a_dropped_measurement_are_not_kept():
    history = Diagnostics()
    fixed = {
        "batch_size": 16,
        "next_batch_size": 16,
        "lr": 0.1,
        "grad_sq_norm": 1.0,
        "true_grad_sq_norm": 0.5,
        "measured": True,
    }
    history.append(step=1, samples_seen=16, loss=2.0, variance_trace=4.0, **fixed)
    history.append(
        step=2,
        samples_seen=32,
        loss=math.nan,
        variance_trace=1e30,
        dropped="non-finite loss",
        **fixed,
    )
    last = history.latest
    assert (last.measured, last.dropped, last.variance_trace_ema, last.loss_ema) == (
        False,
        "non-finite loss",
        4.0,
        2.0,
    )
    assert math.isnan(last.variance_trace)
    assert (history.n_measured, history.n_dropped) == (1, 1)


def test_errors_of_the_steps_make_that_of_the_average_and_are_held():
    history = Diagnostics(smoothing=0.5)
    fixed = {"batch_size": 16, "next_batch_size": 16, "lr": 0.1, "true_grad_sq_norm": 1.0}
    history.append(
        step=1,
        samples_seen=16,
        variance_trace=4.0,
        variance_trace_step_error=0.6,
        n_measured=4,
        measured=True,
        **fixed,
    )
    history.append(
        step=2,
        samples_seen=32,
        variance_trace=4.0,
        variance_trace_step_error=0.2,
        n_measured=8,
        measured=True,
        **fixed,
    )
    history.append(step=3, samples_seen=48, **fixed)
    both = math.hypot(0.5 * 4 * 0.6, 8 * 0.2) / (0.5 * 4 + 8)
    assert history.column("variance_trace_std_error").tolist() == pytest.approx([0.6, both, both])
    assert history.column("n_measured").tolist() == [4, 8, 0]
    assert history.column("variance_trace_step_error").tolist() == pytest.approx(
        [0.6, 0.2, math.nan], nan_ok=True
    )


def test_errors_and_the_interval_of_the_noise_scale():
    """Against residuals and Fieller's inequality, worked out from the rows."""
    rows = steps(80, seed=3)
    for row in rows:
        row["true_grad_sq_norm"] += 1.0
    record = fill(Diagnostics(smoothing=0.9), rows).latest
    used = [row for row in rows if row["measured"]]
    sizes = np.array([row["batch_size"] for row in used], float)
    p = 0.9 ** np.arange(len(used) - 1, -1, -1.0) * sizes
    p /= p.sum()
    x, y = (
        np.array([row[name] for row in used]) for name in ("variance_trace", "true_grad_sq_norm")
    )
    lost = 1 - 2 * (p**3).sum() / (p**2).sum() + (p**2).sum()
    dx, dy = x - p @ x, y - p @ y
    errors = {
        name: math.sqrt((p**2 * d * d).sum() / lost)
        for name, d in {"variance_trace": dx, "true_grad_sq_norm": dy}.items()
    }
    for name, error in errors.items():
        assert getattr(record, f"{name}_std_error") == pytest.approx(error, rel=1e-8)
    shares = p**2 / sizes
    quantile = stats.t.ppf(0.95, shares.sum() ** 2 / (shares**2).sum() - 1)
    assert 0 < record.noise_scale_low < record.noise_scale_ema < record.noise_scale_high < math.inf
    for ratio in (record.noise_scale_low, record.noise_scale_high):
        assert (p @ x - ratio * (p @ y)) ** 2 == pytest.approx(
            quantile**2 * (p**2 * (dx - ratio * dy) ** 2).sum() / lost, rel=1e-6
        )


def test_an_unbounded_noise_scale():
    rows = steps(30)
    for row in rows:
        row["true_grad_sq_norm"] = row["grad_sq_norm"] * (-1) ** row["step"]
    history = fill(Diagnostics(), rows)
    assert 0 < history.latest.noise_scale_low < history.latest.noise_scale_high == math.inf
    assert math.isnan(fill(Diagnostics(), steps(3, every=9)).latest.noise_scale_low)


def test_numbers_are_plain():
    history = Diagnostics()
    sizes = {"samples_seen": torch.tensor(16), "batch_size": np.int32(16), "next_batch_size": 16}
    moments = {"variance_trace": np.float32(4.0), "grad_sq_norm": np.float64(1.0)}
    history.append(
        step=np.int64(1),
        lr=torch.tensor(0.5),
        loss=torch.tensor(2.0),
        true_grad_sq_norm=torch.tensor(0.5),
        seconds=np.float64(1.0),
        measured=np.bool_(True),
        **sizes,
        **moments,
    )
    record = history.latest
    assert {type(getattr(record, name)) for name in FIELDS} == {int, float, bool, str}
    assert history.column("next_batch_size").dtype.kind == "i"


def test_sequence():
    rows = steps(20)
    history = fill(Diagnostics(), rows)
    assert len(history) == 20
    assert [record.step for record in history] == list(range(1, 21))
    assert history[-1] == history.latest
    for cut in (slice(2, 9, 3), slice(None, None, -1), slice(-3, None), slice(30, 40)):
        assert [record.step for record in history[cut]] == list(range(1, 21))[cut]
    with pytest.raises(IndexError):
        history[20]


def test_what_is_no_index_names_what_to_use():
    history = fill(Diagnostics(), steps(20))
    with pytest.raises(TypeError, match=r"by column\('loss'\), and of one record as an attribute"):
        history["loss"]
    with pytest.raises(IndexError, match="has 20 records in memory, got index 20"):
        history[20]
    assert history[np.int64(-20)].step == history[0].step


def test_counts_and_repr():
    history = fill(Diagnostics(), steps(20))
    assert history.dropped == Counter({"non-finite loss": 2, "batch of one": 1})
    assert (history.n_steps, history.n_measured, history.n_dropped) == (20, 17, 3)
    assert re.fullmatch(
        r"Diagnostics\(20 steps, 17 measured, 3 dropped; batch \d+ → \d+, "
        r"noise scale .* \(.* to .*\)\)",
        repr(history),
    )
    assert repr(Diagnostics()) == "Diagnostics(0 steps, 0 measured, 0 dropped)"
    history.dropped["batch of one"] = 99
    assert history.n_dropped == 3


def test_a_run_without_a_controller_has_no_proposals():
    """What a monitor appends: only what it saw."""
    history = Diagnostics()
    for row in steps(20):
        names = (
            "step",
            "samples_seen",
            "batch_size",
            "variance_trace",
            "grad_sq_norm",
            "true_grad_sq_norm",
            "measured",
        )
        history.append(**{name: row[name] for name in names})
    latest = history.latest
    assert latest.next_batch_size is None
    assert all(
        math.isnan(value)
        for value in (
            latest.proposed_batch_size,
            latest.lr,
            latest.loss,
            latest.loss_ema,
            latest.seconds,
        )
    )
    assert np.isnan(history.column("next_batch_size")).all()
    assert "proposed" not in history.summary()
    assert "lr" not in history.summary()
    assert f"batch {latest.batch_size}, noise scale" in repr(history)


def test_averages_do_not_depend_on_when_they_are_read():
    seen, history = [], Diagnostics(max_records=8)
    for row in steps(30):
        history.append(**row)
        seen.append(history.latest)
    assert same_records(seen, fill(Diagnostics(), steps(30)))


def test_notebooks_show_tables():
    history = fill(Diagnostics(), steps(20))
    page = history._repr_html_()
    assert page.startswith("<div>20 steps, ")
    assert page.count("<tr>") == 1 + 10
    record = history.latest._repr_html_()
    assert f"<td>variance_trace_ema</td><td>{history.latest.variance_trace_ema:.4g} ± " in record
    assert "nan" not in record


def test_columns():
    rows = steps(20)
    history = fill(Diagnostics(), rows)
    for name, kind in {"batch_size": "i", "loss": "f", "measured": "b", "dropped": "U"}.items():
        column = history.column(name)
        assert column.dtype.kind == kind
        assert column.tolist() == [row[name] for row in rows]
    with pytest.raises(ValueError, match="no field 'size'; it has step, samples_seen"):
        history.column("size")


def test_empty_history():
    history = Diagnostics()
    assert len(history) == 0
    assert list(history) == history[:] == []
    assert history.column("loss").shape == (0,)
    with pytest.raises(LookupError, match="no record yet"):
        _ = history.latest


def test_max_records_bounds_memory_not_counts():
    history = fill(Diagnostics(max_records=5), steps(20))
    assert [record.step for record in history] == [16, 17, 18, 19, 20]
    assert (history.n_steps, history.n_dropped) == (20, 3)
    assert same_records([history.latest], [fill(Diagnostics(), steps(20)).latest])
    assert same_records(
        fill(Diagnostics(max_records=5), steps(900)), fill(Diagnostics(), steps(900))[-5:]
    )
    with pytest.raises(ValueError, match=r"max_records must be an integer of at least 1, .* got 0"):
        Diagnostics(max_records=0)


def test_state_goes_on_bit_for_bit():
    rows = steps(40)
    whole, first = fill(Diagnostics(), rows), fill(Diagnostics(), rows[:20])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    assert buffer.tell() < 5000
    buffer.seek(0)
    resumed = Diagnostics()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert len(resumed) == 0
    fill(resumed, rows[20:])
    assert same_records(resumed, whole[20:])
    assert resumed.state_dict() == whole.state_dict()


def test_state_of_an_empty_history():
    history = fill(Diagnostics(), steps(5))
    history.load_state_dict(Diagnostics().state_dict())
    assert (len(history), history.n_steps) == (0, 0)


def test_loading_an_earlier_state_rolls_back():
    rows = steps(20)
    history = fill(Diagnostics(), rows[:10])
    state = history.state_dict()
    fill(history, rows[10:])
    history.load_state_dict(state)
    assert history.latest.step == 10
    assert same_records(fill(history, rows[10:]), fill(Diagnostics(), rows))


def test_unknown_state():
    history = Diagnostics()
    with pytest.raises(
        ValueError, match="Diagnostics has version 1; this release of adabatch reads version 2"
    ):
        history.load_state_dict({**history.state_dict(), "version": 1})
    with pytest.raises(ValueError, match="lacks the averages"):
        history.load_state_dict({**history.state_dict(), "averages": {"means": {}, "joint": {}}})


@pytest.mark.parametrize("given", [5, True, "out/history.jsonl", Diagnostics], ids=str)
def test_what_is_no_history_is_refused_when_it_is_given(given):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=16
    )
    with pytest.raises(
        TypeError,
        match=r"diagnostics must be .* an adabatch\.Diagnostics\(\) to append to, got ",
    ):
        adabatch.wrap(model, optimizer, loader, diagnostics=given)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_history_is_appended_to():
    history = Diagnostics()
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=16
    )
    *_, scheduler = adabatch.wrap(model, optimizer, loader, diagnostics=history)
    assert scheduler.diagnostics is history
