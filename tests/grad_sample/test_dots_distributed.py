"""Inner products with the gradient that DistributedDataParallel reduced or fully_shard sharded, on one process."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, backward, close, make_batch, make_mlp, squared_error

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def expected_dots(grads):
    flat = torch.cat([rows.flatten(1) for rows in grads.values()], 1)
    return flat @ flat.mean(0)


def test_dots_are_with_the_reduced_gradient():
    """A communication hook that triples the gradient stands for the average over ranks."""
    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    parallel = DistributedDataParallel(model)

    def triple(state, bucket):
        future = torch.futures.Future()
        future.set_result(3 * bucket.buffer())
        return future

    parallel.register_comm_hook(None, triple)
    hooks = GradSampleHooks(parallel, dots=True)
    for _ in range(2):
        parallel.zero_grad()
        backward(parallel, batch)
        close(hooks.collect().dots, 3 * expected_dots(grads), 1e-5)


def test_dots_of_sharded_parameters():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batch = make_mlp(), make_batch()
    grads = oracle.per_sample_grads(model, squared_error, batch)
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    hooks = GradSampleHooks(model, dots=True)
    for _ in range(2):
        model.zero_grad()
        backward(model, batch)
        moments = hooks.collect()
        close(moments.dots, expected_dots(grads), 1e-5)
        agrees(moments, grads)
