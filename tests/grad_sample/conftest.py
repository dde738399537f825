"""A process group of one process, for the tests that ask for it."""

import pytest
import torch.distributed as dist


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
