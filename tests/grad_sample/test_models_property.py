"""Random small models (layers, shapes, ties, reuse, freezing, raw parameters, checkpointing)
against one backward pass per sample."""

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.grad_sample.same_forward import exact

WIDTH = st.sampled_from([2, 4, 6])
LAYERS = ("linear", "norm", "rms", "table", "attention", "gru", "cell", "conv", "repeat", "dropout")
RAW = ("scale", "positions", "token", "tied", "functional", "bias in place")


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Drawn(nn.Module):
    """Layers of the given kinds in turn over [N, T, width]; raw parameters are the model's own."""

    def __init__(self, kinds, width, length, checkpointed):
        super().__init__()
        self.kinds, self.checkpointed, self.width = kinds, checkpointed, width
        self.parts, self.raw = nn.ModuleList(), nn.ParameterList()
        for kind in kinds:
            part, raw = self._make(kind, width, length)
            self.parts.append(part)
            self.raw.append(nn.Parameter(0.5 * torch.randn(raw)))
        self.head = nn.Linear(width, 2)

    @staticmethod
    def _make(kind, width, length):
        parts = {
            "linear": lambda: nn.Linear(width, width),
            "norm": lambda: nn.LayerNorm(width),
            "rms": lambda: RMSNorm(width),
            "table": lambda: nn.Embedding(length + 9, width),
            "attention": lambda: nn.MultiheadAttention(width, 2, dropout=0.2, batch_first=True),
            "gru": lambda: nn.GRU(width, width, batch_first=True),
            "cell": lambda: nn.GRUCell(width, width),
            "conv": lambda: nn.Conv1d(width, width, 3, padding=1),
            "dropout": lambda: nn.Dropout(0.3),
            "repeat": lambda: nn.Linear(width, width, bias=False),
        }
        raw = {"scale": (width,), "positions": (length + 9, width), "token": (1, 1, width),
               "functional": (width, width), "bias in place": (width,)}
        return parts.get(kind, nn.Identity)(), raw.get(kind, ())

    def forward(self, x):
        for kind, part, raw in zip(self.kinds, self.parts, self.raw, strict=True):
            x = torch.tanh(self._run(kind, part, raw, x))
        return self.head(x)

    def _run(self, kind, part, raw, x):
        if kind == "attention":
            call = lambda y: part(y, y, y, need_weights=False)[0]  # noqa: E731
            return x + (checkpoint(call, x, use_reentrant=False) if self.checkpointed else call(x))
        if kind == "cell":
            state = x.new_zeros(len(x), self.width)
            for step in x.unbind(1):
                state = part(step, state)
            return x + state[:, None]
        if kind == "bias in place":
            x = x.clone()
            x += raw
            return x
        runs = {
            "scale": lambda: x * raw,
            "positions": lambda: x + raw[: x.shape[1]],
            "table": lambda: x + part(torch.arange(x.shape[1])),
            "gru": lambda: part(x)[0],
            "conv": lambda: part(x.mT).mT,
            "token": lambda: torch.cat([raw.expand(len(x), -1, -1), x], 1),
            "repeat": lambda: part(torch.tanh(part(x))),
            "tied": lambda: x @ self.head.weight.T @ self.head.weight,
            "functional": lambda: nn.functional.linear(x, raw),
        }
        if kind in runs:
            return runs[kind]()
        return checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(LAYERS + RAW), min_size=1, max_size=5),
    width=WIDTH,
    samples=st.integers(2, 5),
    length=st.integers(1, 6),
    frozen=st.sets(st.integers(0, 30), max_size=3),
    measured=st.sampled_from([None, 1, 2]),
    checkpointed=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(kinds=["conv"], width=2, samples=2, length=1, frozen=set(), measured=None,
         checkpointed=False, seed=0)
def test_norms(kinds, width, samples, length, frozen, measured, checkpointed, seed):
    torch.manual_seed(seed)
    model = Drawn(kinds, width, length, checkpointed)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index not in frozen)
    assume(any(parameter.requires_grad for parameter in model.parameters()))
    exact(model, torch.randn(samples, length, width), samples=measured, rtol=1e-8)
