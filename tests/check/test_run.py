"""The arguments of check(): losses, batches and models that it refuses, layers that it lists."""

import importlib

import pytest
import torch
from torch import nn

import adabatch
from adabatch import AdaptiveDataLoader, check
from tests.check.models import D, network, square_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def test_check_stays_the_function_once_its_modules_are_imported():
    check(nn.Linear(D, 1), torch.randn(4, D), square_loss, verbose=False)
    assert adabatch.check is check
    assert adabatch.check is importlib.import_module("adabatch.check").check


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [6, 20])
def test_losses_that_are_not_finite_are_named(value, samples):
    model, inputs = nn.Linear(D, 2), torch.randn(samples, D)
    inputs[3, 1] = value
    with pytest.raises(ValueError, match=rf"losses of 1 of {samples} samples are not finite "
                                         r"\(first: sample 3\).*pass a batch without NaN"):
        check(model, inputs, square_loss, verbose=False)
    assert check(model, inputs.nan_to_num(0, 0, 0), square_loss, verbose=False).ok


def test_gradients_that_are_not_finite_are_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.zeros(D)), nn.Linear(D, 2)

        def forward(self, inputs):
            return self.head(inputs + (self.scale * inputs).square().sqrt())

    report = check(Root(), torch.randn(5, D), square_loss, verbose=False)
    assert "not finite" in report[""].reason
    assert report["head"].status == "exact"
