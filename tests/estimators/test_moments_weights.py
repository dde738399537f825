"""Samples of unequal weight: a mean over all tokens of a padded batch. Expected values are closed
forms of the oracle's per-sample gradients."""

import pytest
import torch
from torch import nn

from adabatch import GradientMoments, GradSampleHooks
from tests import oracle
from tests.grad_sample.measuring import backward, close, make_batch, make_mlp


class Tokens(nn.Module):
    """Predicts the next of 7 tokens at each position; the head is tied to the table."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = (
            nn.Embedding(7, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 7, bias=False),
        )
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.table(ids))))


def token_losses(model, batch):
    """Losses [N, T], zero at the padding."""
    ids, targets = batch
    return nn.functional.cross_entropy(
        model(ids).transpose(1, 2), targets, reduction="none", ignore_index=-100
    )


def sample_means(model, batch):
    """Each sample's mean over its own tokens, as the oracle takes it."""
    return token_losses(model, batch).sum(1) / (batch[1] != -100).sum(1).clamp(min=1)


def token_mean(model, batch):
    return token_losses(model, batch).sum() / (batch[1] != -100).sum()


def padded(lengths, positions=6):
    """(ids, targets) [N, T] with -100 behind each sample's end."""
    ids, targets = (
        torch.randint(7, (len(lengths), positions)),
        torch.randint(7, (len(lengths), positions)),
    )
    targets[torch.arange(positions) >= torch.tensor(lengths).unsqueeze(1)] = -100
    return ids, targets


def flat(grads):
    return torch.cat([rows.flatten(1) for rows in grads.values()], 1)


def expected_terms(grads, shares):
    """‖z_i − w_i g‖² with z_i = w_i g_i, w_i = m a_i and g = Σ a_i g_i, from the gradients of the
    samples' own means; and g itself."""
    rows, m = flat(grads), len(shares)
    mean = shares @ rows
    return (m * shares.unsqueeze(1) * (rows - mean)).square().sum(1), mean


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize(
    "lengths", [[6, 1, 3, 5, 2, 2, 4], [6, 0, 3, 5, 2, 2, 1], [3] * 7], ids=str
)
def test_token_means_of_padded_batches(lengths, samples):
    torch.manual_seed(0)
    model, batch, m = Tokens(), padded(lengths), 7
    grads = oracle.per_sample_grads(model, sample_means, batch)
    shares = torch.tensor(lengths, dtype=torch.float64) / sum(lengths)
    terms, mean = expected_terms(grads, shares)
    hooks = GradSampleHooks(model, statistics=["inner_products"], samples=samples)
    token_mean(model, batch).backward()
    moments = hooks.collect(weights=(batch[1] != -100).sum(1))
    rows = torch.arange(m) if moments.indices is None else moments.indices
    close(moments.weights, m * shares[rows], 1e-12)
    close(moments.grad_sq_norm, float(mean @ mean), 1e-5)
    close(moments.centred_sq_norms, terms[rows], 1e-5)
    close(moments.variance_trace, m / (m - 1) * float(terms[rows].mean()), 1e-5)
    close(
        moments.true_grad_sq_norm,
        float(mean @ mean) - m / (m - 1) * float(terms[rows].mean()) / m,
        1e-4,
    )
    shared = ((m - 1) ** 2 + len(rows) - 1) / (m * (m - 2))  # all terms share one mean
    close(
        moments.std_error,
        m / (m - 1) * float(terms[rows].std()) * (shared / len(rows)) ** 0.5,
        1e-4,
    )


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 6, 3)], ids=str)
def test_accumulated_passes_have_one_token_mean_each(sizes, samples):
    torch.manual_seed(0)
    m, k = sum(sizes), len(sizes)
    lengths = torch.randint(1, 7, (m,))
    model, batch = Tokens(), padded(lengths.tolist())
    grads = oracle.per_sample_grads(model, sample_means, batch)
    shares = torch.cat([part.double() / part.sum() / k for part in lengths.split(sizes)])
    terms, mean = expected_terms(grads, shares)
    hooks = GradSampleHooks(model, statistics=["inner_products"], samples=samples, accumulate=k)
    for part in zip(*(tensor.split(sizes) for tensor in batch), strict=True):
        (token_mean(model, part) / k).backward()
    moments = hooks.collect(weights=lengths)
    close(moments.grad_sq_norm, float(mean @ mean), 1e-5)
    if samples is None:
        close(moments.centred_sq_norms, terms, 1e-5)
        close(moments.variance_trace, m / (m - 1) * float(terms.mean()), 1e-5)
        return
    rows, trace = moments.indices.split([min(samples, size) for size in sizes]), 0.0
    for size, picked in zip(
        sizes, rows, strict=True
    ):  # each pass's measured mean stands for all of its samples
        trace += size / m * float(terms[picked].mean())
    close(moments.variance_trace, m / (m - 1) * trace, 1e-5)


def test_equal_weights_are_no_weights():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(
        model, statistics=["inner_products", "second_moment"], per_parameter=True
    )
    both = []
    for weights in (None, torch.full((8,), 13.0)):
        model.zero_grad()
        backward(model, batch)
        both.append(hooks.collect(weights=weights))
    close(both[0].variance_trace, both[1].variance_trace, 1e-6)
    close(both[0].sq_norms, both[1].sq_norms, 1e-6)
    for name in both[0].by_parameter:
        close(both[0].by_parameter[name], both[1].by_parameter[name], 1e-6)
        close(both[0].second_moment[name], both[1].second_moment[name], 1e-6)


def test_lengths_are_not_taken_for_noise():
    """The trace is that of the gradient over fresh batches, m·tr Cov(g); taking z_i for g_i would
    add about CV²(length)·‖g‖²."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((4,), 2.0, dtype=torch.float64)
    gradients, traces, plain = [], [], []
    for _ in range(3000):
        lengths = torch.randint(1, 12, (32,), generator=generator).double()
        grads = mean + torch.randn(
            32, 4, generator=generator, dtype=torch.float64
        ) / lengths.sqrt().unsqueeze(1)
        weights = 32 * lengths / lengths.sum()
        z = weights.unsqueeze(1) * grads
        g = z.mean(0)
        moments = GradientMoments(
            32, z.square().sum(1), float(g @ g), inner_products=z @ g, weights=weights
        )
        gradients.append(g)
        traces.append(moments.variance_trace)
        plain.append(GradientMoments(32, moments.sq_norms, moments.grad_sq_norm).variance_trace)
    truth = 32 * float(torch.stack(gradients).var(0).sum())
    trace, wrong = sum(traces) / 3000, sum(plain) / 3000
    assert trace == pytest.approx(truth, rel=0.06)
    variation = float(torch.arange(1, 12).double().var(correction=0) / 6**2)
    assert wrong - trace == pytest.approx(variation * 16, rel=0.1)
    assert wrong > 5 * truth


def test_weights_without_inner_products_raise():
    model, batch = make_mlp(), make_batch()
    hooks = GradSampleHooks(model)
    backward(model, batch)
    with pytest.raises(
        ValueError, match=r"samples of unequal weight needs the inner products.*inner_products"
    ):
        hooks.collect(weights=torch.ones(8))
    with pytest.raises(ValueError, match="inner_products"):
        GradientMoments(2, torch.ones(2), 1.0, weights=torch.ones(2))
    model.zero_grad()
    backward(model, batch)  # what was refused is forgotten
    assert hooks.collect().batch_size == 8


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(7), r"one number for each of the 8 samples of the step, got the shape \(7,\)"),
        (torch.ones(8, 1), r"got the shape \(8, 1\)"),
        (
            [1.0] * 7 + [float("nan")],
            "finite numbers >= 0 with a positive sum in each backward pass",
        ),
        ([1.0] * 7 + [-1.0], "finite numbers >= 0"),
        ([0] * 8, "positive sum"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    model = make_mlp()
    hooks = GradSampleHooks(model, statistics=["inner_products"])
    backward(model, make_batch())
    with pytest.raises(ValueError, match=message):
        hooks.collect(weights=weights)


def test_a_summed_loss_has_no_weights():
    model = make_mlp()
    hooks = GradSampleHooks(model, statistics=["inner_products"], loss_reduction="sum")
    backward(model, make_batch(), loss_reduction="sum")
    with pytest.raises(ValueError, match=r"Under loss_reduction='sum'.*omit weights"):
        hooks.collect(weights=torch.ones(8))
