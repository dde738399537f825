"""Many processes, one order.

Every sample once over all ranks, local sizes within one, equally many batches, another number of
processes on resuming.
"""

import logging
import resource
import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from adabatch.data import KeyedPermutation
from tests.data.streams import Augmented, Counting, Numbers, Plain, Restartable, through_a_file

CASES = st.fixed_dictionaries(
    {
        "world": st.integers(1, 6),
        "n": st.integers(0, 80),
        "sizes": st.lists(st.integers(0, 25), min_size=1, max_size=10),
        "drop_last": st.booleans(),
        "shuffle": st.booleans(),
        "kill": st.integers(0, 10),
        "other_world": st.integers(1, 6),
        "limit": st.sampled_from([None, 1, 3]),
        "collate_in": st.sampled_from(["worker", "consumer"]),
        "own_sampler": st.booleans(),
    }
)


def loaders_of(case, world, **options):
    n = case["n"] + max(case["world"], case["other_world"])
    options |= {"drop_last": case["drop_last"], "collate_in": case["collate_in"]}
    result = []
    for rank in range(world):
        order = {"shuffle": case["shuffle"], "seed": 3}
        if case["own_sampler"]:
            order = {"sampler": Restartable(n)}
        options |= {"rank": rank, "world_size": world}
        loader = AdaptiveDataLoader(Numbers(n), world, **order, **options)
        loader.micro_batches.limit = case["limit"]
        result.append(loader)
    return result


def together(loaders, sizes, stop=None):
    """Batches of one epoch in these sizes, as lists of all ranks, which are checked on the way."""
    world, steps = len(loaders), []
    iterators = [iter(loader) for loader in loaders]
    while stop is None or len(steps) < stop:
        left = loaders[0].samples_left
        size = max(world, sizes[len(steps) % len(sizes)])
        for loader in loaders:
            loader.batch_size = size
        parts = []
        for loader, iterator in zip(loaders, iterators, strict=True):
            batch = next(iterator, None)
            pieces = [] if batch is None else [batch]
            while not loader.is_last_micro_batch:
                pieces.append(next(iterator))
            parts.append(pieces)
        assert len({len(pieces) for pieces in parts}) == 1
        if not parts[0]:
            assert left < (size if loaders[0].drop_last else 1)
            break
        batches = [torch.cat(pieces).tolist() for pieces in parts]
        shares = [loader.last_local_size for loader in loaders]
        assert max(shares) - min(shares) <= 1
        assert {loader.last_size for loader in loaders} == {sum(shares)}
        places = {(each.position, each.samples_left, len(each), each.recent[-1])
                  for each in loaders}
        assert len(places) == 1
        assert loaders[0].recent[-1] == (size, sum(shares))
        if left >= world:
            assert [len(batch) for batch in batches] == shares
            assert min(shares) >= 1
            if left - size >= world or loaders[0].drop_last:
                assert sum(shares) == size
        else:
            assert [max(1, share) for share in shares] == [len(batch) for batch in batches]
        steps.append([batch[:share] for batch, share in zip(batches, shares, strict=True)])
    return steps


def in_order(steps, start=0):
    """The samples of these batches in the global order: rank r has positions q mod W = r."""
    world = len(steps[0]) if steps else 1
    for parts in steps:
        total = sum(map(len, parts))
        queues = [iter(part) for part in parts]
        for position in range(start, start + total):
            yield next(queues[position % world])
        start += total


def check(case):
    world, sizes = case["world"], case["sizes"]
    n = case["n"] + max(world, case["other_world"])
    order = KeyedPermutation(n, 3, 0)(slice(None)).tolist() if case["shuffle"] else list(range(n))
    if case["own_sampler"]:
        order = list(Restartable(n))
    loaders = loaders_of(case, world)
    expected_batches = None
    if len(sizes) == 1 and case["limit"] is None and sizes[0] >= world:
        loaders[0].batch_size = sizes[0]
        expected_batches = len(loaders[0])
    steps = together(loaders, sizes)
    assert expected_batches is None or expected_batches == len(steps)
    seen = list(in_order(steps))
    assert seen == order[: len(seen)]
    assert case["drop_last"] or len(seen) == n

    killed = loaders_of(case, world)
    head = list(in_order(together(killed, sizes, stop=case["kill"])))
    states = [through_a_file(loader.state_dict()) for loader in killed]
    assert case["own_sampler"] or all(state == states[0] for state in states)
    resumed = loaders_of(case, case["other_world"])
    for rank, loader in enumerate(resumed):
        loader.load_state_dict(states[rank % world])
        inside = case["kill"] <= len(steps) and killed[0].position
        assert loader.samples_left == (n - len(head) if inside else n)
    if killed[0].position:
        again = together(resumed, sizes)
        rest = list(in_order(again, len(head)))
        assert head + rest == order[: len(head) + len(rest)]
        assert case["drop_last"] or len(head) + len(rest) == n


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CASES)
def test_one_order_whatever_sizes_and_processes(case):
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CASES)
def test_one_order_at_length(case):
    check(case)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5), st.integers(5, 60), st.lists(st.integers(5, 20), min_size=1, max_size=6),
    st.booleans(), st.integers(1, 5),
)
def test_the_sampler_alone(world, n, sizes, drop_last, other):
    options = {"shuffle": True, "seed": 1, "drop_last": drop_last, "world_size": world}
    samplers = [ResizableBatchSampler(n, sizes[0], rank=rank, **options) for rank in range(world)]
    iterators, seen, step = [iter(sampler) for sampler in samplers], [], 0
    while True:
        for sampler in samplers:
            sampler.batch_size = sizes[step % len(sizes)]
        batches = [next(iterator, None) for iterator in iterators]
        if None in batches:
            break
        seen += chain.from_iterable(batches)
        assert samplers[0].last_size == sum(map(len, batches))
        state, step = samplers[0].state_dict(), step + 1
    assert set(batches) == {None} if batches[0] is None else not batches
    assert sorted(seen) == sorted(set(seen))
    assert drop_last or len(seen) == n
    if seen:
        rest = []
        for rank in range(other):
            sampler = ResizableBatchSampler(n, other, shuffle=True, rank=rank, world_size=other)
            sampler.load_state_dict(state)
            rest += chain.from_iterable(sampler)
        assert not drop_last or len(set(seen + rest)) == n


@pytest.mark.parametrize("collate_in", ["worker", "consumer"])
def test_with_workers_augmentation_and_micro_batches_as_with_one_process(collate_in):
    def epoch(world, workers):
        rows = []
        for rank in range(world):
            loader = AdaptiveDataLoader(
                Augmented(101), 12, True, seed=4, num_workers=workers, rank=rank, world_size=world,
                collate_in=collate_in, seed_samples=True,
            )
            loader.micro_batches.limit = 4
            counts = []
            for batch in loader:
                counts.append(len(batch[0]))
                rows += zip(*(column.tolist() for column in batch), strict=True)
                loader.batch_size = 7 + loader.n_batches % 9
            assert max(counts) <= 4
        return sorted(rows)

    alone = epoch(1, 0)
    assert [row[0] for row in alone] == list(range(101))
    assert epoch(2, 0) == alone
    assert epoch(3, 2) == alone


def test_micro_batches_are_equally_many_in_all_processes():
    for batch_size, limit in ((13, 3), (10, 5), (7, 1), (3, 1)):
        counts, sizes = set(), []
        for rank in range(3):
            loader = AdaptiveDataLoader(Numbers(batch_size), batch_size, rank=rank, world_size=3)
            loader.micro_batches.limit = limit
            pieces = [len(piece) for piece in loader]
            counts.add(len(pieces))
            sizes += pieces
        assert len(counts) == 1
        assert sum(sizes) == batch_size
        assert max(sizes) <= max(limit, 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Counting, Plain])
def test_iterable_data_sets_keep_one_of_every_world_size(kind, workers):
    seen, batches = [], set()
    for rank in range(3):
        loader = AdaptiveDataLoader(kind(49), 8, rank=rank, world_size=3, num_workers=workers)
        mine = []
        for batch in loader:
            mine.append(len(batch))
            assert (loader.last_local_size, loader.last_size) == (len(batch), 3 * len(batch))
            seen += batch.tolist()
            loader.batch_size = 3 + 5 * (loader.n_batches % 3)
        batches.add(tuple(mine))
    assert len(batches) == 1
    # Full rounds of three of each worker's stream.
    rounds = 16 if workers == 0 else 25 // 3 + 24 // 3
    assert len(seen) == len(set(seen)) == 3 * rounds


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_data_sets_resume(workers):
    for rank in range(2):
        def build(rank=rank, world_size=2):
            options = {"rank": rank, "world_size": world_size, "num_workers": workers}
            return AdaptiveDataLoader(Counting(60), 6, **options)

        whole = [batch.tolist() for batch in build()]
        killed, head = build(), []
        for batch in killed:
            head.append(batch.tolist())
            if len(head) == 4:
                break
        state = through_a_file(killed.state_dict())
        resumed = build()
        resumed.load_state_dict(state)
        assert head + [batch.tolist() for batch in resumed] == whole
        with pytest.raises(ValueError, match="saved with 2, here 3"):
            build(world_size=3).load_state_dict(state)


class Huge:
    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        return 3 * index + 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_billion_samples_take_no_memory_and_no_time(shuffle, workers):
    list(AdaptiveDataLoader(Numbers(64), 64, True, num_workers=workers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    begin = time.perf_counter()
    loader = AdaptiveDataLoader(Huge(), 1024, shuffle, rank=3, world_size=8, num_workers=workers)
    first = next(iter(loader))
    seconds = time.perf_counter() - begin
    resumed = AdaptiveDataLoader(Huge(), 1024, shuffle, rank=0, world_size=3)
    state = loader.state_dict()
    state["sampler"]["position"] = 987_654_321
    resumed.load_state_dict(state)
    later = next(iter(resumed))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 20e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    order = KeyedPermutation(10**9, 0, 0) if shuffle else np.array
    assert ((first - 1) // 3).tolist() == order(range(3, 1024, 8)).tolist()
    positions = range(987_654_321, 987_654_321 + 1024, 3)
    assert ((later - 1) // 3).tolist() == order(positions).tolist()


@pytest.mark.parametrize(("shuffle", "rank"), [(True, 0), (False, 1)])
def test_a_distributed_sampler_is_taken_over(shuffle, rank, caplog):
    data = Numbers(23)
    own = DistributedSampler(data, 2, rank, shuffle=shuffle, seed=6)
    plain = DataLoader(data, 4, sampler=own)
    with caplog.at_level(logging.INFO, "adabatch"):
        loader = AdaptiveDataLoader.from_loader(plain)
    assert "DistributedSampler is replaced" in caplog.text
    sampler = loader.batch_sampler
    assert (loader.batch_size, sampler.shuffle, sampler.seed) == (8, shuffle, 6)
    order = KeyedPermutation(23, 6, 0)(slice(None)).tolist() if shuffle else list(range(23))
    assert list(chain.from_iterable(batch.tolist() for batch in loader)) == order[rank::2]


def test_other_distributed_samplers_are_refused():
    class Other(DistributedSampler):
        pass

    for sampler in (Other(Numbers(8), 2, 0), DistributedSampler(Numbers(6), 2, 0)):
        with pytest.raises(ValueError, match="other rules, or those of another data set"):
            AdaptiveDataLoader.from_loader(DataLoader(Numbers(8), 4, sampler=sampler))


class NoLength:
    def __iter__(self):
        return iter(range(9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 3}, ValueError, "each of the 4 processes needs .* integer >= 4, got 3"),
        ({"dataset": Numbers(3)}, ValueError, "an epoch of 3 samples cannot give each of 4 pro"),
        ({"sampler": [1, 2, 0]}, ValueError, "an epoch of 3 samples"),
        ({"rank": 4}, ValueError, "rank must be an integer from 0 to 3, got 4"),
        ({"rank": -1}, ValueError, "rank must be an integer from 0 to 3, got -1"),
        ({"world_size": 0}, ValueError, "world_size must be an integer >= 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size must be an integer"),
        ({"sampler": NoLength()}, ValueError, "has no length"),
        ({"sampler": RandomSampler(Numbers(9))}, ValueError, "RandomSampler has no generator"),
    ],
)
def test_errors(arguments, error, message):
    defaults = {"dataset": Numbers(9), "batch_size": 4, "world_size": 4}
    with pytest.raises(error, match=message):
        AdaptiveDataLoader(**(defaults | arguments))


def test_a_size_below_the_number_of_processes_is_refused_and_nothing_changes():
    loader = AdaptiveDataLoader(Numbers(20), 8, rank=1, world_size=4)
    with pytest.raises(ValueError, match=">= 4, got 3"):
        loader.batch_size = 3
    assert loader.batch_size == 8
    alone = AdaptiveDataLoader(Numbers(20), 2)
    loader.load_state_dict(alone.state_dict())
    assert loader.batch_size == 4
