"""Batch norm on a single sample fails with an error that says what to do, and that helps."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adabatch

MODELS = {
    "1d": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "pooled": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)),
    "no-statistics": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False),
        nn.Linear(6, 2)),
}


def trained(model, n, micro_batches=None, **options):
    data = TensorDataset(torch.randn(n, 4), torch.randint(0, 2, (n,)))
    optimizer, loader, scheduler = adabatch.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(data, 4, **options),
        batch_sizes=(4, 4), micro_batches=micro_batches)
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    return loader


@pytest.mark.filterwarnings("ignore:.*batch normalization in train mode")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_error_names_the_cure_and_the_cure_helps(build, workers):
    with pytest.raises(ValueError, match=r"batch norm \(\d\).*drop_last=True.*at least 2"):
        trained(build(), 13, num_workers=workers)
    trained(build(), 13, num_workers=workers, drop_last=True)
    trained(build(), 14, num_workers=workers)
    for size, n in ((1, 16), (2, 15)):
        with pytest.raises(ValueError, match=r"batch norm \(\d\).*micro-batch.*3 samples or more"):
            trained(build(), n, size, num_workers=workers)
    trained(build(), 15, 3, num_workers=workers)


@pytest.mark.filterwarnings("ignore:.*batch normalization in train mode")
def test_what_needs_no_second_sample_is_left_alone():
    convolutional = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(),
        nn.Linear(12, 2))
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[1].eval()
    for each in (convolutional, model):
        loader = trained(each, 13)
        assert not any(layer._forward_pre_hooks for layer in each
                       if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)))
    reference = weakref.ref(model)
    del each, model
    gc.collect()
    assert loader is not None
    assert reference() is None
