"""The online selection script: its picture, its table, and what decides the choice."""

import digits
import online_selection
import pytest


def test_the_script(tmp_path, capsys):
    online_selection.main(
        ["--budget", "1ep", "--repeats", "1", "--candidates", "128", "32", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == [
        "run", "smallest", "largest", "fixed", "fixed", "The"]
    assert (tmp_path / "online_selection.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("pick", "chosen"), [("smallest", 128), ("largest", 32)])
def test_batch_normalisation_likes_large_parts(pick, chosen):
    curve = online_selection.train(
        online_selection.batchnorm, [128, 32], 128, pick, digits.load_data(), lr=0.1, budget=2560,
        seed=0)
    assert curve.sizes.count(chosen) >= 18
    assert curve.steps == sum(128 // size for size in curve.sizes)
    assert curve.samples[-1] == 2560


def test_a_budget_below_the_largest_candidate(capsys):
    with pytest.raises(SystemExit):
        online_selection.main(["--budget", "100"])
    message = "the largest candidate (256) must fit the budget (100 samples)"
    assert message in capsys.readouterr().err
