"""Tensor parallelism against one process."""

import pytest
import torch.distributed as dist

from tests.distributed.processes import assert_checks_pass

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)

CHECKS = {
    2: ["same_when_layers_are_split", "same_when_layers_are_split_per_parameter",
        "split_layers_with_nothing_measured", "split_layers_that_are_refused"],
    4: ["same_when_layers_are_split_beside_fully_shard",
        "split_layers_without_a_data_parallel_group"],
}


@pytest.mark.parametrize("world_size", CHECKS)
def test_layers_split_over_processes(world_size, tmp_path):
    assert_checks_pass(world_size, CHECKS[world_size], tmp_path)
