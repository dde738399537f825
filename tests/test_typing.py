"""The annotations that py.typed promises: a user's program passes mypy --strict.

Slow: mypy reads torch. Of an editable install it would see nothing, hence the copy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    pytest.importorskip("mypy")
    shutil.copytree(ROOT / "adabatch", tmp_path / "adabatch")
    shutil.copytree(ROOT / "kernels", tmp_path / "adabatch" / "kernels")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent",
               "--config-file", os.devnull, "--cache-dir", str(tmp_path / "cache"),
               str(ROOT / "tests" / "typed_program.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "MYPYPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
