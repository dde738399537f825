"""The layer view: each step's statistics against the oracle, a run's sums against others."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import adabatch
from adabatch import Diagnostics, GradSampleHooks
from adabatch.controllers import Annealed
from adabatch.diagnostics.layers import LayerHistory, Layers, LayerStatistics
from tests import oracle
from tests.grad_sample.measuring import close, make_batch, make_mlp, measure, squared_error
from tests.options import grouped

NAMES = ("body.weight", "body.bias", "head.weight")


def expected(grads):
    """{name: (T, G²)} from the oracle's per-sample gradients."""
    made = {}
    for name, rows in grads.items():
        trace = float(rows.flatten(1).var(0).sum())
        made[name] = trace, float(rows.mean(0).square().sum()) - trace / len(rows)
    return made


@pytest.mark.parametrize("inner_products", [False, True])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_the_statistics_of_each_parameter_are_the_oracles(inner_products, loss_reduction):
    model, batch = make_mlp(), make_batch(8)
    truth = expected(oracle.per_sample_grads(model, squared_error, batch))
    found = LayerStatistics.of_step(
        measure(
            model,
            batch,
            loss_reduction=loss_reduction,
            per_parameter=True,
            statistics=["inner_products"] if inner_products else [],
        )
    )
    assert found.names == tuple(truth)
    assert (found.of, found.batch_size, found.n_measured) == ("parameter", 8, 8)
    close(found.traces, [trace for trace, _ in truth.values()], 1e-4)
    close(found.signals, [signal for _, signal in truth.values()], 1e-4)


@pytest.mark.parametrize("inner_products", [False, True])
def test_parameters_and_groups_add_up_to_the_model(inner_products):
    model, batch = make_mlp(torch.float64), make_batch(9, torch.float64)
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    for options in ({"per_parameter": True}, {"param_groups": groups}):
        statistics = ["inner_products"] if inner_products else []
        moments = measure(model, batch, samples=5, statistics=statistics, **options)
        found = LayerStatistics.of_step(moments)
        close(found.traces.sum(), moments.variance_trace, 1e-9)
        close(found.signals.sum(), moments.true_grad_sq_norm, 1e-9)
    assert (found.names, found.of) == (("group 0", "group 1"), "group")


def test_parameters_of_several_groups_and_of_several_passes():
    model = make_mlp(torch.float64)
    batches = [make_batch(size, torch.float64) for size in (6, 3)]
    hooks = GradSampleHooks(
        model,
        per_parameter=True,
        statistics=["inner_products"],
        accumulate=2,
        param_groups=[[model[0].weight], [model[0].bias, *model[2].parameters()]],
    )
    for batch in batches:
        (squared_error(model, batch).mean() / 2).backward()
    moments = hooks.collect()
    hooks.remove()
    found = LayerStatistics.of_step(moments)
    close(found.traces[0], moments.by_group[0].variance_trace, 1e-9)
    close(found.traces.sum(), moments.variance_trace, 1e-9)
    close(found.signals[1:].sum(), moments.by_group[1].true_grad_sq_norm, 1e-9)


def test_a_model_measured_as_a_whole_has_no_layers():
    assert LayerStatistics.of_step(measure(make_mlp(), make_batch(4))) is None


def drawn(count, seed=0, names=NAMES):
    """(statistics, samples seen) of `count` steps of changing sizes."""
    rng, seen, made = np.random.default_rng(seed), 0, []
    for _ in range(count):
        size = int(rng.integers(4, 64))
        seen += size
        traces, signals = rng.gamma(3, 2, len(names)), rng.normal(1, 1, len(names))
        made.append(
            (
                LayerStatistics(
                    names, "parameter", traces, signals, size, int(rng.integers(2, size + 1))
                ),
                seen,
            )
        )
    return made


def filled(made, max_spans=1024):
    history = LayerHistory(max_spans)
    for statistics, seen in made:
        history.append(statistics, seen)
    return history


@pytest.mark.parametrize("count", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("max_spans", [2, 8, 9])
def test_nothing_is_lost_however_short_the_history_is_kept(count, max_spans):
    made = drawn(count)
    view = filled(made, max_spans).view("parameter")
    assert len(view.samples) <= max_spans + 1
    assert view.edges[0] == 0
    assert view.edges[-1] == made[-1][1]
    assert (np.diff(view.edges) > 0).all()
    weights = (
        np.array([statistics.n_measured for statistics, _ in made]),
        np.array([statistics.batch_size for statistics, _ in made]),
    )
    trace = weights[0] @ np.stack([statistics.traces for statistics, _ in made]) / weights[0].sum()
    signal = (
        weights[1] @ np.stack([statistics.signals for statistics, _ in made]) / weights[1].sum()
    )
    whole = view.merged(1)
    assert whole.variance_trace[0] == pytest.approx(trace)
    assert whole.true_grad_sq_norm[0] == pytest.approx(signal)
    assert whole.batch_size[0] == pytest.approx(weights[1].mean())
    assert [row.share for row in view] == pytest.approx(trace / trace.sum())
    assert [row.snr for row in view] == pytest.approx(
        weights[1].mean() * signal.clip(min=0) / trace
    )
    assert [row.noise_scale for row in view] == pytest.approx(
        [t / g if g > 0 else math.inf for t, g in zip(trace, signal, strict=True)]
    )


def test_a_layer_is_the_sum_of_its_parameters():
    history = filled(drawn(20))
    layers, parameters = history.view(), history.view("parameter")
    assert layers.names == ("body", "head")
    assert layers.variance_trace == pytest.approx(
        parameters.variance_trace @ np.array([[1, 0], [1, 0], [0, 1]])
    )
    assert layers.share.sum(1) == pytest.approx(np.ones(20))
    assert filled(drawn(3, names=("weight", "bias"))).view().names == ("(model)",)


def test_many_names_keep_memory_bounded():
    names = tuple(f"layer{k}.weight" for k in range(2000))
    history = filled(drawn(300, names=names))
    assert len(history) <= 132


def test_what_cannot_be_shown_says_why():
    with pytest.raises(LookupError, match="per_parameter=True"):
        LayerHistory().view()
    history = filled(drawn(2))
    with pytest.raises(LookupError, match="of each parameter, not of each group"):
        history.view("group")
    with pytest.raises(ValueError, match="by must be one of"):
        history.view("block")
    with pytest.raises(ValueError, match="spans must be at least 1"):
        history.view().merged(0)


def test_moments_that_are_not_finite_are_left_out_and_other_names_start_again():
    history = filled(drawn(4))
    broken = LayerStatistics(NAMES, "parameter", np.array([1.0, math.nan, 1.0]), np.ones(3), 8, 8)
    history.append(broken, 999)
    assert len(history) == 4
    history.append(*drawn(1, names=("a.weight",))[0])
    assert (len(history), history.view().names) == (1, ("a",))


def test_a_saved_history_goes_on(tmp_path):
    made = drawn(40)
    whole, first = filled(made, 8), filled(made[:17], 8)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = LayerHistory(8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    before = str(first.state_dict())
    for statistics, seen in made[17:]:
        resumed.append(statistics, seen)
    assert str(first.state_dict()) == before
    assert str(resumed.state_dict()) == str(whole.state_dict())
    resumed.load_state_dict(LayerHistory(8).state_dict())
    assert len(resumed) == 0
    with pytest.raises(ValueError, match="LayerHistory has version 9"):
        resumed.load_state_dict({**whole.state_dict(), "version": 9})


def test_csv_and_table(tmp_path):
    view = filled(drawn(5)).view()
    view.to_csv(tmp_path / "layers.csv")
    with open(tmp_path / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert float(rows[3]["share"]) == view.share[1, 1]
    assert rows[-1]["samples_seen"] == str(view.edges[-1])
    lines = str(view).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "body", "head"]
    assert view[0].name == "body"
    assert repr(view).startswith(f"Layers(2 names, 5 spans to {view.edges[-1]:,} samples; ")
    assert view._repr_html_().count("<tr>") == 3
    assert len(view) == 2


@pytest.mark.parametrize("layers", [1, 3, 200])
@pytest.mark.parametrize("case", ["usual", "no signal", "no noise"])
def test_the_heat_map_is_drawn(tmp_path, layers, case):
    pytest.importorskip("matplotlib")
    trace, signal = (
        np.full((300, layers), 0.0 if case == "no noise" else 2.0),
        np.full((300, layers), -1.0 if case == "no signal" else 0.5),
    )
    sizes = np.full(300, 16)
    view = Layers(
        tuple(f"layer{k}" for k in range(layers)),
        np.arange(301) * 16,
        sizes * 1.0,
        trace,
        signal,
        sizes,
        sizes,
    )
    view.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    share, ratio = (panel.collections[0].get_array() for panel in view.draw().axes[:2])
    assert (share.shape, ratio.shape) == ((layers, 100), (layers, 30))
    if case == "usual":
        assert np.allclose(share, 1 / layers)
        assert np.allclose(ratio, 16 * 0.5 / 2.0)


def test_a_convolution_and_its_norm_are_seen_apart():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    batch = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    truth = expected(oracle.per_sample_grads(model, squared_error, batch))
    history = LayerHistory()
    history.append(LayerStatistics.of_step(measure(model, batch, per_parameter=True)), 6)
    view = history.view()
    assert view.names == ("0", "1", "3")
    for k, name in enumerate(view.names):
        assert view.variance_trace[0, k] == pytest.approx(
            sum(trace for key, (trace, _) in truth.items() if key.startswith(name))
        )


def recorded(made, path=None):
    """A history of these steps."""
    history = Diagnostics()
    if path is not None:
        history.to_jsonl(path)
    for step, (statistics, seen) in enumerate(made):
        fields = {
            "variance_trace": float(statistics.traces.sum()),
            "true_grad_sq_norm": 1.0,
            "grad_sq_norm": 1.0,
            "measured": True,
        }
        history.append(
            step=step,
            samples_seen=seen,
            batch_size=statistics.batch_size,
            next_batch_size=8,
            lr=0.1,
            loss=1.0,
            layers=statistics,
            **fields,
        )
    return history


def same(view, other, rel=1e-12):
    assert view.names == other.names
    assert (view.edges == other.edges).all()
    assert view.variance_trace == pytest.approx(other.variance_trace, rel=rel)
    assert view.true_grad_sq_norm == pytest.approx(other.true_grad_sq_norm, rel=rel, abs=rel)


def test_the_file_of_a_run_holds_its_layers(tmp_path):
    made = drawn(30)
    history = recorded(made, tmp_path / "run.jsonl")
    same(
        Diagnostics.from_jsonl(tmp_path / "run.jsonl").layers("parameter"),
        history.layers("parameter"),
        rel=1e-6,
    )
    with open(tmp_path / "run.jsonl") as file:
        text = file.read().splitlines()
    with open(tmp_path / "run.jsonl", "w") as file:
        file.write("\n".join([*text[:21], *text[11:31]]) + "\n")  # resumed ten steps back
    same(Diagnostics.from_jsonl(tmp_path / "run.jsonl").layers(), history.layers(), rel=1e-6)


def test_a_malformed_line_is_named(tmp_path):
    recorded(drawn(3), tmp_path / "run.jsonl")
    text = (tmp_path / "run.jsonl").read_text().replace('"measured": ', '"counted": ', 1)
    text = text.replace('"of": "parameter"', '"kind": "parameter"', 1)
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"line 2: "):
        Diagnostics.from_jsonl(tmp_path / "run.jsonl")


def test_a_resumed_history_goes_on_with_its_layers():
    made = drawn(30)
    whole, resumed = recorded(made), recorded(made[:20])
    state = resumed.state_dict()
    resumed = recorded(made[:25])  # further than the state: what came after it is forgotten
    resumed.load_state_dict(state)
    for step, (statistics, seen) in enumerate(made[20:], start=20):
        resumed.append(
            step=step,
            samples_seen=seen,
            batch_size=statistics.batch_size,
            next_batch_size=8,
            lr=0.1,
            measured=True,
            layers=statistics,
        )
    same(resumed.layers(), whole.layers())


def test_dropped_steps_and_moments_that_are_not_finite_leave_no_layers(tmp_path):
    history = Diagnostics()
    history.to_jsonl(tmp_path / "run.jsonl")
    statistics = drawn(1)[0][0]
    common = {"samples_seen": 8, "batch_size": 8, "next_batch_size": 8, "lr": 0.1}
    history.append(step=0, measured=True, dropped="non-finite loss", layers=statistics, **common)
    history.append(
        step=1,
        measured=True,
        layers=dataclasses.replace(statistics, traces=np.full(3, math.nan)),
        **common,
    )
    with pytest.raises(LookupError, match=r"PerSample\(per_parameter=True\)"):
        history.layers()
    assert len(Diagnostics.from_jsonl(tmp_path / "run.jsonl")) == 2


def trained(n_steps, state=None, **options):
    """A run over two batches' worth of steps through wrap; its scheduler."""
    model = make_mlp()
    data = torch.utils.data.TensorDataset(*make_batch(64))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    options = {"batch_sizes": (4, 16), "measure": "all", **grouped(**options)}
    optimizer, loader, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.01), loader, **options
    )
    done = 0
    while done < n_steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = squared_error(model, batch).mean()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            done += 1
            if done == n_steps:
                break
    scheduler.remove()
    return scheduler


@pytest.mark.parametrize("inner_products", [False, True])
def test_wrap_records_layers_that_add_up_to_the_records(inner_products):
    history = trained(12, per_parameter=True, inner_products=inner_products).diagnostics
    layers = history.layers()
    assert layers.names == ("0", "2")
    assert layers.variance_trace.sum(1) == pytest.approx(history.column("variance_trace"), rel=1e-4)
    assert layers.true_grad_sq_norm.sum(1) == pytest.approx(
        history.column("true_grad_sq_norm"), rel=1e-3, abs=1e-3
    )
    assert layers.edges[-1] == history.latest.samples_seen
    assert history.layers("parameter").names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_the_state_of_a_run_with_layers_loads_from_plain_tensors():
    scheduler = trained(6, per_parameter=True)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    other = trained(1, per_parameter=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other.diagnostics.layers(), scheduler.diagnostics.layers())


def test_without_per_parameter_the_error_says_what_to_pass():
    with pytest.raises(LookupError, match=r"PerSample\(per_parameter=True\)"):
        trained(2).diagnostics.layers()


def test_a_run_of_a_controller_that_measures_nothing_is_measured_for_its_layers():
    assert (
        len(trained(4, controller=Annealed(1000, 8), per_parameter=True).diagnostics.layers()) == 2
    )


def test_samples_of_unequal_weight():
    torch.manual_seed(0)
    model, batch = make_mlp(torch.float64), make_batch(9, torch.float64)
    weights = torch.tensor([1.0, 4.0, 2.0, 7.0, 1.0, 3.0, 3.0, 5.0, 1.0], dtype=torch.float64)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model, per_parameter=True, statistics=["inner_products"])
    ((squared_error(model, batch) * weights).sum() / weights.sum()).backward()
    moments = hooks.collect(weights=weights)
    hooks.remove()
    found = LayerStatistics.of_step(moments)
    shares = 9 * weights / weights.sum()
    for name, trace in zip(found.names, found.traces, strict=True):
        rows = grads[name].flatten(1)
        mean = (shares @ rows) / 9
        assert trace == pytest.approx(
            float((shares.unsqueeze(1) * (rows - mean)).square().sum(1).mean()) * 9 / 8
        )
    assert found.traces.sum() == pytest.approx(moments.variance_trace)
