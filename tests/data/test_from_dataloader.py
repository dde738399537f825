"""An AdaptiveDataLoader does what the DataLoader does that it replaces."""

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from tests.data.streams import Numbers, drawn, flat


def test_a_shuffling_loader_is_seeded_by_its_generator():
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        plain = DataLoader(Numbers(40), 8, shuffle=True, generator=generator)
        return drawn(AdaptiveDataLoader.from_loader(plain))

    assert epoch(5) == epoch(5) != epoch(6)
    torch.manual_seed(0)
    one = drawn(AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, shuffle=True)))
    torch.manual_seed(0)
    again = AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, shuffle=True))
    assert drawn(again) == one


def test_a_random_sampler_with_its_own_generator_seeds_the_order():
    def epoch():
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
        return drawn(AdaptiveDataLoader.from_loader(DataLoader(dataset, 8, sampler=sampler)))

    dataset = Numbers(40)
    torch.manual_seed(0)
    one = epoch()
    torch.manual_seed(1)
    assert epoch() == one


@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler])
def test_a_sampler_over_a_part_keeps_to_it(kind):
    loader = AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, sampler=kind(range(12))))
    assert sorted(flat(drawn(loader))) == list(range(12))


@pytest.mark.parametrize(
    "options", [{"replacement": True}, {"num_samples": 100}, {"num_samples": 5}]
)
def test_other_random_samplers_are_taken_as_they_are(options):
    dataset = Numbers(40)

    def sampler():
        return RandomSampler(dataset, generator=torch.Generator().manual_seed(2), **options)

    loader = AdaptiveDataLoader.from_loader(DataLoader(dataset, 8, sampler=sampler()))
    assert flat(drawn(loader)) == list(sampler())


def test_a_resizable_batch_sampler_in_a_plain_loader_is_adopted():
    sampler = ResizableBatchSampler(20, 4, shuffle=True, seed=9, drop_last=True)
    loader = AdaptiveDataLoader.from_loader(DataLoader(Numbers(20), batch_sampler=sampler))
    assert loader.batch_sampler is sampler
    assert (loader.batch_size, loader.drop_last) == (4, True)
    loader.batch_size = 6
    assert drawn(loader) == list(ResizableBatchSampler(20, 6, shuffle=True, seed=9, drop_last=True))


def test_batches_are_collated_as_before():
    data = TensorDataset(torch.arange(6.0).reshape(6, 1), torch.arange(6))
    plain = DataLoader(Subset(data, [4, 2, 0]), batch_size=2)
    for ours, theirs in zip(AdaptiveDataLoader.from_loader(plain), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_anything_else_than_a_dataloader_is_refused():
    with pytest.raises(TypeError, match="got list"):
        AdaptiveDataLoader.from_loader([1, 2])
