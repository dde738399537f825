"""What mixes samples is refused by check, or called a contribution, in every form we know; what
does not is exact."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adabatch

N, D = 7, 4


class Model(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.p = nn.Parameter(torch.ones(D))
        self.register_buffer("table", torch.randn(N, D))
        self.case = forward

    def forward(self, x):
        return self.case(self, x)


def by_length(x):
    return x[:, 0].argsort()


def plain(m, x):
    return m.b(m.a(x).tanh())


def squares(out):
    return out.flatten(1).square().mean(1)


def contrastive(out):
    out = F.normalize(out, dim=1)
    return F.cross_entropy(out @ out.roll(1, 1).T, torch.arange(len(out)), reduction="none")


LAYERS = {
    "two calls in different orders": lambda m, x: m.a(x) - m.a(
        x[by_length(x)] ** 2)[by_length(x).argsort()],
    "sorted between layers": lambda m, x: m.c(m.b(
        m.a(x).tanh()[by_length(x)]).tanh()[by_length(x).argsort()]),
    "each column sorted": lambda m, x: m.b(m.a(x).sort(0).values),
    "flipped": lambda m, x: m.b(m.a(x).flip(0)).flip(0),
    "the row above": lambda m, x: m.b(m.a(x)).tanh() + m.c(m.a(x).roll(1, 0)),
    "deep set": lambda m, x: m.b(m.a(x) + m.c(x).mean(0)),
    "graph convolution": lambda m, x: m.b((x @ x.T).softmax(1) @ m.a(x)),
    "attention over the batch": lambda m, x: m.c(F.scaled_dot_product_attention(
        m.a(x)[None], m.b(x)[None], x[None])[0]),
    "running sum": lambda m, x: m.a(x).cumsum(0) * m.p,
    "standardized": lambda m, x: m.b((m.a(x) - m.a(x).mean(0)) / m.a(x).std(0)),
    "standardized by constants": lambda m, x: m.b(m.a(x) - m.a(x).mean(0).detach()),
    "softmax over the batch": lambda m, x: m.b(m.a(x).softmax(0)),
    "functional batch norm": lambda m, x: m.b(F.batch_norm(m.a(x), None, None, training=True)),
    "mixup": lambda m, x: m.b(m.a(x) + 0.5 * m.a(x)[by_length(x)]),
}
LOSSES = {
    "contrastive": contrastive,
    "hardest triplet": lambda out: torch.cdist(out, out).max(1).values,
    "the larger half": lambda out: squares(out) * (squares(out) >= squares(out).median()),
    "above the mean": lambda out: squares(out) * (squares(out) >= squares(out).mean()),
    "all but the largest": lambda out: squares(out) * (squares(out) < squares(out).max()),
    "a baseline": lambda out: squares(out) * (squares(out) - squares(out).mean()).detach(),
    "reordered": lambda out: squares(out.flip(0)),
    "the mean for each": lambda out: squares(out).mean().expand(len(out)),
    "weights over the batch": lambda out: squares(out) * squares(out).softmax(0),
    "a covariance": lambda out: squares(out) + out.T.cov().square().sum(),
}
RIGHT = {
    "plain": plain,
    "dropout": lambda m, x: m.b(F.dropout(m.a(x), 0.5)),
    "noise": lambda m, x: m.b(m.a(x) + torch.randn_like(x)),
    "a table as long as the batch": lambda m, x: m.a(x) @ m.b(m.table).T,
    "the order is looked at": lambda m, x: m.b(m.a(x).tanh()) + 0 * by_length(x).sum(),
}


def checked(model, loss, n_samples=N):
    torch.manual_seed(1)
    return adabatch.check(model, torch.randn(n_samples, D), lambda model, x: loss(model(x)),
                          verbose=False)


@pytest.mark.parametrize("forward", LAYERS.values(), ids=LAYERS)
def test_layers_that_mix_samples(forward):
    report = checked(Model(forward), squares)
    assert any(row.status != "exact" for row in report.rows)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_that_mix_samples(loss):
    report = checked(Model(plain), loss)
    assert all(row.status != "exact" for row in report.rows if row.name in "ab" and row.name)


def test_a_larger_batch_is_refused_with_the_cause():
    with pytest.raises(ValueError, match="depend on the other samples of the batch"):
        checked(Model(plain), contrastive, n_samples=20)


@pytest.mark.parametrize("n_samples", [N, 20])
@pytest.mark.parametrize("forward", RIGHT.values(), ids=RIGHT)
def test_what_does_not_mix_is_exact(forward, n_samples):
    report = checked(Model(forward), squares, n_samples)
    assert report.ok, str(report)
    assert {row.status for row in report.rows} == {"exact"}
