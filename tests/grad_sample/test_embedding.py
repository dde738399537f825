"""nn.EmbeddingBag: bags as rows, and one after the other in flat ids with offsets."""

import pytest
import torch
from torch import nn

import adabatch
from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, measure

V, D, LONGEST = 7, 3, 4


class Text(nn.Module):
    """A bag of words, and a layer after it."""

    def __init__(self, flat=True, use="layer", **options):
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.head = nn.EmbeddingBag(V, D, **options), nn.Linear(D, 2)
        self.flat, self.use = flat, use
        self.scale = nn.Parameter(torch.rand(D)) if use == "scaled" else None
        self.weights = nn.Parameter(torch.rand(V)) if use == "learned weights" else None

    def forward(self, ids, offsets=None, weights=None):
        if self.use == "functional":
            hidden = nn.functional.embedding_bag(ids, self.bag.weight, offsets)
        else:
            weights = weights if self.weights is None else self.weights[ids]
            hidden = self.bag(ids, offsets, per_sample_weights=weights)
        return self.head(torch.tanh(hidden if self.scale is None else hidden * self.scale))


def losses(model, batch):
    """Of a batch of ids [N, LONGEST], the bags' lengths [N] and weights [N, LONGEST]."""
    ids, lengths, weights = batch
    if model.bag.mode != "sum":
        weights = None
    if model.flat:
        inside = torch.arange(LONGEST) < lengths[:, None]
        weights = None if weights is None else weights[inside]
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        return model(ids[inside], offsets if model.bag.include_last_offset else offsets[:-1],
                     weights).square().sum(1)
    return model(ids, None, weights).square().sum(1)


def make_batch(lengths=(3, 1, 4, 0, 2)):
    torch.manual_seed(1)
    return (torch.randint(V, (len(lengths), LONGEST)), torch.tensor(lengths),
            torch.randn(len(lengths), LONGEST))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [
    {}, {"include_last_offset": True}, {"padding_idx": 2}, {"flat": False},
    {"flat": False, "padding_idx": 0}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("samples", [None, 2])
def test_bags_are_exact(mode, options, samples):
    model, batch = Text(mode=mode, **options), make_batch()
    if "max_norm" in options:
        losses(model, batch)  # shrinks the table
    grads = oracle.per_sample_grads(model, losses, batch)
    for statistics in ([], ["second_moment"], ["inner_products"]):
        model.zero_grad()
        agrees(measure(model, batch, losses, samples=samples, statistics=statistics), grads)
    for parameter, grad in zip(model.parameters(), grads.values(), strict=True):
        torch.testing.assert_close(parameter.grad, grad.mean(0).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", [(4, 4), (0, 0, 0), (1,), (4, 0)], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_few_and_empty_bags(lengths, mode):
    model, batch = Text(mode=mode), make_batch(lengths)
    grads = oracle.per_sample_grads(model, losses, batch)
    torch.testing.assert_close(measure(model, batch, losses).sq_norms.double(),
                               oracle.sq_norms(grads), rtol=1e-5, atol=1e-6)


def test_ties_of_the_maximum_go_where_torch_sends_them():
    model, batch = Text(mode="max"), make_batch()
    nn.init.zeros_(model.bag.weight)
    agrees(measure(model, batch, losses), oracle.per_sample_grads(model, losses, batch))


def test_a_bag_that_is_used_twice_adds_up_before_it_is_squared():
    model, batch = Text(), make_batch()

    def twice(model, batch):
        return losses(model, batch) * losses(model, (batch[0].flip(1), *batch[1:]))

    agrees(measure(model, batch, twice), oracle.per_sample_grads(model, twice, batch))


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_bags_without_exact_gradients_are_refused_with_a_fix(option):
    model, batch = Text(**{option: True}), make_batch()
    with pytest.raises(ValueError, match=rf"EmbeddingBag \(bag\): {option}=True.* = False"):
        GradSampleHooks(model)
    setattr(model.bag, option, False)
    agrees(measure(model, batch, losses), oracle.per_sample_grads(model, losses, batch))


@pytest.mark.parametrize("options", [{}, {"include_last_offset": True}, {"use": "scaled"}], ids=str)
def test_check_says_the_same_and_its_layout_serves_what_is_traced_beside(options):
    model, batch = Text(**options), make_batch((3, 1, 4, 2, 2))
    report = adabatch.check(model, batch, losses, verbose=False)
    assert report.ok
    assert report["bag"].error < 1e-5
    assert report["bag"].status == "exact"
    grads = oracle.per_sample_grads(model, losses, batch)
    agrees(measure(model, batch, losses, layout=report), grads)


@pytest.mark.parametrize(
    ("use", "name"), [("functional", "bag.weight"), ("learned weights", "bag")])
def test_what_cannot_be_exact_is_refused_by_name(use, name):
    model, batch = Text(use=use, mode="sum"), make_batch((3, 1, 4, 2, 2))
    report = adabatch.check(model, batch, losses, verbose=False)
    assert not report.ok
    with pytest.raises(RuntimeError, match=rf"{name} .*ignore=\[...\]"):
        measure(model, batch, losses, layout=report)
    grads = oracle.per_sample_grads(model, losses, batch)
    left = {"head.weight", "head.bias"}
    model.zero_grad()
    moments = measure(model, batch, losses, ignore=["bag", "weights"][: 1 + (use != "functional")])
    agrees(moments, {name: grads[name] for name in left})


@pytest.mark.parametrize("samples", [3, 8, 20])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"mode": "sum"}], ids=str)
def test_check_cuts_flat_batches_where_their_samples_end(samples, options):
    model, lengths = Text(**options), torch.randint(1, LONGEST, (samples,))
    flat = (torch.randint(V, (int(lengths.sum()),)), lengths.cumsum(0) - lengths,
            torch.arange(samples) % 2)

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    report = adabatch.check(model, flat, loss_fn, verbose=False)
    assert [row.status for row in report.rows] == ["exact", "exact"]
    assert str(report.batch_size_source) == "offsets.shape[0]"
