"""Many processes against one: the same moments, decisions and weights."""

import pytest
import torch
import torch.distributed as dist

import adabatch
from tests.distributed.processes import run_checks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

SAME = ["same_as_one_process_ddp", "same_as_one_process_fsdp", "same_as_one_process_compiled"]
CROSS_RANK = ["cross_rank_by_its_formula", "cross_rank_with_accumulation_and_compression", "cross_rank_is_unbiased"]
BAD = ["different_set_ups", "loaders_of_other_processes", "takes_over_a_distributed_sampler", "orders_agree_whatever_the_generators"]
BAD += ["a_process_with_nan_spoils_no_other", "gradients_that_nobody_averages", "outputs_without_tensors_cannot_be_weighed"]
UNEQUAL = ["same_moments_with_accumulation_of_unequal_shares", "measures_a_subset_of_each_share"]
OWN_MIND = ["a_controller_of_its_own_mind", "goodput_goes_by_one_clock", "two_micro_batches_without_no_sync_cannot_be_told_apart"]
ELSEWHERE = ["same_with_adam", "same_one_step_later", "same_with_accumulation", "same_with_a_summed_loss", "same_with_micro_batches"]
ELSEWHERE += ["same_with_a_budget", "a_group_made_anew"]
CHECKS = {
    1: ["same_as_one_process_ddp"],
    2: [*SAME, "same_as_one_process_hsdp", *UNEQUAL, *CROSS_RANK, *BAD, *OWN_MIND, *ELSEWHERE],
    3: [*SAME[:2], *UNEQUAL, "same_with_dots", "same_with_groups_and_parameters_measured_apart", *CROSS_RANK[:1], *BAD[:3], "a_group_of_some_processes", "micro_batches_agree_within_their_group"],
    4: ["same_as_one_process_hsdp", "same_with_a_mesh_given"],
}


@pytest.mark.parametrize("world_size", sorted(CHECKS))
def test_processes(world_size, tmp_path):
    failed = run_checks(world_size, CHECKS[world_size], tmp_path)
    assert not failed, "\n\n".join(f"{name}, rank {rank}:\n{error}" for name, errors in failed.items() for rank, error in errors.items())


def test_a_launched_process_without_a_group_is_told(monkeypatch):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=4)
    with pytest.raises(ValueError, match="cross_rank"):
        adabatch.wrap(model, optimizer, loader, estimator=adabatch.CrossRank())
    with pytest.raises(RuntimeError, match="init_process_group"):
        adabatch.wrap(model, optimizer, loader, process_group=object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"2 processes were launched.*init_process_group"):
        adabatch.wrap(model, optimizer, loader)
