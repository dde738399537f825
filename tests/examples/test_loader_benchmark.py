"""The loader's benchmark runs, and a new size is never late."""

import json

import loader as benchmark
import pytest


@pytest.mark.parametrize("workers", [0, 1])
def test_it_runs_and_a_new_size_is_never_late(tmp_path, workers, capsys):
    benchmark.main(
        ["--quick", "--workers", str(workers), "--samples", "cheap", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "loader.json").read_text())
    assert [
        (row["samples"], row["batch_size"], len(row["changing"])) for row in report["throughput"]
    ] == [("cheap", 16, 3), ("cheap", 256, 3)]
    late = {row["loader"]: row["late_batches"] for row in report["delays"]}
    assert late["ours"] == 0
    assert late["batch_sampler"] == (2 if workers else 0)
    assert (tmp_path / "loader.md").read_text() in capsys.readouterr().out
