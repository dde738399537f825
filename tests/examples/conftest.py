"""The examples are scripts, not a package: their folders go on the path, as a script's own does."""

import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))


@pytest.fixture(autouse=True)
def compiler_settings():
    """The benchmarks change settings of the compiler, which the tests after them must not see."""
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    yield
    if torch._dynamo.config.skip_nnmodule_hook_guards != before:
        torch._dynamo.config.skip_nnmodule_hook_guards = before
        torch._dynamo.reset()
