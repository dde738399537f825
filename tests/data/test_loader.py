"""AdaptiveDataLoader: sizes hold from the next batch, and it knows what it delivered, whatever workers drew ahead."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from tests.data.streams import Numbers, drawn, flat


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_an_epoch_and_sizes_at_once(shuffle):
    loader = AdaptiveDataLoader(Numbers(50), 4, shuffle, seed=3)
    batches = drawn(loader, [7, 1, 20, 20])
    assert [len(batch) for batch in batches] == [4, 7, 1, 20, 18]
    assert sorted(flat(batches)) == list(range(50))
    assert (flat(batches) == list(range(50))) is not shuffle
    assert loader.n_batches == 5
    assert list(loader.recent) == [(4, 4), (7, 7), (1, 1), (20, 20), (20, 18)]
    assert len(loader) == 3
    assert loader.num_samples == 50


def test_a_seed_repeats_its_orders_and_epochs_differ():
    def epochs(seed):
        loader = AdaptiveDataLoader(Numbers(30), 30, True, seed=seed)
        return [drawn(loader)[0] for _ in range(3)]

    first = epochs(1)
    assert epochs(1) == first
    assert len({tuple(order) for order in [*first, *epochs(2)]}) == 6
    loader = AdaptiveDataLoader(Numbers(30), 30, True, seed=1)
    loader.set_epoch(2)
    assert drawn(loader)[0] == first[2]


@pytest.mark.parametrize("persistent", [False, True])
def test_recent_is_what_was_delivered_not_what_workers_drew_ahead(persistent):
    loader = AdaptiveDataLoader(Numbers(41), 4, num_workers=2, prefetch_factor=2, persistent_workers=persistent)
    for _ in loader:  # an epoch broken off leaves batches that were drawn and never delivered
        loader.batch_size = 9
        break
    assert list(loader.recent) == [(4, 4)]
    for _ in range(2):
        seen = []
        for batch in loader:
            seen += batch.tolist()
            assert loader.recent[-1][1] == len(batch)
            loader.batch_size = 3 + loader.n_batches % 5
        assert seen == list(range(41))


def test_the_sampler_alone_records_what_it_drew():
    sampler = ResizableBatchSampler(10, 4)
    assert sampler.runs_ahead
    assert not AdaptiveDataLoader(Numbers(3)).runs_ahead
    iterator = iter(sampler)
    next(iterator)
    sampler.batch_size = 5
    assert [next(iterator), next(iterator)] == [[4, 5, 6, 7, 8], [9]]
    assert list(sampler.recent) == [(4, 4), (5, 5), (5, 1)]
    assert sampler.n_batches == 3
    next(iter(sampler))
    assert sampler.n_batches == 4
    for _ in range(2100):
        list(sampler)
    assert len(sampler.recent) == 4096


def test_two_loops_at_once_are_an_error_not_a_mixture():
    loader = AdaptiveDataLoader(Numbers(10), 2)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="out of date"):
        next(first)


def test_drop_last_may_be_set_while_it_runs():
    loader = AdaptiveDataLoader(Numbers(10), 4)
    loader.drop_last = True
    assert drawn(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert loader.drop_last
    assert len(loader) == 2


def test_a_list_is_a_sampler_too():
    assert drawn(AdaptiveDataLoader(Numbers(10), 2, sampler=[7, 3, 5])) == [[7, 3], [5]]


def test_a_shuffling_loader_is_seeded_by_its_generator():
    def epoch(seed):
        return drawn(AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, shuffle=True, generator=torch.Generator().manual_seed(seed))))

    assert epoch(5) == epoch(5) != epoch(6)
    torch.manual_seed(0)
    one = drawn(AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, shuffle=True)))
    torch.manual_seed(0)
    assert drawn(AdaptiveDataLoader.from_loader(DataLoader(Numbers(40), 8, shuffle=True))) == one


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


@pytest.mark.parametrize("options", [{"replacement": True}, {"num_samples": 100}, {"num_samples": 5}])
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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaptiveDataLoader(Stream(), shuffle=True), ValueError, r"iterable-style \(Stream\).*omit shuffle and sampler"),
        (lambda: AdaptiveDataLoader(Numbers(3), shuffle=True, sampler=[1]), ValueError, "sampler= or shuffle=True, not both"),
        (lambda: AdaptiveDataLoader(Numbers(3), num_workers=1, in_order=False), ValueError, "in_order=False lets batches overtake"),
        (lambda: AdaptiveDataLoader(Numbers(3), batch_size=0), ValueError, "batch_size must be an integer >= 1, got 0"),
        (lambda: AdaptiveDataLoader.from_loader([1, 2]), TypeError, "got list"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
