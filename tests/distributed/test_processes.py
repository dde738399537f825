"""Many processes against one: the same moments, decisions and weights."""

import pytest
import torch.distributed as dist

from tests.distributed.processes import run_checks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

SAME = ["same_as_one_process_ddp", "same_as_one_process_fsdp", "same_as_one_process_compiled"]
UNEQUAL = ["same_moments_with_accumulation_of_unequal_shares", "measures_a_subset_of_each_share"]
CHECKS = {
    1: ["same_as_one_process_ddp"],
    2: [*SAME, "same_as_one_process_hsdp", "same_with_accumulation", "same_with_a_summed_loss", "same_with_micro_batches", *UNEQUAL],
    3: [*SAME, "same_with_dots", "same_with_groups_and_parameters_measured_apart", *UNEQUAL],
    4: ["same_as_one_process_hsdp"],
}


@pytest.mark.parametrize("world_size", sorted(CHECKS))
def test_processes(world_size, tmp_path):
    failed = run_checks(world_size, CHECKS[world_size], tmp_path)
    assert not failed, "\n\n".join(f"{name}, rank {rank}:\n{error}" for name, errors in failed.items() for rank, error in errors.items())
