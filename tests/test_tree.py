"""Tensors are found, and replaced, in every container that models and loaders use."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from adabatch._tree import holds_packed_sequence, map_tensors, tensors

Pair = namedtuple("Pair", "x n")


class Tuple(tuple):
    pass


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    n: int


X = torch.zeros(2)
CONTAINERS = {
    "tuple": ((X, 3), (0,)),
    "list in a dict": ({"a": [X, 3]}, ("a", 0)),
    "ordered dict": (OrderedDict(x=X, n=3), ("x",)),
    "user dict": (UserDict(x=X, n=3), ("x",)),
    "named tuple": ([Pair(X, 3)], (0, 0)),
    "data class": ([Record(X, 3)], (0, "x")),
    "subclass of tuple": (Tuple((X, 3)), (0,)),
    "result of an operation": (torch.ones(2, 2).max(0), None),  # two tensors
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_are_found_and_replaced(name):
    value, path = CONTAINERS[name]
    found = tensors(value)
    assert path is None or [at for at, _ in found] == [path]
    changed = map_tensors(value, lambda at, tensor: tensor + 1)
    assert type(changed) is type(value)
    assert [at for at, _ in tensors(changed)] == [at for at, _ in found]
    assert all(torch.equal(new, old + 1)
               for (_, new), (_, old) in zip(tensors(changed), found, strict=True))
    assert torch.equal(X, torch.zeros(2))


def test_other_objects_are_kept():
    packed, frozen = pack_sequence([torch.ones(2)]), MappingProxyType({"n": 3})
    changed = map_tensors([packed, frozen, "text", None], lambda at, tensor: tensor + 1)
    assert changed[0] is packed
    assert changed[1] is frozen
    assert changed[2:] == ["text", None]
    assert tensors(packed) == []
    assert holds_packed_sequence(UserDict(a=[packed]))
    assert not holds_packed_sequence([X, frozen])
