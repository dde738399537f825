"""DistributedDataParallel and fully_shard on one process: the taps report before the gradients are
finished."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import (
    agrees,
    backward,
    close,
    make_batch,
    make_mlp,
    mean_grad_sq_norm,
    squared_error,
)
from tests.grad_sample.parallel import needs_gloo, shard, tripled

pytestmark = [needs_gloo, pytest.mark.usefixtures("one_process")]


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True},
                {"static_graph": True}], ids=str)
@pytest.mark.parametrize("attach_first", [True, False])
def test_data_parallel(attach_first, options):
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    hooks = GradSampleHooks(model) if attach_first else None
    parallel = DistributedDataParallel(model, **options)
    hooks = hooks or GradSampleHooks(parallel)
    for _ in range(3):
        parallel.zero_grad()
        backward(parallel, batch)
        agrees(hooks.collect(), grads)


def test_grad_sq_norm_is_that_of_the_reduced_gradient():
    """Read too early, the norm would be nine times too small."""
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    parallel = tripled(model)
    hooks = GradSampleHooks(parallel)
    backward(parallel, batch)
    moments = hooks.collect()
    close(moments.grad_sq_norm, 9 * mean_grad_sq_norm(grads), 1e-5)
    close(moments.sq_norms, oracle.sq_norms(grads), 1e-5)


def test_accumulation_without_synchronisation():
    model, batch = make_mlp(), make_batch(12)
    grads = oracle.per_sample_grads(model, squared_error, batch)
    parallel = DistributedDataParallel(model)
    hooks = GradSampleHooks(parallel, accumulate=2)
    with parallel.no_sync():
        backward(parallel, tuple(tensor[:6] for tensor in batch), divisor=2)
    backward(parallel, tuple(tensor[6:] for tensor in batch), divisor=2)
    agrees(hooks.collect(), grads)


def test_compiled():
    torch._dynamo.reset()
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    parallel = DistributedDataParallel(model)
    hooks = GradSampleHooks(parallel)
    backward(torch.compile(parallel, backend="aot_eager"), batch)
    agrees(hooks.collect(), grads)


def test_fully_shard():
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    shard(model, 0, 2)
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        agrees(hooks.collect(), grads)
