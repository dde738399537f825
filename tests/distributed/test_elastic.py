"""Processes are killed at random moments under torchrun; restarted, also fewer of them, they finish
the run with each sample once an epoch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.elastic_run import EPOCHS, SAMPLES

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)

ROOT = Path(__file__).parents[2]


def torchrun(
    processes: int, restarts: int, *arguments: object, timeout: float = 140.0
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes,
               "--max-restarts", restarts, "--monitor-interval", 0.05, "--standalone", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Its shared store hands restarted processes the addresses of those that are gone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        out, error = process.communicate(timeout=30)
        pytest.fail(f"torchrun did not end within {timeout} s\n{out}\n{error}")
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def each_sample_once_an_epoch(folder: Path) -> None:
    result = torch.load(folder / "result.pt", weights_only=True)
    expected = [[epoch, index] for epoch in range(EPOCHS) for index in range(SAMPLES)]
    assert sorted(result["seen"]) == expected
    assert EPOCHS * SAMPLES / 16 <= result["steps"] <= EPOCHS * SAMPLES / 5 + EPOCHS


def killed_and_restarted(folder: Path, seed: int, kills: int) -> None:
    """One kill of three processes that ends their run, the others of two that torchrun restarts."""
    script = ROOT / "tests" / "distributed" / "elastic_run.py"
    first = torchrun(3, 0, script, folder, 1, seed)
    assert first.returncode != 0
    then = torchrun(2, kills, script, folder, kills - 1, seed + 1)
    assert then.returncode == 0, f"{then.stdout}\n{then.stderr}"
    each_sample_once_an_epoch(folder)


def test_three_kills(tmp_path):
    killed_and_restarted(tmp_path, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [10, 20])
def test_ten_kills(tmp_path, seed):
    killed_and_restarted(tmp_path, seed, kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=str)
def test_example(tmp_path, options):
    script = ROOT / "examples" / "ddp.py"
    ran = torchrun(2, 0, script, "--out", tmp_path, "--epochs", 2, *options)
    assert ran.returncode == 0, ran.stderr
    assert '"processes": 2' in ran.stdout
    again = torchrun(3, 0, script, "--out", tmp_path, "--epochs", 3, *options)
    assert again.returncode == 0, again.stderr
    assert '"resumed_at": null' not in again.stdout
