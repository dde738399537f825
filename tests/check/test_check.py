"""What check() says of each layer: shares, errors, refusals; its table and its arguments."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import AdaptiveDataLoader, GradSampleHooks, check
from adabatch.check import compare
from adabatch.grad_sample.cost import PASS, layer_cost
from tests import oracle
from tests.check.models import D, Positions, Stack, T, square_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("samples", [2, 4])
def test_variance_shares_are_the_oracles(samples):
    model, inputs = Stack("batch_first").double(), torch.randn(samples, T, D, dtype=torch.float64)
    grads = oracle.per_sample_grads(model, square_loss, inputs)
    report = check(model, inputs, square_loss, verbose=False)
    total = oracle.variance_trace(grads)
    for row in report.rows:
        own = oracle.variance_trace(
            {name: grad for name, grad in grads.items() if name.startswith(row.name + ".")}
        )
        assert row.variance_share == pytest.approx(float(own / total), rel=1e-9)
        assert row.n_parameters == sum(
            parameter.numel() for parameter in model.get_submodule(row.name).parameters()
        )


def test_a_plain_model_is_exact_and_the_taps_agree():
    report = check(network(), torch.randn(6, D), square_loss, verbose=False)
    assert report.ok
    assert [(row.rule, row.status, row.reason) for row in report.rows] == [
        ("rule", "exact", "")
    ] * 2
    assert all(row.error < 1e-5 for row in report.rows)
    assert report.n_compared == 4


def test_cost_is_the_cost_models():
    wide = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 2))
    one = check(wide, torch.randn(3, 40), square_loss, verbose=False)
    assert one["0"].cost == pytest.approx(PASS * 100 / (3 * 2400 + 2 * PASS * 100))
    several = check(wide, torch.randn(3, 7, 40), square_loss, verbose=False)
    for row, layer in zip(several.rows, wide, strict=True):
        width_in, width_out = layer.in_features, layer.out_features
        model = layer_cost(layer, (3, 7, width_in), (3, 7, width_out))
        assert row.cost == pytest.approx(model.measuring(3, 3) / (3 * model.training))
    assert several["0"].cost > one["0"].cost


@pytest.mark.parametrize("strength", [1.0, 1e-3])
@pytest.mark.parametrize("per_sample", [True, False])
def test_penalty_inside_the_loss_is_named(strength, per_sample):
    def loss_fn(model, inputs):
        losses = square_loss(model, inputs)
        return losses + strength * model[2].weight.square().sum() / (
            1 if per_sample else len(losses)
        )

    report = check(network(), torch.randn(6, D), loss_fn, verbose=False)
    assert list(report.refused) == ["2"]
    assert "2.weight" in report.refused["2"]
    assert "penalty" in report.refused["2"]
    assert not report.ok


def test_functional_use_of_a_weight_is_named_unless_the_taps_see_it():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, 2)

        def forward(self, inputs):
            return self.second(torch.tanh(self.first(F.linear(inputs, self.first.weight))))

    report = check(Functional(), torch.randn(6, D), square_loss, verbose=False)
    row = report["first"]
    assert (row.status == "refused" and "first.weight" in row.reason) or row.error < 1e-4
    assert "outside" in row.reason
    assert report["second"].status == "exact"


def test_a_layer_that_mixes_samples_is_named():
    def loss_fn(model, inputs):
        hidden = model[0](inputs)
        return model[2](torch.tanh(hidden - hidden.mean(0))).square().sum(1)

    report = check(network(), torch.randn(6, D), loss_fn, verbose=False)
    assert list(report.refused) == ["0"]
    assert "mixes samples" in report.refused["0"]


def test_losses_that_mix_samples_refuse_every_layer():
    def contrastive(model, inputs):
        outputs = model(inputs)
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")

    assert list(check(network(), torch.randn(6, D), contrastive, verbose=False).refused) == [
        "0",
        "2",
    ]


def batch_norm_model():
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def test_batch_norm_in_training_gives_contributions_and_in_evaluation_exact_gradients():
    training = check(batch_norm_model(), torch.randn(6, D), square_loss, verbose=False)
    assert [row.status for row in training.rows] == ["contribution", "contribution", "exact"]
    assert training.ok
    evaluation = check(batch_norm_model().eval(), torch.randn(6, D), square_loss, verbose=False)
    assert [row.status for row in evaluation.rows] == ["exact"] * 3
    assert set(map(str, training.layouts.values())) == {"batch_first"}


def test_batch_norm_without_running_statistics():
    model = nn.Sequential(
        nn.Linear(D, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 2)
    ).eval()
    report = check(model, torch.randn(6, D), square_loss, verbose=False)
    assert [row.status for row in report.rows] == ["contribution", "contribution", "exact"]


def test_frozen_and_unused_layers():
    model = nn.ModuleDict(
        {"frozen": nn.Linear(D, D), "partly": nn.Linear(D, D), "unused": nn.Linear(D, D)}
    )
    model["frozen"].requires_grad_(False)
    model["partly"].bias.requires_grad_(False)
    report = check(
        model,
        torch.randn(6, D),
        lambda model, inputs: model["partly"](torch.tanh(model["frozen"](inputs))).square().sum(1),
        verbose=False,
    )
    assert {row.name: row.n_parameters for row in report.rows} == {
        "partly": D * D,
        "unused": D * D + D,
    }
    assert {name: layout.value for name, layout in report.layouts.items()} == {
        "partly": "batch_first"
    }
    assert report["unused"].status == "exact"
    assert report["unused"].variance_share == 0
    assert "not called" in report["unused"].reason
    assert report.batch_size_source is None


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(6, D), nn.Linear(D, 6, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.words(ids)))

    report = check(Tied(), torch.randint(6, (5, T)), square_loss, verbose=False)
    assert [row.n_parameters for row in report.rows] == [6 * D, 0]
    assert [row.variance_share for row in report.rows] == [pytest.approx(1), 0]
    assert report.ok


def test_bfloat16_parameters():
    report = check(network().bfloat16(), torch.randn(6, D).bfloat16(), square_loss, verbose=False)
    assert [row.status for row in report.rows] == ["exact"] * 2


def test_where_the_hooks_cannot_measure_the_reason_is_in_the_table(monkeypatch):
    def failing(model, *, ignore=(), **options):
        if "2" not in ignore:
            raise ValueError(
                "per-sample gradients cannot be measured:\n  - Linear (2): it is made of wood"
            )
        return GradSampleHooks(
            model,
            ignore=ignore,
            **{name: value for name, value in options.items() if name != "layout"},
        )

    monkeypatch.setattr(compare, "GradSampleHooks", failing)
    report = check(network(), torch.randn(6, D), square_loss, verbose=False)
    assert report.refused == {"2": "Linear (2): it is made of wood"}
    assert report["0"].error < 1e-5
    assert not report.ok


def test_an_error_of_the_hooks_that_names_no_layer_becomes_a_note(monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(compare, "GradSampleHooks", failing)
    report = check(network(), torch.randn(6, D), square_loss, verbose=False)
    assert report.notes == ["the hooks cannot be used: no"]
    assert not report.ok
    assert all(math.isnan(row.error) for row in report.rows)


def test_wrong_norms_are_refused(monkeypatch):
    measured = GradSampleHooks.collect

    def doubled(self, **options):
        moments = measured(self, **options)
        moments.by_parameter["0.weight"].mul_(1.5)
        return moments

    monkeypatch.setattr(GradSampleHooks, "collect", doubled)
    report = check(network(), torch.randn(6, D), square_loss, verbose=False)
    assert list(report.refused) == ["0"]
    assert "differ from exact ones" in report.refused["0"]


def test_table_is_printed_and_aligned(capsys):
    report = check(Positions(leading=True), torch.randn(5, T, D), square_loss)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = str(report).splitlines()
    head = lines[0]
    assert head.split() == [
        "layer",
        "type",
        "rule",
        "parameters",
        "layout",
        "variance",
        "cost",
        "error",
        "status",
    ]
    for line, row in zip(lines[1:3], report.rows, strict=True):
        assert line.startswith(row.name)
        assert line[head.index("layout") :].startswith(row.layout.value)
        assert line[: head.index("parameters") + len("parameters")].endswith(str(row.n_parameters))
    assert "number of samples read from: inputs.shape[0]" in printed
    check(network(), torch.randn(5, D), square_loss, verbose=False)
    assert capsys.readouterr().out == ""


def test_equal_reasons_are_listed_once():
    deep = nn.Sequential(
        *(layer for _ in range(6) for layer in (nn.Linear(D, D), nn.BatchNorm1d(D)))
    )
    table = str(check(deep, torch.randn(6, D), square_loss, verbose=False))
    assert table.count("training mode") == 1
    assert "0, 1, 2 and 9 more" in table


def test_to_dict_is_plain():
    report = check(network(), torch.randn(5, D), square_loss, verbose=False)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["version"] == 1
    assert [row["layout"] for row in values["rows"]] == ["batch_first"] * 2
    assert values["batch_size_source"] == {"position": 0, "name": "input", "path": [], "dim": 0}
    with pytest.raises(KeyError, match=r"no layer 'x'.*'0', '2'"):
        report["x"]


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (
            lambda model, inputs: model(inputs).mean(),
            ValueError,
            r"per-sample losses \[N\], got the shape \[\].*reduction='none'",
        ),
        (lambda model, inputs: model(inputs), ValueError, r"got the shape \[5, 2\]"),
        (
            lambda model, inputs: 3.0,
            TypeError,
            "must return a tensor of per-sample losses, got float",
        ),
        (lambda model, inputs: model(inputs[:1]).sum(1), ValueError, "at least 2, got 1"),
        (
            lambda model, inputs: inputs.sum(1),
            ValueError,
            "do not depend on any trainable parameter",
        ),
    ],
)
def test_wrong_losses_are_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        check(network(), torch.randn(5, D), loss_fn, verbose=False)


CRITERION = (
    r"loss_fn must be a function \(model, batch\) -> the losses of the batch's samples \[N\], got "
)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (None, CRITERION + "None. For instance lambda model, batch: .*reduction='none'"),
        ("mse", CRITERION + "'mse'. For"),
        (
            nn.MSELoss(reduction="none"),
            CRITERION + "MSELoss, a function of outputs and targets. For",
        ),
        (nn.functional.mse_loss, CRITERION + "mse_loss, a function of outputs and targets. For"),
        (
            lambda batch: batch,
            CRITERION + ".*which cannot be called in this way: too many positional arguments",
        ),
    ],
)
def test_what_is_no_loss_function_is_refused(loss_fn, message):
    with pytest.raises(TypeError, match=message):
        check(network(), torch.randn(5, D), loss_fn, verbose=False)


def test_what_is_no_batch_is_refused():
    loader = torch.utils.data.DataLoader(torch.randn(5, D), 5)
    for each in (loader, AdaptiveDataLoader(torch.randn(5, D), 5)):
        with pytest.raises(
            TypeError, match=r"must be one batch.* got a \w*DataLoader: pass next\(iter\(loader\)\)"
        ):
            check(network(), each, square_loss, verbose=False)
    with pytest.raises(
        TypeError, match=r"batch holds no tensors, got None: pass one batch as the loader gives it"
    ):
        check(network(), None, square_loss, verbose=False)
    inputs = torch.randn(5, D)
    assert (
        check(
            network(), None, lambda model, batch: square_loss(model, inputs), verbose=False
        ).n_samples
        == 5
    )


def test_wrong_models_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        check(square_loss, torch.randn(5, D), square_loss)
    with pytest.raises(ValueError, match="no trainable parameters"):
        check(network().requires_grad_(False), torch.randn(5, D), square_loss)
    with pytest.raises(ValueError, match=r"0\.weight is not initialized"):
        check(nn.Sequential(nn.LazyLinear(3)), torch.randn(5, D), square_loss)


def test_a_large_batch_that_cannot_be_cut_is_refused_with_the_fix():
    def loss_fn(model, inputs):
        return square_loss(model, inputs) / len(inputs)

    with pytest.raises(ValueError, match="Pass a batch of 2 to 8 samples"):
        check(network(), torch.randn(9, D), loss_fn, verbose=False)
    assert check(network(), torch.randn(8, D), loss_fn, verbose=False).ok
