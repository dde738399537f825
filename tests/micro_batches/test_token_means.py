"""Micro-batches of a mean over tokens are refused, and those of a mean over samples are not."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss
from torch.utils.data import DataLoader, TensorDataset, default_collate

import adabatch

T, CLASSES = 10, 20


def sample_means(logits, labels):
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view(labels.shape).sum(1) / (labels != -100).sum(1)).mean()


def flat(logits, labels):
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


LOSSES = {
    "flat": flat,
    "channels-first": lambda logits, labels: cross_entropy(logits.transpose(1, 2), labels),
    "nll": lambda logits, labels: nll_loss(
        log_softmax(logits, -1).flatten(0, 1), labels.flatten()),
    "within-a-sum": lambda logits, labels: 0.5 * flat(logits, labels) + logits.square().mean(),
    "smoothed": lambda logits, labels: cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1),
    "other-index": lambda logits, labels: cross_entropy(
        logits.flatten(0, 1), labels.clamp(min=0).flatten(), ignore_index=0),
}


def data(lengths):
    torch.manual_seed(0)
    ids = torch.randint(1, CLASSES, (32, T))
    used = torch.arange(T) < lengths[:, None]
    return ids, torch.where(used, ids.roll(-1, 1), -100)


def gradients(loss_of, labels, size, *, workers=0, collate_fn=None, autocast=False):
    """(of the first batch in micro-batches, of the whole batch)."""
    ids, labels = labels
    torch.manual_seed(1)
    net = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES))
    whole = copy.deepcopy(net)
    loader = DataLoader(TensorDataset(ids, labels), 32, num_workers=workers, collate_fn=collate_fn)
    optimizer, loader, scheduler = adabatch.wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.0), loader, batch_sizes=(32, 32),
        micro_batches=size)
    for batch in loader:
        x, y = batch.values() if isinstance(batch, UserDict) else batch
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(net(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    loss_of(whole(ids), labels).backward()
    return tuple(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (net, whole))


@pytest.mark.parametrize("options", [
    {}, {"workers": 1}, {"autocast": True},
    {"collate_fn": lambda rows: UserDict(zip("xy", default_collate(rows), strict=True))}],
    ids=["plain", "workers", "autocast", "mapping"])
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_a_mean_over_tokens_is_refused_and_its_cure_is_exact(loss_of, options):
    if loss_of is LOSSES["other-index"]:
        ids, labels = data(torch.arange(32) % T + 1)
        labels = ids, labels.clamp(min=0)
    else:
        labels = data(torch.arange(32) % T + 1)
    with pytest.raises(RuntimeError, match=r"ignored labels .* for each sample.*mean of each"):
        gradients(loss_of, labels, 8, **options)
    if not options:
        mine, whole = gradients(sample_means, data(torch.arange(32) % T + 1), 8)
        assert torch.allclose(mine, whole, atol=1e-6)
        mine, whole = gradients(loss_of, labels, None)
        assert torch.allclose(mine, whole, atol=1e-6)


@pytest.mark.parametrize("used", [T, 4])
@pytest.mark.parametrize("size", [8, 5])
def test_as_many_tokens_in_each_sample_are_exact(used, size):
    mine, whole = gradients(flat, data(torch.full((32,), used)), size)
    assert torch.allclose(mine, whole, atol=1e-6)


def test_weights_of_classes_are_refused_with_the_cure():
    weight = torch.rand(CLASSES)

    def weighted(logits, labels, reduction="mean"):
        losses = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), weight=weight, reduction=reduction)
        return losses.mean()

    labels = data(torch.full((32,), T))
    with pytest.raises(RuntimeError, match=r"weights of classes.*reduction='none'"):
        gradients(weighted, labels, 8)
    mine, whole = gradients(lambda x, y: weighted(x, y, "none"), labels, 8)
    assert torch.allclose(mine, whole, atol=1e-6)
