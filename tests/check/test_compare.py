"""What check() reports of each layer: shares, costs, errors, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import GradSampleHooks, check
from adabatch.check import compare
from adabatch.grad_sample.cost import PASS, layer_cost
from tests import oracle
from tests.check.models import D, Stack, T, network, square_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
