"""wrap adopts a plain DataLoader: order, workers and options stay, sizes follow the proposals."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import adabatch
from adabatch import AdaptiveDataLoader, ResizableBatchSampler
from tests.scripted import Indexed, Proposals, ones, train_epoch, wrapped

N = len(Indexed())


LOADERS = {
    "plain": {},
    "shuffle": {"shuffle": True},
    "generator": {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "workers": {"shuffle": True, "num_workers": 2, "prefetch_factor": 3},
    "persistent": {"num_workers": 2, "persistent_workers": True, "timeout": 60},
    "sequential": {"sampler": SequentialSampler(range(N))},
    "subset": {"sampler": SubsetRandomSampler(range(N))},
    "random": {"sampler": RandomSampler(range(N))},
    "list": {"sampler": list(reversed(range(N)))},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_every_index_once_an_epoch(options):
    run = wrapped(DataLoader(Indexed(), batch_size=16, **options))
    sizes = set()
    for _ in range(2):
        batches = train_epoch(*run)
        sizes |= {len(batch) for batch in batches[:-1]}
        assert sorted(index for batch in batches for index in batch) == list(range(N))
    assert sizes >= {16, 20, 7, 33, 12}
    assert run[3].samples_seen == 2 * N


def test_the_order_is_kept_or_drawn_again_each_epoch():
    def orders(**options):
        run = wrapped(DataLoader(Indexed(), batch_size=16, **options))
        return [[index for batch in train_epoch(*run) for index in batch] for _ in range(2)]

    assert orders() == [list(range(N))] * 2
    assert orders(sampler=list(reversed(range(N)))) == [list(range(N))[::-1]] * 2
    first, second = orders(shuffle=True, generator=torch.Generator().manual_seed(1))
    assert first != second
    assert orders(shuffle=True, generator=torch.Generator().manual_seed(1)) == [first, second]
    assert orders(shuffle=True, generator=torch.Generator().manual_seed(2))[0] != first


def test_samplers_of_weights_and_subsets_are_kept():
    def weighted():
        return WeightedRandomSampler(
            [0.0] * 120 + [1.0] * 120, 100, generator=torch.Generator().manual_seed(4))

    batches = train_epoch(*wrapped(DataLoader(Indexed(), batch_size=16, sampler=weighted())))
    assert [index for batch in batches for index in batch] == list(weighted())
    subset = SubsetRandomSampler([5, 7, 100, 200] * 10)
    batches = train_epoch(*wrapped(DataLoader(Indexed(), batch_size=4, sampler=subset)))
    assert sorted(index for batch in batches for index in batch) == sorted([5, 7, 100, 200] * 10)


def test_drop_last_holds_for_every_size():
    batches = train_epoch(
        *wrapped(DataLoader(Indexed(), batch_size=16, drop_last=True), Proposals(50)))
    assert [len(batch) for batch in batches] == [16, 50, 50, 50, 50]


def collate(samples):
    indices, inputs, targets = zip(*samples, strict=True)
    return torch.tensor(indices) + 1000, torch.stack(inputs), torch.stack(targets)


def start_worker(worker):
    torch.utils.data.get_worker_info().dataset.inputs[:, 0] = worker


def test_collate_fn_worker_init_fn_and_the_other_options_are_kept():
    loader = DataLoader(
        Indexed(), batch_size=16, collate_fn=collate, num_workers=2, worker_init_fn=start_worker,
        pin_memory=False, timeout=30)
    model, optimizer, adaptive, scheduler = wrapped(loader)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0][:, 0].tolist()))
    batches = train_epoch(model, optimizer, adaptive, scheduler)
    assert sorted(index for batch in batches for index in batch) == [
        index + 1000 for index in range(N)]
    assert set(seen) == {0.0, 1.0}
    for name in (
        "num_workers", "collate_fn", "worker_init_fn", "pin_memory", "timeout", "prefetch_factor",
        "persistent_workers", "generator", "dataset",
    ):
        assert getattr(adaptive, name) is getattr(loader, name), name


def test_pinned_memory_is_requested():
    loader = DataLoader(
        ones(40), batch_size=8, pin_memory=True, multiprocessing_context="fork", num_workers=1)
    _, _, adaptive, _ = wrapped(loader)
    assert adaptive.pin_memory
    assert adaptive.multiprocessing_context == loader.multiprocessing_context


def test_an_adaptive_loader_and_a_resizable_sampler_are_used_as_they_are():
    own = AdaptiveDataLoader(Indexed(), 16, shuffle=True, seed=5)
    assert wrapped(own)[2] is own
    sampler = ResizableBatchSampler(N, 16, shuffle=True, seed=5)
    adopted = wrapped(DataLoader(Indexed(), batch_sampler=sampler))
    assert adopted[2].batch_sampler is sampler
    assert train_epoch(*adopted) == train_epoch(*wrapped(own))


def test_deleting_the_last_reference_ends_the_loader_and_its_workers():
    """In a reference cycle, collecting it would wait ten seconds for persistent workers."""
    gc.disable()
    try:
        model, optimizer, loader, scheduler = wrapped(
            DataLoader(Indexed(), batch_size=16, num_workers=1, persistent_workers=True))
        train_epoch(model, optimizer, loader, scheduler)
        workers = loader._engine._iterator._workers
        gone = weakref.ref(loader)
        del loader, scheduler
        assert gone() is None
        assert not workers[0].is_alive()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))], ids=["copied", "pickled"])
@pytest.mark.parametrize("micro_batches", [None, 4])
def test_a_copy_of_the_loader_is_without_model_and_optimizer(micro_batches, copied):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    data = TensorDataset(torch.arange(93.0).view(31, 3))
    parts = adabatch.wrap(model, SGD(model.parameters(), lr=0.1), DataLoader(data, 8, shuffle=True),
                          batch_sizes=(8, 8), micro_batches=micro_batches)
    other = copied(loader := parts[1])
    assert [rows.tolist() for rows, in other] == [rows.tolist() for rows, in loader]
