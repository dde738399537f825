"""Budgets and batch sizes on the command line."""

import argparse

import pytest
from options import Budget, positive_int, shared_options


@pytest.mark.parametrize(
    ("text", "n_samples"),
    [
        ("180000", 180000), ("180_000", 180000), ("1", 1), ("3epochs", 300), ("3ep", 300),
        ("1 epoch", 100), ("0.5epochs", 50), ("2.5 EP", 250), ("0.001ep", 1)],
)
def test_budget_in_samples(text, n_samples):
    assert Budget.parse(text).samples(100) == n_samples


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "0epochs", "1.5", "3 steps", "ep", "1e5"])
def test_no_budget(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="is not a budget; give a number of samples"
    ):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_no_batch_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="positive integer"):
        positive_int(text)


def test_the_default_budget_is_parsed_too():
    assert shared_options(None, budget="3epochs", out="out").parse_args([]).budget == Budget(
        3, in_epochs=True)


def test_quick_is_a_small_budget_and_the_last_one_given_wins():
    parser = shared_options(None, budget="3epochs", out="out")
    assert parser.parse_args(["--quick"]).budget == Budget(1000, in_epochs=False)
    assert parser.parse_args(["--quick", "--budget", "500"]).budget == Budget(500, in_epochs=False)


@pytest.mark.parametrize("script", [
    "compare", "ddp", "digits", "fashion_mnist", "controllers", "online_selection",
    "plot_schedules", "resumable"])
def test_every_example_has_a_quick_form(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--help"])
    module = __import__(script)
    with pytest.raises(SystemExit):
        module.parse() if script == "ddp" else module.main(["--help"])
    assert "--quick" in capsys.readouterr().out
