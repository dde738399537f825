"""Set-ups of several processes that differ, or cannot work, end in the same error on each."""

import pytest
import torch
import torch.distributed as dist

import adabatch
from tests.distributed.processes import assert_checks_pass

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
BAD = [
    *("different_set_ups", "loaders_of_other_processes", "takes_over_a_distributed_sampler"),
    *("orders_agree_whatever_the_generators", "a_process_with_nan_spoils_no_other"),
    *("gradients_that_nobody_averages", "outputs_without_tensors_cannot_be_weighted"),
    *("controllers_that_disagree", "goodput_uses_a_common_clock", "a_group_created_again"),
    *("a_controller_with_propose_alone", "a_role_that_is_open_on_one_process"),
]
CHECKS = {
    2: BAD,
    3: [*BAD[:3], "a_group_of_some_processes", "micro_batches_agree_within_their_group"],
}


@pytest.mark.parametrize("world_size", CHECKS)
def test_set_ups(world_size, tmp_path):
    assert_checks_pass(world_size, CHECKS[world_size], tmp_path)


def test_a_launched_process_without_a_group_is_refused(monkeypatch):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.zeros(8, 2), batch_size=4)
    with pytest.raises(ValueError, match="CrossRank"):
        adabatch.wrap(model, optimizer, loader, estimator=adabatch.CrossRank())
    with pytest.raises(RuntimeError, match="init_process_group"):
        adabatch.wrap(model, optimizer, loader, process_group=object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"2 processes were launched.*init_process_group"):
        adabatch.wrap(model, optimizer, loader)
