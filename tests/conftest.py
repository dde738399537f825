"""One thread for torch in every test: the models are tiny, and two threads on busy cores are many
times slower than one. And no clock for shares of the training time: runs are the same again.
"""

import math

import pytest
import torch

from adabatch.scheduler import decision

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Budgets follow the cost model alone, unless a test gives them a clock."""
    monkeypatch.setattr(decision, "perf_counter", lambda: math.nan)
