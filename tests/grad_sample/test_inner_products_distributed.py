"""Inner products with the gradient that DistributedDataParallel reduced or fully_shard sharded, on
one process."""

import pytest
import torch

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, close, make_batch, make_mlp, squared_error
from tests.grad_sample.parallel import needs_gloo, shard, tripled

pytestmark = [needs_gloo, pytest.mark.usefixtures("one_process")]


def expected_products(grads):
    flat = torch.cat([rows.flatten(1) for rows in grads.values()], 1)
    return flat @ flat.mean(0)


def test_inner_products_are_with_the_reduced_gradient():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    parallel = tripled(model)
    hooks = GradSampleHooks(parallel, statistics=["inner_products"])
    for _ in range(2):
        parallel.zero_grad()
        backward(parallel, batch)
        close(hooks.collect().inner_products, 3 * expected_products(grads), 1e-5)


def test_inner_products_of_sharded_parameters():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    shard(model, 0, 2)
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        close(moments.inner_products, expected_products(grads), 1e-5)
        agrees(moments, grads)
