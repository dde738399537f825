"""The overhead benchmark on tiny models: its methods agree with its float64 trace, and
compiled steps are measured.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import overhead
import pytest
import torch
from gpu_models import UnderAutocast, Vit, resnet
from loop_models import loop_workloads
from memory import peak_memory
from methods import LOOPS, METHODS, OURS
from models import Gpt, Workload, class_losses, images, token_losses

NAMES = [method.__name__ for method in OURS]


def ids():
    return torch.randint(32, (4, 8)), torch.randint(32, (4, 8))


TINY = {
    "compiled": Workload(
        "x", "GPT", lambda: UnderAutocast(Gpt(1, 16, 2, 8, 32)), ids, token_losses, compiled=True),
    "batch norm": Workload(
        "y", "CNN", lambda: UnderAutocast(resnet((1, 1), 4)), images(4, 3, 32, 32), class_losses,
        alone=False),
    "images": Workload("z", "ViT", lambda: Vit(1, 16, 2, 32), images(4, 3, 32, 32), class_losses),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", TINY)
def test_all_of_ours(which):
    torch._dynamo.reset()
    result = overhead.measure(
        TINY[which], [*NAMES, "Vmap"] if which == "images" else NAMES, 3, "cpu")
    assert not result["skipped"]
    assert [row["median"] for row in result["rows"][:1]] == [1.0]
    errors = {row["method"]: row["error"] for row in result["rows"]}
    assert errors["Plain"] is None
    if which == "batch norm":
        assert result["trace"] is None
        assert errors["Exact"] is None
    else:
        assert errors["Exact"] < (0.1 if which == "compiled" else 1e-5)
    assert "| adabatch, exact |" in overhead.table([result])
    torch._dynamo.reset()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory():
    found = peak_memory(TINY["images"], METHODS["Exact"], "cpu")
    assert found["peak"] >= found["before"] > 0


def test_written_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(overhead.EVERY, "z", TINY["images"])
    threads = torch.get_num_threads()
    overhead.main([
        "--models", "z", "--repeats", "2", "--peers", "", "--no-memory", "--threads", str(threads),
        "--out", str(tmp_path)])
    assert json.loads((tmp_path / "overhead.json").read_text())["results"][0]["model"] == "z"
    assert (tmp_path / "overhead.md").read_text().strip() in capsys.readouterr().out


LOOP_WORKLOADS = loop_workloads(**overhead.TINY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("letter", LOOP_WORKLOADS)
def test_whole_training_loops(letter):
    work = LOOP_WORKLOADS[letter]
    if find_spec(work.needs) is None:
        pytest.skip(f"needs {work.needs}")
    result = overhead.measure(work, [loop.__name__ for loop in LOOPS], 1, "cpu")
    rows = {row["method"]: row for row in result["rows"]}
    assert next(iter(rows)) == "Loop"
    assert rows["Loop"]["median"] == 1
    assert rows["LoopScheduled"]["error"] is rows["LoopScheduled"]["predicted"] is None
    assert rows["LoopDefault"]["predicted"] > 0
    assert result["skipped"].keys() == (set() if work.alone else {"LoopVmap"})
    for name in {"LoopExact", "LoopDefault", "LoopVmap"} & rows.keys():
        assert rows[name]["error"] is None if not work.alone else rows[name]["error"] < 1e-5


def test_a_model_of_a_missing_package_is_skipped_with_the_command_that_installs_it(capsys):
    work = Workload("x", "absent", None, None, class_losses, needs="no_such_package")
    result = overhead.measure(work, NAMES, 1, "cpu")
    assert "skipped: the model (needs no_such_package: pip install no_such_package)" in (
        overhead.table([result]))


def test_names_of_models():
    assert overhead.letters("b,i-k") == ["b", "i", "j", "k"]
