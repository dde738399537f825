"""Agreement between processes: the parts that need no other process."""

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adabatch
from adabatch.distributed.group import (
    canonical_repr,
    checksum,
    checksums_agree,
    model_fingerprint,
)


def added_up(decisions):
    return [sum(values) for values in zip(*map(checksum, decisions), strict=True)]


@given(st.integers(1, 50), st.integers(0, 10**9), st.integers(1, 10**9), st.data())
def test_a_differing_decision_is_found(world_size, size, change, data):
    decisions = [(size, 0.5)] * world_size
    assert checksums_agree(added_up(decisions), world_size)
    if world_size > 1:
        decisions[data.draw(st.integers(0, world_size - 1))] = (size + change, 0.5)
        assert not checksums_agree(added_up(decisions), world_size)


def test_checksums_of_very_many_processes_are_exact():
    own, other = checksum("the same"), checksum("another")
    assert checksums_agree([16384 * value for value in own], 16384)
    mixed = [16383 * one + different for one, different in zip(own, other, strict=True)]
    assert not checksums_agree(mixed, 16384)


def test_fingerprints_name_what_matters():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    assert model_fingerprint(model) == "weight (1, 2) float32\nbias (1,) float32 frozen"
    rules = [adabatch.CABS(scale=scale) for scale in (2.0, 2.0, 3.0)]
    first, same, other = map(canonical_repr, rules)
    assert first == same != other
