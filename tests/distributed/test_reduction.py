"""Many processes against one: the same moments, decisions and weights."""

import pytest
import torch.distributed as dist

from tests.distributed.processes import assert_checks_pass

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
UNEQUAL = [
    "same_moments_with_accumulation_of_unequal_shares",
    "measures_a_subset_of_each_part",
]
CHECKS = {
    1: ["same_as_one_process_ddp"],
    2: [
        *("same_as_one_process_ddp", "same_as_one_process_fsdp", "same_as_one_process_compiled"),
        *("same_as_one_process_hsdp", "same_with_adam", "same_one_step_later"),
        *("same_with_accumulation", "same_with_a_summed_loss", "same_with_micro_batches"),
        *("same_with_a_budget", "exact_with_layers_that_not_all_processes_use", *UNEQUAL),
    ],
    3: [
        *("same_as_one_process_ddp", "same_as_one_process_fsdp", "same_with_inner_products"),
        *("same_per_group_and_per_parameter", "exact_with_layers_that_not_all_processes_use"),
        *UNEQUAL,
    ],
    4: ["same_as_one_process_hsdp", "same_with_a_mesh_given"],
}


@pytest.mark.parametrize("world_size", CHECKS)
def test_the_same_as_one_process(world_size, tmp_path):
    assert_checks_pass(world_size, CHECKS[world_size], tmp_path)
