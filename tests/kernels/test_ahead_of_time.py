"""The Triton kernels compiled ahead of time for GPUs that need not be present: registers, shared
memory, tensor-core instructions.

In a process without TRITON_INTERPRET, which would leave nothing to compile. `pytest -m slow`
compiles every type and configuration.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Bytes of shared memory that one block may have, by architecture (CUDA C++ programming guide,
# technical specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# Tensor cores: not for the memory-bound kernels, nor float32 products that keep all their bits.
MATRIX_KERNELS = ("outer", "gram", "runs", "conv")


def compiled(every):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    request = {"architectures": sorted(SHARED_LIMIT), "every": every}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.ahead_of_time"]
    command.append(json.dumps(request))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(binaries):
    assert {binary["architecture"] for binary in binaries} == set(SHARED_LIMIT)
    assert {binary["sizes"] for binary in binaries} == {"even", "ones", "huge"}
    for binary in binaries:
        assert binary["stack"] == 0, binary
        assert binary["registers"] <= 255, binary
        assert binary["shared"] <= SHARED_LIMIT[binary["architecture"]], binary
        if binary["kernel"] in MATRIX_KERNELS and "ieee" not in binary["variant"]:
            assert binary["matrix"] > 0, binary


def test_every_kernel_compiles_for_every_architecture():
    check(compiled(every=False))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_configuration_compiles_for_every_architecture():
    check(compiled(every=True))
