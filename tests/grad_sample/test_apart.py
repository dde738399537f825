"""Layers without a rule whose operations mix samples are never traced: they are refused, or run
again where single samples show that they do not mix after all; those that keep them apart run
once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adabatch import GradSampleHooks
from adabatch.grad_sample.functional import traced_op
from adabatch.grad_sample.layers import generic
from tests import oracle
from tests.grad_sample.measuring import close
from tests.grad_sample.same_forward import outputs_loss

T, D = 3, 4

MIXING = {
    "cumsum": lambda m, x: x.cumsum(0),
    "softmax": lambda m, x: x.softmax(0),
    "functional softmax": lambda m, x: F.softmax(x, dim=-x.dim()),
    "softmax without dim": lambda m, x: torch.softmax(x, 0),
    "sorted": lambda m, x: x.sort(0).values,
    "sorted by keyword": lambda m, x: torch.sort(x, dim=0)[0],
    "turned": lambda m, x: x.flip(0) * 2 + x,
    "turned twice": lambda m, x: x.flip(1, 0) * 2 + x,
    "rolled": lambda m, x: x.roll(1, 0) + x,
    "rolled flat": lambda m, x: x.roll(1) + x,
    "picked": lambda m, x: x[torch.arange(len(x)).flip(0)] + 2 * x,
    "picked by a list": lambda m, x: x[list(range(len(x)))[::-1]] + 2 * x,
    "index_select": lambda m, x: x.index_select(0, torch.arange(len(x)).flip(0)) + 2 * x,
    "centred": lambda m, x: x - x.mean(0, keepdim=True),
    "centred by all": lambda m, x: x - x.mean(),
    "variance": lambda m, x: x / (1 + x.var(0)),
    "variance of all": lambda m, x: x / (1 + torch.var(x, True)),
    "norm": lambda m, x: x / (1 + x.norm(dim=0)),
    "norm of all": lambda m, x: x / (1 + x.norm()),
    "normalized": lambda m, x: F.normalize(x, dim=0) + x,
    "batch norm": lambda m, x: F.batch_norm(
        x.mT, None, None, m.weight, training=True).mT,
    "products of samples": lambda m, x: x + torch.einsum(
        "ntd,mtd->nm", x, x).sum(1)[:, None, None],
    "a square product": lambda m, x: x + (x[:, 0] @ x[:, 0])[:, None] if len(x) == D else (
        x - x.mean(0)),
    "matmul of samples": lambda m, x: (x[:, 0] @ x[:, 0].T).sum(1)[:, None, None] * x,
    "transposed matmul": lambda m, x: x @ (x[:, 0].T @ x[:, 0]),
    "differences": lambda m, x: (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(1) + x,
    "differences summed over the other": lambda m, x: (
        x.unsqueeze(0) - 2 * x.unsqueeze(1)).square().sum(0) + x,
    "distances": lambda m, x: torch.cdist(x[:, 0], x[:, 0]).sum(1)[:, None, None] * x,
    "attention over the samples": lambda m, x: F.scaled_dot_product_attention(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1),
    "shifted": lambda m, x: torch.cat([x[-1:], x[:-1]]) + 2 * x,
    "split": lambda m, x: sum(x.split(1)) + 2 * x,
    "unbound": lambda m, x: sum(x.unbind()) + 2 * x,
    "one for all": lambda m, x: x[0] + 2 * x,
    "one for all by select": lambda m, x: x.select(0, -1) + 2 * x,
    "written": lambda m, x: written(x),
    "in place on a row": lambda m, x: in_place(x),
    "transposed in place": lambda m, x: x.clone().transpose_(0, 1).cumsum(1).transpose(0, 1) + x,
    "flattened and cumulated": lambda m, x: x.reshape(-1, D).cumsum(0).view(x.shape) + x,
    "flattened, centred": lambda m, x: (lambda y: (y - y.mean(0)).view(x.shape))(x.reshape(-1, D)),
    "flattened, transposed": lambda m, x: x + (
        lambda y: (y.T @ y)[None])(x.reshape(-1, D)),
    "layer norm of all": lambda m, x: F.layer_norm(x, x.shape) + x,
    "a branch": lambda m, x: 2 * x if x[0, 0, 0] == x[-1, 0, 0] else 3 * x * x,
    "a number": lambda m, x: x * float(x.detach().square().sum()),
    "a list": lambda m, x: x * sum(x[:, 0, 0].tolist()),
    "convolution over the samples": lambda m, x: F.conv1d(
        x[:, 0].T[None], torch.ones(D, D, 3, dtype=x.dtype), padding=1)[0].T[:, None] + x,
    "interpolated": lambda m, x: F.avg_pool1d(x.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1) + x,
    "maximum": lambda m, x: x + x.max(0).values,
    "maximum of all": lambda m, x: x + x.max(),
    "trilinear": lambda m, x: x + x[:, 0].tril()[:, None],
    "a buffer": lambda m, x: buffered(m, x),
}
APART = {
    "softmax": lambda m, x: x.softmax(-1) + F.log_softmax(x, 1),
    "normalized": lambda m, x: F.normalize(x, dim=-1) + F.layer_norm(x, (D,)) + F.rms_norm(x, (D,)),
    "by hand": lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1).sqrt(),
    "pooled": lambda m, x: x + x.mean(1, keepdim=True) + x.amax((1, 2))[:, None, None],
    "turned": lambda m, x: x.flip(1) + x.roll(1, -1),
    "heads": lambda m, x: F.scaled_dot_product_attention(
        *[x.unflatten(-1, (2, 2)).transpose(1, 2)] * 3).transpose(1, 2).flatten(2),
    "by matmul": lambda m, x: (x @ x.mT).softmax(-1) @ x,
    "by einsum": lambda m, x: torch.einsum("ntd,nsd->nts", x, x) @ x,
    "chunks": lambda m, x: torch.cat([part.tanh() for part in x.chunk(2, -1)], -1),
    "gates": lambda m, x: F.glu(torch.cat([x, x], -1)) + F.gelu(x) * x.sigmoid(),
    "convolution": lambda m, x: F.conv1d(
        x.mT, torch.ones(D, 1, 3, dtype=x.dtype), padding=1, groups=D).mT,
    "flattened": lambda m, x: (x.reshape(-1, D).relu() @ torch.eye(D, dtype=x.dtype)).view(x.shape),
    "stacked": lambda m, x: torch.stack([x, x.tanh()], 1).sum(1),
    "in the middle": lambda m, x: x.permute(1, 0, 2).tanh().permute(1, 0, 2),
    "dtype and shape": lambda m, x: x.to(torch.float64).view(x.size(0), -1).view_as(x) / x.shape[1],
    "unbound": lambda m, x: torch.stack([row.tanh() for row in x.unbind(1)], 1),
}


def written(x):
    result = torch.zeros_like(x)
    result[:-1] = x[1:]
    return result + 2 * x


def in_place(x):
    x = 1 * x
    x[0] *= 2
    return x + x[:1]


def buffered(m, x):
    m.average.copy_(x.detach().mean(0))
    return x - m.average


class Layer(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(T, D))
        self.register_buffer("average", torch.zeros(T, D))
        self.case = case

    def forward(self, x):
        x = x + self.shift
        return self.case(self, x) * self.weight


def made(case, n_samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), Layer(case), nn.Linear(D, 2)).double()
    return model, torch.randn(n_samples, T, D).double()


def is_right(model, batch):
    """Whether it is measured; a RuntimeError where it is refused."""
    grads = oracle.per_sample_grads(model, outputs_loss, (batch,))
    hooks = GradSampleHooks(model)
    for _ in range(2):
        model.zero_grad()
        outputs_loss(model, (batch,)).mean().backward()
        norms = hooks.collect().sq_norms
    close(norms, oracle.sq_norms(grads), 1e-9)


@pytest.mark.parametrize("n_samples", [2, 3, 4, 5])
@pytest.mark.parametrize("case", MIXING.values(), ids=MIXING)
def test_what_mixes_samples_is_refused(case, n_samples):
    model, batch = made(case, n_samples)
    with pytest.raises(RuntimeError):
        is_right(model, batch)


@pytest.mark.parametrize("n_samples", [2, 3, 4, 5])
@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_what_keeps_them_apart_runs_once(case, n_samples, monkeypatch):
    model, batch = made(case, n_samples)
    for module in (traced_op, generic):
        monkeypatch.setattr(module, "per_sample_grads", None)
    is_right(model, batch)
