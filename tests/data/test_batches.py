"""Cutting and joining: what comes out of chunks is what one whole batch would have been."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from adabatch import AdaptiveDataLoader
from adabatch.data import pad_right
from adabatch.data.batches import cut, join, learn_layout

Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    values: torch.Tensor
    names: list


@dataclass(frozen=True)
class Frozen:
    values: torch.Tensor
    n_classes: int


def images(samples):
    """As detection models take them: a tuple of images, three channels each, a tuple of dicts."""
    pictures = tuple(torch.full((3, 2, 2), float(s)) for s in samples)
    return pictures, tuple({"box": torch.tensor([s, s])} for s in samples)


COLLATES = {
    "tensor": default_collate,
    "numpy": lambda samples: np.stack([np.full((2, 2), s) for s in samples]),
    "tuple": lambda samples: (torch.tensor(samples), torch.tensor(samples).float()),
    "fields": lambda samples: [torch.tensor(samples), [torch.tensor(samples) + 1]],
    "namedtuple": lambda samples: Pair(torch.tensor(samples), [str(s) for s in samples]),
    "dict": lambda samples: {
        "x": torch.tensor(samples), "deep": {"y": torch.tensor(samples)[:, None] * torch.ones(3)},
    },
    "ordered": lambda samples: OrderedDict(
        b=torch.tensor(samples), a=tuple(str(s) for s in samples)
    ),
    "user-dict": lambda samples: UserDict(x=torch.tensor(samples), n=3),
    "strings": lambda samples: [str(s) for s in samples],
    "dataclass": lambda samples: Record(torch.tensor(samples), [str(s) for s in samples]),
    "frozen": lambda samples: Frozen(torch.tensor(samples), 10),
    "detection": images,
    "time-first": lambda samples: torch.tensor(samples).expand(5, -1),
    "samples-and-channels": lambda samples: {
        "image": torch.tensor(samples)[:, None, None] * torch.ones(3, 3), "none": None,
    },
}


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif hasattr(one, "keys"):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif hasattr(one, "__dataclass_fields__"):
        same(vars(one), vars(other))
    else:
        assert one == other


@pytest.mark.parametrize("collate", COLLATES.values(), ids=COLLATES)
@pytest.mark.parametrize("sizes", [[3, 2, 4], [2, 2], [1, 3], [3, 3, 3]])
def test_joined_and_cut_batches_are_whole_ones(collate, sizes):
    samples = list(range(10, 10 + sum(sizes)))
    layout = learn_layout(collate, samples[0])
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    chunks = [samples[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    joined = join([collate(chunk) for chunk in chunks], layout)
    same(joined, collate(samples))
    for start in range(len(samples)):
        for stop in range(start + 1, len(samples) + 1):
            same(cut(joined, layout, start, stop), collate(samples[start:stop]))


class Given(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("collate", [COLLATES[name] for name in ("dict", "detection", "dataclass")])
def test_through_workers(collate):
    loader = AdaptiveDataLoader(Given(), 4, num_workers=1, collate_fn=collate)
    sizes, at = [4, 9, 2, 2, 17, 3, 3], 0
    for size, batch in zip(sizes, loader, strict=True):
        same(batch, collate(list(range(at, at + size))))
        at += size
        loader.batch_size = sizes[min(len(loader.recent), len(sizes) - 1)]


def test_slices_of_a_chunk_may_be_changed_in_place():
    loader = AdaptiveDataLoader(torch.ones(8, 2), 8, num_workers=1)
    iterator = iter(loader)
    loader.batch_size = 4
    first = next(iterator)
    weight = torch.ones(2, requires_grad=True)
    loss = (first * weight).sum()
    second = next(iterator)
    second += 1
    loss.backward()
    assert torch.equal(first, torch.ones(4, 2))


def ragged(samples):
    rows = [torch.arange(1, s % 5 + 2) for s in samples]
    return {
        "tokens": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=-100),
        "length": torch.tensor([s % 5 + 1 for s in samples]),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_padded_sequences_are_padded_to_one_length(workers):
    join_fn = partial(pad_right, padding_value={"labels": -100})
    options = {"collate_fn": ragged, "join_fn": join_fn}
    loader = AdaptiveDataLoader(Given(), 3, num_workers=workers, **options)
    at = 0
    for batch in loader:
        n = len(batch["length"])
        whole = ragged(list(range(at, at + n)))
        width = whole["tokens"].shape[1]
        for name, padding in (("tokens", 0), ("labels", -100)):
            assert torch.equal(batch[name][:, :width], whole[name])
            assert bool((batch[name][:, width:] == padding).all())
        at += n
        loader.batch_size = 3 + at % 7
    assert at == 40


def test_padded_sequences_without_a_join_fn_are_refused_with_the_cure():
    loader = AdaptiveDataLoader(Given(), 3, num_workers=1, collate_fn=ragged)

    def loop():
        for _ in loader:
            loader.batch_size = 8

    message = (r"at \['tokens'\]: (its shape depends on the samples|shapes .* differ beyond axis 0)"
               r".*join_fn=.*pad_right.*collate_in=")
    with pytest.raises(ValueError, match=message):
        loop()


def mixup(samples):
    """Needs the whole batch: each sample with the one from the other end."""
    values = torch.tensor(samples).float()
    return values + values.flip(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_fn_that_sees_the_whole_batch(workers):
    options = {"collate_fn": mixup, "collate_in": "consumer"}
    loader = AdaptiveDataLoader(Given(), 4, num_workers=workers, **options)
    at = 0
    for size in (4, 11, 3, 22):
        loader.batch_size = size
        if at == 0:
            iterator = iter(loader)
        assert torch.equal(next(iterator), mixup(list(range(at, at + size))))
        at += size


REFUSED = {
    "flat": (
        lambda samples: {"tokens": torch.cat([torch.full((1 + s % 3,), s) for s in samples])},
        r"at \['tokens'\]: \d samples give shape \(\d,\), so axis 0 does not count samples",
    ),
    "flat, later": (
        lambda samples: torch.cat([torch.full((1 + s // 5,), s) for s in samples]),
        r"joined: \d samples give shape \(\d+,\), so axis 0 does not count samples",
    ),
    "count": (
        lambda samples: {"x": torch.tensor(samples), "n": len(samples)},
        r"at \['n'\]: its values depend on the whole batch.*collate_in='consumer'",
    ),
    "positions": (
        lambda samples: (torch.tensor(samples), torch.arange(len(samples)).flip(0)),
        r"at \[1\]: its values depend on the whole batch",
    ),
    "centred": (
        lambda samples: torch.tensor(samples) - torch.tensor(samples).float().mean(),
        "its values depend on the whole batch",
    ),
    "square": (
        lambda samples: torch.ones(len(samples), len(samples)),
        r"a batch of one has shape \(1, 1\), a batch of two \(2, 2\)",
    ),
    "raises": (
        lambda samples: 1 / 0 if len(samples) < 3 else torch.tensor(samples),
        "raised ZeroDivisionError",
    ),
    "shared": (
        lambda samples: {"x": torch.tensor(samples), "first": samples[0]},
        r"at \['first'\]: its values depend on the whole batch",
    ),
}


@pytest.mark.parametrize(("collate", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_joined_is_explained(collate, message):
    loader = AdaptiveDataLoader(Given(), 4, num_workers=1, collate_fn=collate, timeout=60)

    def loop():
        for _ in loader:
            loader.batch_size = 7

    with pytest.raises(ValueError, match=message):
        loop()


@pytest.mark.parametrize("collate", [case[0] for name, case in REFUSED.items() if name in (
    "flat", "flat, later", "count", "positions", "centred")])
def test_a_refused_collate_fn_gives_whole_batches_in_the_consumer(collate):
    loader = AdaptiveDataLoader(Given(), 4, num_workers=1, collate_fn=collate,
                                collate_in="consumer")
    at = 0
    for batch in loader:
        same(batch, collate(list(range(at, at + loader.last_size))))
        at += loader.last_size
        loader.batch_size = 7
    assert at == 40


LENGTHS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 7, 1, 2, 3, 4, 5, 1, 2, 3, 6, 5, 4, 3, 2, 1, 7, 6]


def longest(samples):
    return max(LENGTHS[s] for s in samples)


FROM_THE_CHUNK = {
    "places": lambda samples: torch.arange(len(samples)),
    "offsets": lambda samples: torch.tensor([0, *(LENGTHS[s] for s in samples[:-1])]).cumsum(0),
    "bias": lambda samples: torch.zeros(3, 3) - len(samples),
    "sorted": lambda samples: torch.tensor(sorted(samples, key=LENGTHS.__getitem__)),
    "longest": longest,
    "padded": lambda samples: pad_sequence([torch.ones(LENGTHS[s]) for s in samples], True),
    "mask": lambda samples: torch.stack([
        torch.arange(longest(samples)) < LENGTHS[s] for s in samples]),
    "relative": lambda samples: torch.tensor([LENGTHS[s] / longest(samples) for s in samples]),
    "lists": lambda samples: [[LENGTHS[s]] * longest(samples) for s in samples],
    "later": lambda samples: max(samples) > 13,
}


def with_keys(samples):
    return {"long" if longest(samples) > 5 else "short": torch.tensor(samples)}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sizes", [[4, 3, 5, 2, 2, 4, 1, 7], [1, 1, 1, 3, 2, 4, 7, 9]], ids=str)
@pytest.mark.parametrize("derived", [*FROM_THE_CHUNK.values(), None], ids=[*FROM_THE_CHUNK, "keys"])
def test_what_depends_on_the_batch_comes_from_it_or_is_refused(derived, sizes, workers):
    def collate(samples):
        return (torch.tensor(samples), derived(samples) if derived else with_keys(samples))

    data = list(range(len(LENGTHS)))
    for where in ("worker", "consumer"):
        loader = AdaptiveDataLoader(data, sizes[0], num_workers=workers, collate_fn=collate,
                                    collate_in=where)
        at, error = 0, None
        try:
            for batch, size in zip(loader, [*sizes[1:], 1], strict=True):
                same(batch, collate(data[at : at + loader.last_size]))
                at += loader.last_size
                loader.batch_size = size
        except ValueError as refused:
            error = refused
        assert (error is not None and "collate_in='consumer'" in str(error)) == (where == "worker")
        assert (at == len(data)) == (where == "consumer")


def test_samples_of_other_shapes_in_each_batch_may_be_cut():
    data = [torch.zeros(2 + index // 8) for index in range(40)]
    loader = AdaptiveDataLoader(data, 8, num_workers=1)
    sizes = []
    for batch in loader:
        sizes.append(len(batch))
        loader.batch_size = 4
    assert sizes == [8] + [4] * 8


@pytest.mark.parametrize("name", ["labels", "start_targets", "ner_tags", "y", "y_true", 1])
def test_labels_are_not_padded_with_a_guess(name):
    parts = [torch.ones(1, 2), torch.ones(1, 3)]
    for padding in ({}, {"padding_value": {"input_ids": 1}}, {"padding_value": 0}):
        with pytest.raises(ValueError, match=rf"must pad {name!r}.*'labels': -100"):
            pad_right(parts, 0, ("batch", name), **padding)
        assert pad_right([part[:, :2] for part in parts], 0, (name,), **padding).shape == (2, 2)
    padded = pad_right(parts, 0, (name,), padding_value={name: -100})
    assert padded.tolist() == [[1, 1, -100], [1, 1, 1]]


@pytest.mark.parametrize("path", [(), (0,), ("input_ids",), ("stage",)])
def test_inputs_are_padded_with_the_number_given(path):
    parts = [torch.ones(1, 2), torch.ones(1, 3)]
    assert pad_right(parts, 0, path, padding_value=7).tolist() == [[1, 1, 7], [1, 1, 1]]
    with pytest.raises(ValueError, match="must pad"):
        pad_right(parts, 0, path)


def test_a_collate_fn_that_takes_samples_apart_is_not_disturbed():
    def collate(samples):
        return torch.tensor([sample.pop("x") for sample in samples])

    class Dicts(Given):
        def __getitem__(self, index):
            return {"x": index}

    loader = AdaptiveDataLoader(Dicts(), 4, num_workers=1, collate_fn=collate)
    assert torch.cat(list(loader)).tolist() == list(range(40))


@pytest.mark.parametrize(("shape", "axis"), [((9, 5), 0), ((4, 9), 1), ((9, 16), 0)])
def test_what_is_cut_lies_in_memory_as_if_made_on_its_own(shape, axis):
    # A matrix product gives other last bits for other alignments; a resumed run is cut otherwise.
    batch = torch.arange(float(shape[0] * shape[1])).view(shape)
    for start in range(8):
        piece = cut(batch, axis, start, 9)
        assert piece.data_ptr() % 64 == 0
        assert piece.is_contiguous()
        assert torch.equal(piece, batch.narrow(axis, start, 9 - start))
