"""Small models for check(), each with a batch and per-sample losses; sizes differ unless a test
needs them equal."""

import torch
from torch import nn
from torch.nn import functional as F

T, D = 3, 4


class Stack(nn.Module):
    """Linear and LayerNorm on inputs brought into a layout, and back."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.first, self.norm, self.last = (
            layout,
            nn.Linear(D, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 2),
        )

    def forward(self, inputs):
        """inputs [N, T, D], or [T, N, D] for batch_second."""
        samples, positions = inputs.shape[:2]
        if self.layout == "flat_batch_major":
            inputs = inputs.flatten(0, 1)
        elif self.layout == "flat_time_major":
            inputs = inputs.transpose(0, 1).flatten(0, 1)
        outputs = self.last(F.relu(self.norm(self.first(inputs)), inplace=True))
        if self.layout == "flat_batch_major":
            return outputs.view(samples, positions, -1)
        if self.layout == "flat_time_major":
            return outputs.view(positions, samples, -1).transpose(0, 1)
        return outputs.transpose(0, 1) if self.layout == "batch_second" else outputs


class ClassToken(Stack):
    """Only the first position reaches the loss: all other rows of the last layers are dead."""

    def forward(self, inputs):
        return super().forward(inputs)[:, :1]


class Positions(nn.Module):
    """A position embedding looked up once for all samples, perhaps with a leading dimension."""

    def __init__(self, leading, positions=T):
        super().__init__()
        self.leading, self.table, self.last = leading, nn.Embedding(positions, D), nn.Linear(D, 2)

    def forward(self, inputs):
        ids = torch.arange(inputs.shape[1])
        return self.last(torch.tanh(inputs + self.table(ids[None] if self.leading else ids)))


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first, hidden_only=False):
        super().__init__()
        self.rnn, self.head, self.hidden_only = (
            kind(D, 5, batch_first=batch_first),
            nn.Linear(5, 2),
            hidden_only,
        )

    def forward(self, inputs):
        outputs, hidden = self.rnn(inputs)
        if self.hidden_only:
            return self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])[:, None]
        return self.head(outputs if self.rnn.batch_first else outputs.transpose(0, 1))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(D, 2, batch_first=batch_first, dropout=0.2),
            nn.Linear(D, 2),
        )

    def forward(self, inputs):
        outputs = self.head(self.attention(inputs, inputs, inputs)[0])
        return outputs if self.attention.batch_first else outputs.transpose(0, 1)


def square_loss(model, inputs):
    """Per-sample losses [N] of outputs [N, ...]."""
    return model(inputs).square().flatten(1).sum(1)


def inputs_for(layout, samples, positions=T):
    """Random inputs, time first where the layout is."""
    return (
        torch.randn(positions, samples, D)
        if layout == "batch_second"
        else torch.randn(samples, positions, D)
    )


def network():
    """Two Linear layers."""
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))
