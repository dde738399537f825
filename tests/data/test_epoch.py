"""Exactly once, in exactly the sizes requested, exactly resumed: random lengths, workers, sizes."""

from itertools import accumulate, chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from adabatch import AdaptiveDataLoader
from adabatch.data import KeyedPermutation
from tests.data.streams import Counting, Numbers, drawn, through_a_file

CASES = st.fixed_dictionaries(
    {
        "n": st.integers(0, 60),
        "workers": st.sampled_from([0, 0, 0, 1, 2]),
        "prefetch": st.integers(1, 4),
        "sizes": st.lists(st.integers(1, 25), min_size=1, max_size=12),
        "drop_last": st.booleans(),
        "shuffle": st.booleans(),
        "kill": st.integers(0, 12),
        "other_workers": st.sampled_from([0, 0, 1, 2]),
        "collate_in": st.sampled_from(["worker", "consumer"]),
    }
)
RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large]


def expected_sizes(n, sizes, drop_last):
    """Each batch of the size current when it is drawn, the last one what is left."""
    result, at, last = [], 0, sizes[-1]
    for size in chain(sizes, iter(lambda: last, None)):
        if n - at < size:
            return result + ([n - at] if n - at and not drop_last else [])
        result.append(size)
        at += size


def build(dataset, case, workers):
    options = {}
    if workers:
        options = {"num_workers": workers, "timeout": 60, "prefetch_factor": case["prefetch"]}
    options |= {"drop_last": case["drop_last"], "collate_in": case["collate_in"]}
    if isinstance(dataset, Numbers):
        options |= {"shuffle": case["shuffle"], "seed": 5}
    return AdaptiveDataLoader(dataset, case["sizes"][0], **options)


def check_map_style(case):
    n, sizes = case["n"], case["sizes"]
    loader = build(Numbers(n), case, case["workers"])
    batches = drawn(loader, sizes[1:])
    wanted = expected_sizes(n, sizes, case["drop_last"])
    order = KeyedPermutation(n, 5, 0)(slice(None)).tolist() if case["shuffle"] else list(range(n))
    assert [len(batch) for batch in batches] == wanted
    assert list(chain.from_iterable(batches)) == order[: sum(wanted)]
    requested = [*sizes, *[sizes[-1]] * n][: len(wanted)]
    assert list(loader.recent) == list(zip(requested, wanted, strict=True))

    killed = build(Numbers(n), case, case["workers"])
    head = drawn(killed, sizes[1:], stop=min(case["kill"], len(wanted)))
    state = through_a_file(killed.state_dict())
    del killed
    resumed = build(Numbers(n), case, case["other_workers"])
    resumed.load_state_dict(state)
    if case["kill"] < len(wanted):
        rest = [*sizes, *[sizes[-1]] * n][len(head) :]
        resumed.batch_size = rest[0]
        assert resumed.samples_left == n - sum(wanted[: len(head)])
        assert head + drawn(resumed, rest[1:]) == batches


def check_iterable(case):
    n, sizes = case["n"], case["sizes"]
    loader = build(Counting(n), case, case["workers"])
    batches = drawn(loader, sizes[1:])
    assert [len(batch) for batch in batches] == expected_sizes(n, sizes, case["drop_last"])
    seen = list(chain.from_iterable(batches))
    assert len(set(seen)) == len(seen)
    assert case["drop_last"] or sorted(seen) == list(range(n))

    killed = build(Counting(n), case, case["workers"])
    stop = min(case["kill"], len(batches))
    head = drawn(killed, sizes[1:], stop=stop)
    for _ in range(2):  # a run that was resumed is killed again at once
        state = through_a_file(killed.state_dict())
        killed = build(Counting(n), case, case["workers"])
        killed.load_state_dict(state)
    if stop < len(batches):
        rest = [*sizes, *[sizes[-1]] * n][stop:]
        killed.batch_size = rest[0]
        first = drawn(killed, rest[1:], stop=1)
        state = through_a_file(killed.state_dict())
        resumed = build(Counting(n), case, case["workers"])
        resumed.load_state_dict(state)
        more = drawn(resumed, rest[2:]) if len(head + first) < len(batches) else []
        assert head + first + more == batches


@settings(max_examples=100, deadline=None, suppress_health_check=RELAXED)
@given(CASES)
def test_map_style(case):
    check_map_style(case)


@settings(max_examples=100, deadline=None, suppress_health_check=RELAXED)
@given(CASES)
def test_iterable(case):
    check_iterable(case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, deadline=None, suppress_health_check=RELAXED)
@given(CASES)
def test_map_style_at_length(case):
    check_map_style(case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, deadline=None, suppress_health_check=RELAXED)
@given(CASES)
def test_iterable_at_length(case):
    check_iterable(case)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_new_size_holds_on_the_very_next_batch(workers, prefetch):
    sizes = [4, 4, 40, 3, 3, 1, 17, 50, 2, 2, 9]
    options = {"num_workers": workers, "prefetch_factor": prefetch}
    loader = AdaptiveDataLoader(Numbers(sum(sizes)), sizes[0], **options)
    batches = drawn(loader, sizes[1:])
    assert [len(batch) for batch in batches] == sizes
    assert [batch[0] for batch in batches] == [0, *accumulate(sizes[:-1])]


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_broken_off_and_resumed_with_workers(persistent):
    options = {"num_workers": 2, "persistent_workers": persistent}
    loader = AdaptiveDataLoader(Numbers(50), 6, True, seed=2, **options)
    for epoch in range(3):
        order = KeyedPermutation(50, 2, epoch)(slice(None)).tolist()
        loader.batch_size = 6
        head = drawn(loader, [7, 8], stop=3)
        assert list(chain.from_iterable(head)) == order[:21]
        other = AdaptiveDataLoader(Numbers(50), 1, True, num_workers=1)
        other.load_state_dict(loader.state_dict())
        assert list(chain.from_iterable(drawn(other))) == order[21:]
        assert other.state_dict()["sampler"]["epoch"] == epoch + 1


class Epochs(IterableDataset):
    """100·epoch + 0 … 6, whose state holds the epoch and the samples given."""

    def __init__(self):
        self.epoch, self.at = 0, 0

    def __iter__(self):
        while self.at < 7:
            self.at += 1
            yield 100 * self.epoch + self.at - 1
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]


class CountsTheNextOne(Epochs):
    """Its state is right after a sample only: it counts the one on its way as given."""

    def __iter__(self):
        for at in range(self.at, 7):
            self.at = at
            yield 100 * self.epoch + at
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at + 1}


class OwnIterator(Epochs):
    def __iter__(self):
        if self.at == 7:
            self.epoch, self.at = self.epoch + 1, 0
        return self

    def __next__(self):
        if self.at == 7:
            raise StopIteration
        self.at += 1
        return 100 * self.epoch + self.at - 1


class CountsAtTheBeginning(Epochs):
    def __init__(self):
        self.epoch, self.at, self.resumed = -1, 0, False

    def __iter__(self):
        if not self.resumed:
            self.epoch, self.at = self.epoch + 1, 0
        self.resumed = False
        while self.at < 7:
            self.at += 1
            yield 100 * self.epoch + self.at - 1

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.resumed = True


class StatefulIterator(Epochs):
    class Iterator(OwnIterator):
        def __iter__(self):
            return self

    def __iter__(self):
        iterator = self.Iterator()
        iterator.epoch, self.epoch = self.epoch, self.epoch + 1
        return iterator


@pytest.mark.parametrize("options", [
    {}, {"num_workers": 2, "persistent_workers": True}, {"num_workers": 1}], ids=str)
@pytest.mark.parametrize("kind", [
    Epochs, CountsTheNextOne, OwnIterator, CountsAtTheBeginning, StatefulIterator])
def test_an_iterable_data_set_resumes_between_epochs_in_its_own_state(kind, options):
    for size, epochs in ((2, 1), (7, 2), (20, 1)):
        loader = AdaptiveDataLoader(kind(), size, **options)
        for _ in range(epochs):
            drawn(loader)
        state = through_a_file(loader.state_dict())
        resumed = AdaptiveDataLoader(kind(), size, **options)
        resumed.load_state_dict(state)
        assert str(resumed.state_dict()) == str(state)
        assert drawn(loader) == drawn(resumed)
        assert drawn(loader) == drawn(resumed)
