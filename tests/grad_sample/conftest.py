"""A process group of one process, for the tests that ask for it."""

import gc

import pytest
import torch.distributed as dist


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    # Models that hold the group must be gone before: the last to let go of it waits for the group's threads with the interpreter's lock in hand, for which
    # they may wait in turn.
    gc.collect()
    dist.destroy_process_group()
