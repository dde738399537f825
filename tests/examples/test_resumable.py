"""A run killed with SIGKILL at random moments and started again ends as one that ran through."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "resumable.py"


def start(out, workers, pause):
    options = {
        "out": out, "samples": 400, "epochs": 2, "every": 2, "workers": workers, "pause": pause}
    command = [
        sys.executable, str(SCRIPT),
        *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(out, workers):
    process = start(out, workers, 0.0)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return torch.load(out / "result.pt", weights_only=True)


def killed_and_resumed(out, kills, workers, seed):
    moments = random.Random(seed)
    for kill in range(kills):
        process = start(out, workers[kill % len(workers)], 0.05)
        marker, before = out / "checkpoint.pt", None
        if marker.exists():
            before = marker.stat().st_mtime_ns
        # Not before it has come further than the last time: the kills are spread over the run.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and (
            not marker.exists() or marker.stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    return result(out, workers[-1])


def check(tmp_path, kills, workers):
    expected = result(tmp_path / "through", 0)
    ours = killed_and_resumed(tmp_path / "killed", kills, workers, seed=kills)
    assert ours["seen"] == expected["seen"]
    for epoch in (0, 1):
        indices = [index for batch in expected["seen"] for index in batch][
            400 * epoch : 400 * (epoch + 1)]
        assert sorted(indices) == list(range(400))
    sizes = {len(batch) for batch in expected["seen"]}
    assert len(sizes) > 3
    assert max(sizes) > 20  # some came in micro-batches
    assert torch.equal(ours["weights"], expected["weights"])


@pytest.mark.timeout(1200)  # five processes in turn, each of which imports torch
def test_killed_three_times(tmp_path):
    check(tmp_path, 3, [0, 1, 2])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [[0], [2], [0, 1, 2]])
def test_killed_twenty_times(tmp_path, workers):
    check(tmp_path, 20, workers)
