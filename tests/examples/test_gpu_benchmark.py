"""The one run for a GPU, tried without one: parts that fail, hang or die cost only themselves, and
the goals are judged by what was found."""

import argparse
import json
import sys
import time
from pathlib import Path

import gpu
import gpu_steps
import pytest
import torch

BENCHMARK = gpu.kernel_benchmark


@pytest.fixture
def options(tmp_path):
    given = {"device": "cpu", "small": True, "repeats": 5, "seconds": 540.0, "out": tmp_path}
    return argparse.Namespace(**given, part=None, first=0)


def test_a_case_that_fails_is_a_row(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("none left | here")

    monkeypatch.setattr(BENCHMARK.kernels, "affine_sq_norms", fails)
    saved = []
    result = BENCHMARK.run("cpu", True, save=lambda found: saved.append(len(found["rows"])))
    failed = [row for row in result["rows"] if "failed" in row]
    assert {row["kernel"] for row in failed} == {"affine_sq_norms"}
    assert len(result["rows"]) > len(failed) == 3
    assert result["next"] is None
    assert saved[0] == 0
    assert saved[-1] == len(result["rows"])
    assert "| failed: OutOfMemoryError: none left / here |" in capsys.readouterr().out
    assert max(row["error"] for row in result["rows"] if "failed" not in row) < 1e-5


def test_a_fault_that_breaks_the_process_ends_it_with_the_number_to_go_on_with(monkeypatch):
    monkeypatch.setattr(BENCHMARK, "is_broken", lambda device: True)
    row = {"kernel": "k", "case": "c", "failed": "fault"}
    monkeypatch.setattr(BENCHMARK, "tried", lambda case, device, peak: row)
    assert BENCHMARK.run("cpu", True, first=4)["next"] == 5


def test_no_case_is_begun_without_time(monkeypatch):
    result = BENCHMARK.run("cpu", True, out_of_time=lambda: True)
    assert result["rows"] == []
    assert len(result["left_out"]) > 10


def test_the_kernels_go_on_behind_what_ended_a_process(options, monkeypatch):
    """First the process returns after case 1, then it dies in case 3, then all goes well."""
    row = {"kernel": "k", "case": "c", "failed": "fault"}
    answers = {
        0: {"rows": [row] * 2, "peaks": {"copy": 1.0}, "left_out": [], "next": 2},
        2: {"rows": [row], "peaks": {"copy": 2.0}, "left_out": [], "next": 3, "problem": "killed"},
        4: {"rows": [row], "peaks": {"copy": 3.0}, "left_out": ["last"], "next": None},
    }
    monkeypatch.setattr(gpu, "start_part", lambda name, limit, options, first: answers.pop(first))
    found = gpu.kernels(100.0, options)
    assert not answers
    assert len(found.pop("rows")) == 4
    assert found == {"peaks": {"copy": 1.0}, "left_out": ["last"], "problem": "killed"}


def test_a_process_that_never_began_is_not_started_again(options, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "start_part", lambda *args: calls.append(args) or {"problem": "died"})
    nothing = {"peaks": {}, "rows": [], "left_out": [], "problem": "died"}
    assert gpu.kernels(100.0, options) == nothing
    assert len(calls) == 1


def test_processes_end_at_their_limit(tmp_path):
    with (tmp_path / "log").open("w") as log:
        begin = time.monotonic()
        sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
        assert gpu.ended(sleeps, 0.5, log) == "stopped after 0 s"
        assert time.monotonic() - begin < 10
        assert gpu.ended([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == "exit status 3"
        assert gpu.ended([sys.executable, "-c", ""], 60, log) == ""


def test_a_part_that_dies_tells_its_last_line(options, monkeypatch):
    script = options.out / "script.py"
    script.write_text("print('before'); raise RuntimeError('no such device')")
    monkeypatch.setattr(gpu, "__file__", str(script))
    problem = gpu.start_part("gpt", 60.0, options)["problem"]
    assert problem.startswith("exit status 1; last line of")
    assert problem.endswith("RuntimeError: no such device")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", [False, True])
def test_steps_of_a_model(options, monkeypatch, broken):
    options.part, options.seconds = "vit", 30.0
    if broken:
        monkeypatch.setattr(gpu_steps, "within_budget", lambda *args: 1 / 0)
    gpu.run_part(options)
    found = json.loads((options.out / "vit.json").read_text())
    assert found["title"] == "ViT-S-like, N=4"
    plain, exact, budget = found["rows"]
    assert plain["median"] == 1
    assert exact["way"] == "all samples: 4 samples at one step in 1"
    assert exact["trace"] > 0
    assert budget.get("failed", "") == ("ZeroDivisionError: division by zero" if broken else "")
    assert "division by zero" in gpu.report({"machine": {}, "steps": {"vit": found}}) or not broken


def test_all_parts_in_one_run(tmp_path, monkeypatch, capsys):
    """Results are written after each part, and compared with the targets."""
    shape = "N=8 T=2048 I=4096 O=4096 bfloat16"
    row = {"kernel": "weight_grad_moments", "case": shape, "ms": 3.0, "reached": 1e12}
    row |= {"unit": "FLOP/s", "share": 0.5, "weight_grad": 2.0, "materialised": 9.0, "error": 0.005}
    memory = {**row, "kernel": "affine_sq_norms", "case": "LayerNorm float32", "unit": "B/s"}
    memory |= {"share": 0.81, "weight_grad": None, "materialised": None}
    steps = {"low": 1.0, "high": 1.1, "ms": 2.0, "trace": 1.0}
    medians = {"all samples: 8": 1.05, "measure=0.05: 8": 1.04}
    ways = [{"way": way, "median": median, **steps} for way, median in medians.items()]
    parts = {
        "kernels": {"rows": [row, memory], "peaks": {"copy": 4e12}, "left_out": [], "next": None},
        "gpt": {"title": "GPT", "rows": ways},
        "cnn": {"problem": "stopped after 40 s; last line"},
        "vit": {"title": "ViT", "rows": []},
    }
    monkeypatch.setattr(gpu, "start_part", lambda name, limit, options, first=0: parts[name])
    gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    written = (tmp_path / "gpu.md").read_text()
    for line in (
        f"| weight_grad_moments over torch's weight gradient, {shape}: at most 1.25 | 1.50 | no |",
        "| memory-bound kernels, least share of a copy's bandwidth: at least 80% | 81% | yes |",
        "| largest error of bfloat16 against float64: at most 0.01 | 5.0e-03 | yes |",
        "| largest error of float32 against float64: at most 0.0001 | 5.0e-03 | no |",
        "| GPT's step over a plain one, all samples: at most 1.1 | 1.050 | yes |",
        "| GPT's step over a plain one, measure=0.05: at most 1.03 | 1.040 | no |",
        "| compute-sanitizer: clean | not run: no GPU | no |",
        "cnn: stopped after 40 s; last line",
    ):
        assert line in written
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["gpt"]["rows"] == ways
    assert written in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no GPU; --device cpu --quick tries the script" in capsys.readouterr().err


def test_the_reserves_fit_into_the_time():
    assert sum(gpu.RESERVED.values()) < (1 - gpu.KERNELS_SHARE) * 540
    assert Path(gpu.__file__).name == "gpu.py"
