"""The sweep over random shapes: what is drawn, and what its tables say."""

import json

import pytest
import sweep
import torch
from models import Workload, class_losses, images
from torch import nn

from adabatch.kernels.cpu_conv import conv_form
from adabatch.kernels.operators import forced_form, outer_form


@pytest.mark.parametrize("family", sweep.FAMILIES)
def test_models_are_drawn_by_the_seed_from_sizes_that_can_be_timed(family):
    first, again, other = (sweep.drawn(family, 3, seed) for seed in (1, 1, 2))
    assert [work.title for work in first] == [work.title for work in again]
    assert [work.title for work in first] != [work.title for work in other]
    assert all(sweep.multiply_adds(work) <= sweep.MOST for work in first)


def tiny(title="tiny"):
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 10))

    return Workload("x", title, make, images(4, 3, 6, 6), class_losses)


def test_every_way_of_a_layer_is_timed_and_the_choice_is_one_of_them():
    (row,) = sweep.layer_rows(tiny(), 3)
    assert {*row["ms"]} >= {"fused, windows", "beside, windows", "fused, groups", "beside, groups"}
    assert row["chosen"] in row["ms"]
    assert row["ms"][row["fastest"]] == min(row["ms"].values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", ["gram", "windows", "groups", "calls"])
def test_forced_forms_are_used(form, fused):
    shapes = (4, 3, 6, 6), (4, 4, 4, 4), (4, 3, 3, 3)
    with forced_form(form):
        assert conv_form(*shapes, (0, 0), 1, with_gradient=fused) == form
    for each in ("gram", "gradients"):
        with forced_form(each):
            assert outer_form(7, 5, 5, with_gradient=fused) == each


def test_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "drawn", lambda family, count, seed: [
        tiny(f"{family} {index}") for index in range(count)])
    threads = str(torch.get_num_threads())
    sweep.main(["--models", "2", "--repeats", "2", "--layers", "--families", "CNN,MLP",
                "--threads", threads, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [result["title"] for result in results] == ["CNN 0", "CNN 1", "MLP 0", "MLP 1"]
    written = (tmp_path / "sweep.md").read_text()
    ratios = sorted(result["rows"][1]["median"] for result in results[:2])
    assert f"| 2 CNNs | {sum(ratios) / 2:.3f} | {ratios[1]:.3f} |" in written
    assert "| model | lost by all choices |" in written
    assert written in capsys.readouterr().out
