"""The five models of the overhead benchmark, each with one fixed random batch.

Legend: N samples, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model to train for a step.

    Args:
        name: one letter.
        title: for the table.
        make_model: () -> the model.
        make_batch: () -> (inputs, targets), samples first.
        losses: (outputs, targets) -> losses [N]; the step's loss is their mean.
        compiled: whether the steps run under torch.compile, except those of other tools, which it
            does not serve.
        alone: whether a sample's gradient is the one it has alone; not so where batch norm mixes
            samples.
        loop: whether a whole training loop is timed, loader and scheduler included.
        block: steps of a loop that are timed together, for steps of less than a millisecond.
        needs: the package that the model comes from, if not torch.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[], Batch]
    losses: Callable[[Tensor, Tensor], Tensor]
    compiled: bool = False
    alone: bool = True
    loop: bool = False
    block: int = 1
    needs: str = "torch"

    def setting(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        """Model and batch, the same for every call."""
        torch.manual_seed(seed)
        return self.make_model(), self.make_batch()


def class_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of class scores [N, classes]."""
    return F.cross_entropy(outputs, targets, reduction="none")


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the positions of scores [N, T, vocabulary]."""
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def squared_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over the positions and widths of [N, T, D]."""
    return (outputs - targets).square().mean((1, 2))


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                         nn.Linear(1024, 10))


def cabs_network() -> nn.Module:
    """The CIFAR-10 network of the CABS authors' code, for 3 × 24 × 24 images: twice conv 5×5×64 and
    pool 3/2, then 384, 192, 10."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(), nn.Linear(64 * 6 * 6, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(),
        nn.Linear(192, 10),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with GroupNorm, and a 1×1 one around them where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.GroupNorm(8, width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False), nn.GroupNorm(8, width_out),
        )
        self.around = (nn.Identity() if stride == 1
                       else nn.Conv2d(width_in, width_out, 1, stride, bias=False))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.main(inputs) + self.around(inputs))


def residual_network() -> nn.Module:
    """Blocks of 32, 64 and 128 channels for 3 × 32 × 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.GroupNorm(8, 32), nn.ReLU(),
        ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2), ResidualBlock(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention and a feed-forward part of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        samples, positions, width = inputs.shape
        joint = self.queries_keys_values(self.norm1(inputs))
        heads = joint.view(samples, positions, 3, self.heads, width // self.heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        attended = attended.transpose(1, 2).reshape(samples, positions, width)
        inputs = inputs + self.projection(attended)
        return inputs + self.feed_forward(self.norm2(inputs))


class Gpt(nn.Module):
    """A decoder on token ids [N, T]."""

    def __init__(
        self, layers: int = 4, width: int = 256, heads: int = 8, positions: int = 128,
        vocabulary: int = 512,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def wide_mlp() -> nn.Module:
    """The feed-forward part of a transformer of width 768."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))


def images(samples: int, *shape: int) -> Callable[[], Batch]:
    """What makes a batch of images of ten classes."""
    return lambda: (torch.randn(samples, *shape), torch.randint(10, (samples,)))


def tokens() -> Batch:
    """Ids and targets of 16 texts of 128 tokens."""
    return torch.randint(512, (16, 128)), torch.randint(512, (16, 128))


def features() -> Batch:
    """Inputs and targets of 8 texts of 512 positions."""
    return torch.randn(8, 512, 768), torch.randn(8, 512, 768)


WORKLOADS = {
    work.name: work
    for work in (
        Workload("a", "MLP 784-1024-1024-10, m=256", mlp, images(256, 784), class_losses),
        Workload("b", "CABS's CIFAR CNN, 3x24x24, m=128", cabs_network, images(128, 3, 24, 24),
                 class_losses),
        Workload("c", "ResNet-like 32/64/128, GroupNorm, 3x32x32, m=64", residual_network,
                 images(64, 3, 32, 32), class_losses),
        Workload("d", "GPT 4 layers, d=256, T=128, m=16", Gpt, tokens, token_losses),
        Workload("e", "768-3072-768 on tokens, T=512, m=8", wide_mlp, features, squared_losses),
    )
}
