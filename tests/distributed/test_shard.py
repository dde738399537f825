"""The weight of a process's part of a batch, without other processes."""

import pytest
import torch
from torch import nn

from adabatch.distributed.shard import BatchShard, OutputWeights


class Delivered:
    """A sampler that has delivered `local` of `last_size` samples to this process."""

    def __init__(self, local, last_size):
        self.last_local_size, self.last_size, self.n_batches = local, last_size, 1


@pytest.mark.parametrize(("summed", "weight"), [(False, 2 * 5 / 9), (True, 2.0)])
def test_gradients_are_weighted_by_their_samples(summed, weight):
    model, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    model(inputs).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    weights = OutputWeights(model, BatchShard(2, Delivered(5, 9), summed))
    model(inputs).square().mean().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, weight * grad)
    weights.remove()
    assert not model._forward_hooks


class TwoOutputs(nn.Module):
    """One output is made from the other: the gradient that passes both must be weighted once."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return {"hidden": hidden, "scores": [self.head(hidden), None]}


def test_outputs_made_from_each_other_are_weighted_once():
    model, inputs = TwoOutputs(), torch.randn(5, 3)
    weights = OutputWeights(model, BatchShard(3, Delivered(2, 9)))
    output = model(inputs)
    (output["scores"][0].square().mean() + output["hidden"].mean()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    weights.remove()
    model.zero_grad()
    output = model(inputs)
    (output["scores"][0].square().mean() + output["hidden"].mean()).backward()
    for parameter, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(grad, parameter.grad * 3 * 2 / 9)


def test_evaluation_is_left_alone():
    model = nn.Linear(3, 2)
    weights = OutputWeights(model, BatchShard(2, Delivered(5, 9)))
    with torch.no_grad():
        output = model(torch.randn(5, 3))
    assert output.grad_fn is None
    weights.remove()


def test_fractions_of_accumulated_batches():
    sampler = Delivered(5, 9)
    shard = BatchShard(2, sampler)
    shard.record()
    shard.record()
    sampler.n_batches, sampler.last_local_size, sampler.last_size = 2, 4, 9
    shard.record()
    assert shard.fraction_of(1) == 4 / 9
    assert shard.fraction_of(2) == 0.5
    assert shard.size_of(2) == 18
    assert BatchShard(4).fraction_of(1) == BatchShard(4).fraction == 1 / 4
    with pytest.raises(RuntimeError, match="batches"):
        BatchShard(4).size_of(1)
