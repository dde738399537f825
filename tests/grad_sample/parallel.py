"""Models as data parallel training sees them, wrapped or sharded, on one process or several."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

has_gloo = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="needs gloo")


def shard(model, *indices, world_size=1):
    """fully_shard of some layers of a Sequential, and of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    for layer in (*(model[index] for index in indices), model):
        fully_shard(layer, mesh=mesh)
    return model


def tripled(model):
    """Under DistributedDataParallel with a communication hook that triples the gradient, in place
    of an average over ranks."""

    def triple(state, bucket):
        future = torch.futures.Future()
        future.set_result(3 * bucket.buffer())
        return future

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, triple)
    return parallel
