"""Modules with parameters that return a single number for the batch, such as losses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import agrees, measure

WIDTH, CLASSES = 5, 3


class Loss(nn.Module):
    """Counts its calls, in Python and in a buffer that its value depends on."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.reduction, self.calls = reduction, 0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, hidden, labels):
        self.calls += 1
        self.scale.mul_(2)
        values = self.values(hidden, labels) * self.scale
        return values if self.reduction == "none" else getattr(values, self.reduction)()


class Centres(Loss):
    def values(self, hidden, labels):
        return (hidden - self.weight[labels]).square().sum(1)


class Margin(Loss):
    """ArcFace, without the angle."""

    def values(self, hidden, labels):
        cosines = F.linear(F.normalize(hidden), F.normalize(self.weight))
        return F.cross_entropy(4 * cosines - F.one_hot(labels, CLASSES), labels, reduction="none")


class Distances(Loss):
    def values(self, hidden, labels):
        return F.cross_entropy(-torch.cdist(hidden, self.weight), labels, reduction="none")


class InDict(Centres):
    def forward(self, hidden, labels):
        return {"accuracy": 1.0, "loss": super().forward(hidden, labels)}


class Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, WIDTH), head

    def forward(self, batch):
        output = self.head(torch.tanh(self.body(batch[0])), batch[1])
        return output["loss"] if isinstance(output, dict) else output


def make_batch(samples=8):
    return torch.randn(samples, 4), torch.randint(CLASSES, (samples,))


def loss_fn(model, batch):
    """What stands for per-sample losses in both: the mean of one sample, or that of all."""
    return model(batch)[None]


@pytest.mark.parametrize("head", [Centres, Margin, Distances, InDict])
@pytest.mark.parametrize("options", [
    {}, {"samples": 3}, {"statistics": ["inner_products"]}, {"statistics": ["second_moment"]}],
    ids=str)
def test_a_loss_with_parameters_is_measured_in_its_operations(head, options):
    model = Net(head())
    hooks = GradSampleHooks(model, **options)
    for samples in (8, 5, 8):
        batch = make_batch(samples)
        grads = oracle.per_sample_grads(model, loss_fn, batch)  # copies are without hooks
        model.zero_grad()
        model(batch).backward()
        agrees(hooks.collect(), grads)
    assert model.head.calls == 3
    assert float(model.head.scale) == 2**3


@pytest.mark.parametrize("head", [Centres, Margin])
def test_a_summed_loss(head):
    model, batch = Net(head("sum")), make_batch()
    grads = oracle.per_sample_grads(model, loss_fn, batch)
    agrees(measure(model, batch, loss_fn, loss_reduction="sum"), grads)


class Weighed(nn.Module):
    """Learned weights of two losses: of their means, or of each sample's."""

    def __init__(self, samples):
        super().__init__()
        torch.manual_seed(0)
        self.samples, self.body, self.weigh = samples, nn.Linear(4, 4), Weights()

    def forward(self, batch):
        outputs = self.body(batch[0])
        reduction = "none" if self.samples else "mean"
        squares = outputs[:, 3].square()
        return self.weigh(F.cross_entropy(outputs[:, :3], batch[1], reduction=reduction),
                          squares if self.samples else squares.mean())


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.logs = nn.Parameter(torch.rand(2))

    def forward(self, first, second):
        return (-self.logs[0]).exp() * first + (-self.logs[1]).exp() * second + self.logs.sum()


def test_what_meets_no_samples_is_refused_and_both_fixes_work():
    wrong, right, batch = Weighed(samples=False), Weighed(samples=True), make_batch()
    with pytest.raises(RuntimeError, match=r"weigh returns a single number .*weigh\.logs meets .*"
                                           r"value for each sample.*ignore=\['weigh'\]"):
        measure(wrong, batch, loss_fn)
    grads = oracle.per_sample_grads(right, lambda model, batch: model(batch), batch)
    agrees(measure(right, batch, lambda model, batch: model(batch)), grads)
    for ignore in (["weigh"], ["weigh.logs"]):
        left = {name: grad for name, grad in grads.items() if name != "weigh.logs"}
        agrees(measure(wrong, batch, loss_fn, ignore=ignore), left)


def test_a_loss_outside_of_the_models_forward_is_refused_and_the_fix_works():
    model, batch = Net(Centres()), make_batch()
    grads = oracle.per_sample_grads(model, loss_fn, batch)

    def outside(model, batch):
        return model.head(torch.tanh(model.body(batch[0])), batch[1])[None]

    with pytest.raises(RuntimeError, match=r"head returns a single number .* own forward"):
        measure(model, batch, outside)
    model.head.scale.fill_(1)
    agrees(measure(model, batch, loss_fn), grads)
