"""Parts of the agreement between processes that need no other process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adabatch
from adabatch.distributed.group import canonical_repr, checksum, checksums_agree, model_fingerprint
from adabatch.distributed.shard import BatchShard, OutputWeights


def added_up(decisions):
    return [sum(values) for values in zip(*map(checksum, decisions), strict=True)]


@given(st.integers(1, 50), st.integers(0, 10**9), st.integers(1, 10**9), st.data())
def test_one_that_decides_otherwise_is_found(world_size, size, change, data):
    decisions = [(size, 0.5)] * world_size
    assert checksums_agree(added_up(decisions), world_size)
    if world_size > 1:
        decisions[data.draw(st.integers(0, world_size - 1))] = (size + change, 0.5)
        assert not checksums_agree(added_up(decisions), world_size)


def test_checksums_of_very_many_processes_are_exact():
    own = checksum("the same")
    assert checksums_agree([16384 * value for value in own], 16384)
    assert not checksums_agree([16383 * one + other for one, other in zip(own, checksum("another"), strict=True)], 16384)


def test_facts_name_what_matters():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    assert model_fingerprint(model) == "weight (1, 2) float32\nbias (1,) float32 frozen"
    assert canonical_repr(adabatch.CABS(scale=2.0)) == canonical_repr(adabatch.CABS(scale=2.0)) != canonical_repr(adabatch.CABS(scale=3.0))


class Delivered:
    """A sampler that has delivered `share` of `last_size` samples to this process."""

    def __init__(self, share, last_size):
        self.last_local_size, self.last_size, self.n_batches = share, last_size, 1


@pytest.mark.parametrize(("summed", "weight"), [(False, 2 * 5 / 9), (True, 2.0)])
def test_gradients_weigh_as_their_samples_do(summed, weight):
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
    """One output is made from the other: the gradient that passes both must be weighed once."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = self.body(inputs)
        return {"hidden": hidden, "scores": [self.head(hidden), None]}


def test_outputs_made_from_each_other_are_weighed_once():
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


def test_shares_of_accumulated_batches():
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
