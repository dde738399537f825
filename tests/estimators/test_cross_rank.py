"""The cross-rank estimator, on several processes."""

import pytest
import torch.distributed as dist

from tests.distributed.processes import assert_checks_pass

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
CHECKS = {
    2: [
        "cross_rank_by_its_formula",
        "cross_rank_with_accumulation_and_compression",
        "cross_rank_is_unbiased",
        "cross_rank_needs_no_sync_between_micro_batches",
    ],
    3: ["cross_rank_by_its_formula"],
}


@pytest.mark.parametrize("world_size", CHECKS)
def test_cross_rank(world_size, tmp_path):
    assert_checks_pass(world_size, CHECKS[world_size], tmp_path)
