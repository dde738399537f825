"""The overhead benchmark on tiny models: its methods agree with its float64 trace, and
compiled steps are measured.
"""

import json
from pathlib import Path

import overhead
import pytest
import torch
from gpu_models import UnderAutocast, Vit, resnet
from memory import peak_memory
from methods import METHODS, OURS
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
