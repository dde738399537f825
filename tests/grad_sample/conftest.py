"""A process group of one process, for the tests that need it."""

import gc

import pytest
import torch.distributed as dist


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    # Models that hold the group must be collected first: its last owner waits for the group's
    # threads while it holds the interpreter's lock, for which they may wait in turn.
    gc.collect()
    dist.destroy_process_group()
