"""AdaptiveDataLoader: sizes hold from the next batch, and it counts what it delivered."""

import pytest
from torch.utils.data import IterableDataset

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from adabatch.interfaces import BatchSource
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
    options = {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": persistent}
    loader = AdaptiveDataLoader(Numbers(41), 4, **options)
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


def test_loader_and_sampler_are_batch_sources_and_say_what_they_are():
    loader = AdaptiveDataLoader(Numbers(60), 8, True, rank=1, world_size=2, num_workers=1)
    next(iter(loader))
    assert BatchSource in type(loader).__mro__
    assert BatchSource in type(loader.batch_sampler).__mro__
    shown = "60 samples, batch 8, position 8 of 60, epoch 0, rank 1 of 2"
    assert repr(loader) == f"AdaptiveDataLoader({shown}, workers 1)"
    assert repr(loader.batch_sampler) == f"ResizableBatchSampler({shown})"
    assert loader._repr_html_().endswith('<progress value="8" max="60"></progress>')
    stream = AdaptiveDataLoader(Stream(), 2)
    assert repr(stream).startswith("AdaptiveDataLoader(unknown length, batch 2, position 0, epoch")
    assert "progress" not in stream._repr_html_()
    for source in (loader, loader.batch_sampler, stream):
        for name in ("batch_size", "drop_last", "position", "n_batches", "recent", "runs_ahead"):
            assert getattr(source, name) is not None
    assert (loader.n_iterations, loader.batch_sampler.n_iterations) == (1, None)
    assert stream.num_samples is stream.samples_left is loader.batch_sampler.micro_batches is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaptiveDataLoader(Stream(), shuffle=True), ValueError,
         r"iterable-style \(Stream\).*omit shuffle and sampler"),
        (lambda: AdaptiveDataLoader(Numbers(3), shuffle=True, sampler=[1]), ValueError,
         "omit it or shuffle=True"),
        (lambda: AdaptiveDataLoader(Numbers(3), num_workers=1, in_order=False), ValueError,
         "in_order=False lets batches overtake"),
        (lambda: AdaptiveDataLoader(Numbers(3), batch_size=0), ValueError,
         "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
